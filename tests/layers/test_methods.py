"""How each kind of layer is stored and multiplied, by its weight's format and the device."""

from typing import Any

import pytest
import torch

from vllm_deepseek_v4flash.compat import ReplicatedLinear, RowParallelLinear, UnquantizedLinearMethod
from vllm_deepseek_v4flash.layers import methods
from vllm_deepseek_v4flash.layers.linear import Fp32Linear, GroupedLinear, MergedLinear, Projection
from vllm_deepseek_v4flash.layers.methods import SMALL_WEIGHT, Unpacked, method_for
from vllm_deepseek_v4flash.ops.packed_weight import QuantizationError, Scheme

pytestmark = pytest.mark.usefixtures("tensor_parallel")

INT4 = Scheme("int4", 32, scale_dtype=torch.float16)
PAIR = [Projection("wq_a", 32, "wqa"), Projection("wkv", 32, "wkv")]


class Packed(Unpacked):
    """A quantization config of a checkpoint whose every linear is packed."""

    def get_quant_method(self, layer, prefix):
        return method_for(layer, prefix, {"attn.wq_a": INT4, "attn.wkv": INT4})


LAYERS = {
    "vLLM's own": lambda config, name: ReplicatedLinear(
        64, 32, bias=False, return_bias=False, quant_config=config, prefix=f"model.attn.{name}"
    ),
    "large": lambda config, name: RowParallelLinear(
        SMALL_WEIGHT // 64 + 64, 64, bias=False, return_bias=False, quant_config=config, prefix=f"model.attn.{name}"
    ),
    "fp32": lambda config, name: Fp32Linear(64, 32, quant_config=config, prefix=f"model.attn.{name}"),
    "grouped": lambda config, name: GroupedLinear(2, 64, 32, quant_config=config, prefix=f"model.attn.{name}"),
    "merged": lambda config, name: MergedLinear(
        64, PAIR, disable_tp=True, quant_config=config, prefix="model.attn.fused_wqa_wkv"
    ),
}

EXPECTED = {
    # kind: on a CPU with compiled ops, elsewhere, packed
    "vLLM's own": ("PlainLinearMethod", "UnquantizedLinearMethod", "PackedLinearMethod"),
    "large": ("UnquantizedLinearMethod", "UnquantizedLinearMethod", "PackedLinearMethod"),
    "fp32": ("Fp32LinearMethod", "Fp32LinearMethod", "PackedLinearMethod"),
    "grouped": ("GroupedLinearMethod", "GroupedLinearMethod", "PackedLinearMethod"),
    "merged": ("MergedLinearMethod", "MergedLinearMethod", "PackedMergedMethod"),
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_method_is_chosen_when_the_layer_is_built(kind):
    on_cpu, elsewhere, packed = EXPECTED[kind]
    layer = LAYERS[kind](Unpacked(), "wq_b")
    assert type(layer.quant_method).__name__ == on_cpu
    if on_cpu != "UnquantizedLinearMethod":
        assert layer.quant_method.shorten
    with torch.device("meta"):
        layer = LAYERS[kind](Unpacked(), "wq_b")
    assert type(layer.quant_method).__name__ == elsewhere
    if elsewhere != "UnquantizedLinearMethod":
        assert not layer.quant_method.shorten
    method = LAYERS[kind](Packed(), "wq_a").quant_method
    assert type(method).__name__ == packed
    assert method.dtype == (torch.float32 if kind == "fp32" else None)


def test_loading_changes_no_method():
    for make in LAYERS.values():
        layer = make(Unpacked(), "wq_b")
        method = layer.quant_method
        layer.weight.data.zero_()
        method.process_weights_after_loading(layer)
        assert layer.quant_method is method
        assert isinstance(method, UnquantizedLinearMethod | methods.PlainLinearMethod)


@pytest.mark.parametrize(("value", "dtype"), [(1.5, torch.bfloat16), (1 + 2**-20, torch.float32)])
def test_a_weight_is_multiplied_as_bf16_only_if_that_is_exact(value, dtype):
    layer = LAYERS["vLLM's own"](Unpacked(), "wq_b")
    layer.weight.data.fill_(value)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.weight(layer).dtype == dtype
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer(torch.ones(3, 64)), torch.full((3, 32), 64 * value))


def test_experts():
    choose = methods.experts_method
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose("layers.0.ffn.experts", {}, cpu).shorten
    assert not choose("layers.0.ffn.experts", {}, gpu).shorten
    both = {f"layers.0.ffn.experts.0.{name}": INT4 for name in ("w1", "w2")}
    assert choose("layers.0.ffn.experts", both, cpu).schemes == {"w13": INT4, "w2": INT4}
    with pytest.raises(QuantizationError, match=r"layers\.0\.ffn\.experts\.0\.w1 .* both must be packed, or neither"):
        choose("layers.0.ffn.experts", {"layers.0.ffn.experts.0.w1": INT4}, cpu)
    assert method_for(torch.nn.Embedding(2, 2), "model.embed", {}) is None


@pytest.mark.parametrize("values", [(1.5, 1.5), (1.5, 1 + 2**-20), (1 + 2**-20, 1.5)])
def test_both_stacks_of_experts_are_multiplied_in_one_dtype(values):
    method = methods.PlainExpertsMethod(shorten=True)
    layer: Any = torch.nn.Module()
    layer.local_experts, layer.inner, layer.inner_rank, layer.limit, layer.first_expert = 1, 16, 0, None, 0
    method.create_weights(layer, 32)
    layer.w13_weight.data.fill_(values[0] / 32)
    layer.w2_weight.data.fill_(values[1])
    method.process_weights_after_loading(layer)
    assert (layer.short_weights is not None) == (values == (1.5, 1.5))
    x = torch.ones(2, 32)
    result = method.apply(layer, x, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    gate = torch.tensor(values[0])
    torch.testing.assert_close(result, torch.full((2, 32), 16 * values[1] * (gate * gate.sigmoid() * gate).item()))
