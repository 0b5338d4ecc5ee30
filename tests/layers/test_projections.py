"""Which projections of one input share a weight, what that weight holds, and how vLLM and the loader find its parts."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from testing.ops.numeric import U32, assert_within, f64
from testing.ops.packed_weights import dense, random_weight
from vllm_deepseek_v4flash.layers import methods
from vllm_deepseek_v4flash.layers.linear import Fp32Linear, MergedLinear, Projection
from vllm_deepseek_v4flash.layers.methods import method_for
from vllm_deepseek_v4flash.layers.projections import Projections, merge, merged_parts, packed_modules_mapping
from vllm_deepseek_v4flash.ops.packed_weight import QuantizationError, Scheme

INT4 = Scheme("int4", 32, scale_dtype=torch.float16)
ORDERED = dataclasses.replace(INT4, act_order=True)
FP8 = Scheme("fp8", 128, scale_dtype=torch.float32)
HIDDEN = 64
PARENT = "model.layers.3.attn"
OWNER = "layers.3.attn"

WQ_A, WKV = Projection("wq_a", 48, "wqa"), Projection("wkv", 40, "wkv")
WEIGHTS = Projection("indexer.weights_proj", 8, "iweights")
COMPRESSOR = Projection("compressor.wkv", 24, "ckv", True), Projection("compressor.wgate", 24, "cgate", True)
ALL = (WQ_A, WKV, WEIGHTS, *COMPRESSOR)


def names(groups):
    return [[projection.name for projection in group] for group in groups]


def schemes_of(**by_name):
    return {f"{OWNER}.{name.replace('__', '.')}": scheme for name, scheme in by_name.items()}


def test_plain_weights_share_one_whatever_their_results():
    assert merge(ALL, {}, OWNER) == [list(ALL)]


def test_packed_weights_share_one_where_scheme_and_result_agree():
    schemes = schemes_of(wq_a=INT4, wkv=dataclasses.replace(INT4, source="other", module="wkv", shape=(1, 2)))
    assert names(merge(ALL, schemes, OWNER)) == [
        ["wq_a", "wkv"], ["indexer.weights_proj", "compressor.wkv", "compressor.wgate"],
    ]  # fmt: skip
    schemes |= schemes_of(compressor__wkv=INT4, compressor__wgate=INT4)
    assert names(merge(ALL, schemes, OWNER)) == [
        ["wq_a", "wkv"], ["indexer.weights_proj"], ["compressor.wkv", "compressor.wgate"],
    ]  # fmt: skip
    schemes |= schemes_of(wkv=dataclasses.replace(INT4, zero_points=True))
    assert names(merge(ALL[:2], schemes, OWNER)) == [["wq_a"], ["wkv"]]


def test_weights_in_activation_order_stay_separate():
    schemes = schemes_of(wq_a=ORDERED, wkv=ORDERED, compressor__wkv=INT4, compressor__wgate=INT4)
    assert names(merge(ALL, schemes, OWNER)) == [
        ["wq_a"], ["wkv"], ["indexer.weights_proj"], ["compressor.wkv", "compressor.wgate"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        ([128, 384, 64], [["a", "b", "c"]]),
        ([64, 128, 128], [["a"], ["b", "c"]]),
        ([128, 192, 128, 128], [["a", "b"], ["c", "d"]]),
    ],
)
def test_fp8_weights_begin_where_blocks_of_rows_do(rows, groups):
    projections = [Projection(name, n, name) for name, n in zip("abcd", rows, strict=False)]
    schemes = schemes_of(**dict.fromkeys("abcd", FP8))
    assert names(merge(projections, schemes, OWNER)) == groups
    # Half as many rows a rank.
    twice = [projection._replace(rows=2 * projection.rows) for projection in projections]
    assert names(merge(twice, schemes, OWNER, tp_size=2)) == groups


def build(projections, schemes=None, **options):
    """An owner of the projections under PARENT, and the caller of them."""
    owner = nn.Module()
    for path in ("compressor", "indexer"):
        owner.add_module(path, nn.Module())
    schemes = schemes or {}
    config = SimpleNamespace(
        schemes=schemes,
        online_quantization_config=None,
        get_quant_method=lambda layer, prefix: method_for(layer, prefix, schemes),
    )
    project = Projections(owner, HIDDEN, projections, quant_config=config, prefix=PARENT, **options)
    return owner, project


def wrapped(owner):
    """A model that has the owner at PARENT."""
    model = nn.Module()
    module = model
    *path, last = PARENT.split(".")
    for part in path:
        module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.add_module(last, owner)
    return model


def load(owner, tensors):
    """Canonical tensors by projection into the owner's parameters, as the loader does; and finish the layers."""
    model = wrapped(owner)
    parts, parameters = merged_parts(model), dict(model.named_parameters())
    for name, canonical in tensors.items():
        layer, *place = parts.get(f"{OWNER}.{name}", (f"{PARENT}.{name}",))
        for leaf, tensor in canonical.items():
            parameter = parameters[f"{layer}.{leaf}"]
            parameter.weight_loader(parameter, tensor, *place)
    for module in owner.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


@pytest.mark.usefixtures("tensor_parallel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False], ids=["stored as bf16", "as loaded"])
def test_merged_plain_weights_give_the_bits_of_separate_ones(dtype, exact, monkeypatch):
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    tensors = {p.name: torch.randn(p.rows, HIDDEN).to(torch.bfloat16 if exact else dtype) for p in ALL}
    owner, project = build(ALL)
    load(owner, {name: {"weight": tensor} for name, tensor in tensors.items()})
    x = torch.randn(5, HIDDEN).to(dtype)
    together = project(x)
    for projection in ALL:
        alone, project_one = build([projection])
        load(alone, {projection.name: {"weight": tensors[projection.name]}})
        expected = project_one(x)[projection.name]
        assert expected.dtype == (torch.float32 if projection.fp32 else dtype)
        assert together[projection.name].dtype == expected.dtype
        assert torch.equal(together[projection.name], expected), projection.name


@pytest.mark.usefixtures("tensor_parallel")
@pytest.mark.parametrize("scheme", [INT4, FP8, Scheme("fp4", 32)], ids=lambda scheme: scheme.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_packed_weights_give_each_its_product(scheme, dtype):
    projections = [
        Projection("wq_a", 128, "wqa"), Projection("wkv", 40, "wkv"),
        Projection("compressor.wkv", 128, "ckv", True), Projection("compressor.wgate", 24, "cgate", True),
    ]  # fmt: skip
    schemes = {f"{OWNER}.{p.name}": scheme for p in projections}
    tensors = {p.name: random_weight(scheme, p.rows, HIDDEN) for p in projections}
    owner, project = build(projections, schemes)
    assert names(group for _, _, group in project.layers) == [["wq_a", "wkv"], ["compressor.wkv", "compressor.wgate"]]
    load(owner, tensors)
    x = torch.randn(5, HIDDEN).to(dtype)
    results = project(x)
    for projection in projections:
        compute = torch.float32 if projection.fp32 else dtype
        weight = dense({n: t[None] for n, t in tensors[projection.name].items()}, scheme, compute)[0]
        result = results[projection.name]
        assert result.dtype == compute
        assert_within(result, f64(x) @ f64(weight).T, HIDDEN * U32 * f64(x).abs() @ f64(weight).abs().T)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scheme", [None, INT4, FP8], ids=["plain", "int4", "fp8"])
def test_each_part_of_a_column_parallel_weight_is_sharded(rank, scheme, tensor_parallel):
    tensor_parallel(rank, 2)
    gate_up = [Projection("w1", 256, "w1"), Projection("w3", 256, "w3")]
    schemes = {} if scheme is None else {f"{OWNER}.{p.name}": scheme for p in gate_up}
    owner, _ = build(gate_up, schemes, column_parallel=True, merged_name="gate_up_proj")
    if scheme is None:
        tensors = {p.name: {"weight": torch.randn(p.rows, HIDDEN)} for p in gate_up}
    else:
        tensors = {p.name: random_weight(scheme, p.rows, HIDDEN) for p in gate_up}
    load(owner, tensors)
    for leaf, parameter in owner.gate_up_proj.named_parameters():
        mine = [tensors[name][leaf].float().chunk(2)[rank] for name in ("w1", "w3")]
        assert torch.equal(parameter.float(), torch.cat(mine)), leaf


def test_replicated_weights_are_whole_on_every_rank(tensor_parallel):
    tensor_parallel(1, 2)
    owner, _ = build([WQ_A, WKV])
    tensors = {p.name: {"weight": torch.randn(p.rows, HIDDEN)} for p in (WQ_A, WKV)}
    load(owner, tensors)
    assert torch.equal(owner.fused_wqa_wkv.weight, torch.cat([t["weight"] for t in tensors.values()]))


def test_shards_within_a_block_of_scales_are_refused(tensor_parallel):
    """Though the rows of both parts together are whole blocks."""
    tensor_parallel(0, 2)
    gate_up = [Projection("w1", 128, "w1"), Projection("w3", 128, "w3")]
    with pytest.raises(QuantizationError, match="groups of 128 rows"):
        build(gate_up, {f"{OWNER}.{p.name}": FP8 for p in gate_up}, column_parallel=True)


@pytest.mark.usefixtures("tensor_parallel")
def test_what_is_not_merged_keeps_its_name():
    owner, project = build(ALL, schemes_of(wq_a=INT4, wkv=INT4, compressor__wkv=ORDERED, compressor__wgate=ORDERED))
    model = wrapped(owner)
    assert set(merged_parts(model)) == {f"{OWNER}.wq_a", f"{OWNER}.wkv"}
    assert isinstance(owner.compressor.wkv, Fp32Linear)
    assert owner.indexer.weights_proj.weight.shape == (8, HIDDEN)
    assert [leaf for _, leaf, _ in project.layers] == ["fused_wqa_wkv", "weights_proj", "wkv", "wgate"]
    assert packed_modules_mapping(model) == {"fused_wqa_wkv": ["wq_a", "wkv"]}


@pytest.mark.usefixtures("tensor_parallel")
def test_layers_that_replace_the_merged_ones_are_called():
    """vLLM's LoRA replaces a layer in its parent."""
    owner, project = build([WQ_A, WKV])

    class Wrapper(nn.Module):
        def forward(self, x):
            return [x + 1, x + 2]

    owner.fused_wqa_wkv = Wrapper()
    assert project(torch.zeros(1))["wkv"] == 2


def lora_config():
    return SimpleNamespace(fully_sharded_loras=False, max_lora_rank=8, lora_dtype=torch.float32, target_modules=None)


@pytest.mark.usefixtures("tensor_parallel")
def test_vllms_lora_finds_the_parts_of_merged_layers():
    """By the names that a checkpoint and an adapter give them; the wrappers that it chooses take a layer as it is."""
    from vllm.lora.layers import (
        MergedColumnParallelLinearVariableSliceWithLoRA,
        MergedColumnParallelLinearWithLoRA,
    )
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.utils import (
        from_layer,
        get_supported_lora_modules,
        is_in_target_modules,
        process_packed_modules_mapping,
    )

    owner, _ = build(ALL)
    model = wrapped(owner)
    model.packed_modules_mapping = packed_modules_mapping(model)
    name = "fused_wqa_wkv_iweights_ckv_cgate"
    mapping = process_packed_modules_mapping(model)
    manager = SimpleNamespace(packed_modules_mapping=mapping, packed_modules={})
    for module_name, module in model.named_modules():
        if isinstance(module, MergedLinear):
            LoRAModelManager._register_packed_modules(manager, module_name)
    assert manager.packed_modules == {f"{PARENT}.{name}": [f"{PARENT}.{projection.name}" for projection in ALL]}
    assert name in get_supported_lora_modules(model)
    assert is_in_target_modules(f"{PARENT}.{name}", ["compressor.wgate"], mapping)
    layer = getattr(owner, name)
    wrapper = from_layer(layer, 1, lora_config(), mapping[name])
    assert type(wrapper) is MergedColumnParallelLinearVariableSliceWithLoRA
    assert wrapper.output_slices == tuple(projection.rows for projection in ALL)
    pair, _ = build([WQ_A, WKV])
    wrapper = from_layer(pair.fused_wqa_wkv, 1, lora_config(), ["wq_a", "wkv"])
    assert type(wrapper) is MergedColumnParallelLinearWithLoRA


@pytest.mark.usefixtures("tensor_parallel")
def test_a_large_weight_is_kept_as_loaded(monkeypatch):
    monkeypatch.setattr(methods, "SMALL_WEIGHT", 88 * HIDDEN - 1)
    owner, _ = build([WQ_A, WKV])
    load(owner, {p.name: {"weight": torch.ones(p.rows, HIDDEN)} for p in (WQ_A, WKV)})
    layer = owner.fused_wqa_wkv
    assert layer.quant_method.weight(layer) is layer.weight
