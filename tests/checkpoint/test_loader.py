"""Every naming style fills the same parameters, and no checkpoint that does not fit gets through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import pytest
import torch

from testing.fake_model import FakeModel, load_stacked
from testing.tiny import CONFIGS, TinySpec, fuse_experts, random_tensors
from vllm_deepseek_v4flash.checkpoint import loader, names
from vllm_deepseek_v4flash.checkpoint.loader import CheckpointError, load_weights

SPEC = CONFIGS["odd"]
CONFIG = SPEC.config
WQ_A = "layers.1.attn.wq_a.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(SPEC)


def _check_filled(model: FakeModel, spec: TinySpec, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    stacked = fuse_experts(spec.config, tensors)
    for name, parameter in parameters.items():
        native = name.removeprefix("model.")
        native = native.replace("w13_weight", "gate_up_proj").replace("experts.w2_weight", "experts.down_proj")
        assert torch.equal(parameter, stacked[native].to(parameter.dtype)), name


@pytest.mark.parametrize("style", get_args(names.Style))
def test_every_style_fills_every_parameter(style: names.Style, tensors: dict[str, torch.Tensor]) -> None:
    model = FakeModel(CONFIG)
    stored = ((names.stored_name(name, style), tensor) for name, tensor in tensors.items())
    assert load_weights(model, CONFIG, stored) == set(dict(model.named_parameters()))
    _check_filled(model, SPEC, tensors)


@pytest.mark.parametrize("prefix", ["layers", "model.layers"])
def test_fused_experts(prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    model = FakeModel(CONFIG)
    stored = {name.replace("layers", prefix): tensor for name, tensor in fuse_experts(CONFIG, tensors).items()}
    assert load_weights(model, CONFIG, stored.items()) == set(dict(model.named_parameters()))
    _check_filled(model, SPEC, tensors)


def test_order_does_not_matter(tensors: dict[str, torch.Tensor]) -> None:
    model = FakeModel(CONFIG)
    load_weights(model, CONFIG, reversed(tensors.items()))
    _check_filled(model, SPEC, tensors)


def test_mtp_is_skipped_and_counted(tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM's loggers do not propagate, so the log is taken where it is written.
    messages: list[str] = []
    monkeypatch.setattr(loader.logger, "info", lambda message, *values: messages.append(message % values))
    mtp = {"mtp.0.e_proj.weight": torch.zeros(1), "model.mtp.1.norm.weight": torch.zeros(2)}
    load_weights(FakeModel(CONFIG), CONFIG, {**mtp, **tensors}.items())
    assert messages == ["Skipped 2 mtp.* tensors: multi-token prediction is not supported."]


def _refused(tensors: dict[str, torch.Tensor], extra: Iterable[tuple[str, torch.Tensor]] = ()) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_weights(FakeModel(CONFIG), CONFIG, [*tensors.items(), *extra])
    return str(caught.value)


def test_missing(tensors: dict[str, torch.Tensor]) -> None:
    rest = {name: tensor for name, tensor in tensors.items() if name != WQ_A}
    assert f"missing: {WQ_A}: should be [72, 200]" in _refused(rest)


def test_missing_expert(tensors: dict[str, torch.Tensor]) -> None:
    name = "layers.2.ffn.experts.6.w3.weight"
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    assert _refused(rest).endswith(f"does not fit its config.json: 1 missing\n  missing: {name}: should be [56, 200]")


@pytest.mark.parametrize(
    "name", ["model.layers.1.attn.wq_z.weight", "layers.4.attn.wq_a.weight", "layers.0.attn.compressor.ape"]
)
def test_unexpected(name: str, tensors: dict[str, torch.Tensor]) -> None:
    message = _refused(tensors, [(name, torch.zeros(3, 4))])
    assert f"unexpected: {name}: has [3, 4] F32; config.json asks for no such tensor" in message


def test_duplicate_under_two_names(tensors: dict[str, torch.Tensor]) -> None:
    other = "model.layers.1.self_attn.q_a_proj.weight"
    message = _refused(tensors, [(other, tensors[WQ_A])])
    assert f"1 duplicate\n  duplicate: {other}: has [72, 200] F32; {WQ_A} is the same tensor" in message


def test_duplicate_of_a_fused_expert(tensors: dict[str, torch.Tensor]) -> None:
    stack = fuse_experts(CONFIG, tensors)["layers.0.ffn.experts.down_proj"]
    message = _refused(tensors, [("layers.0.ffn.experts.down_proj", stack)])
    assert "7 duplicate\n" in message
    expert = "layers.0.ffn.experts.0.w2.weight"
    assert f"duplicate: {expert}: is stored separately and in layers.0.ffn.experts.down_proj" in message


def test_mis_shaped(tensors: dict[str, torch.Tensor]) -> None:
    message = _refused({**tensors, WQ_A: tensors[WQ_A].T.contiguous()})
    assert f"mis-shaped: {WQ_A}: has [200, 72] F32, should be [72, 200]" in message
    assert "missing" not in message


def test_mis_shaped_stack(tensors: dict[str, torch.Tensor]) -> None:
    fused = fuse_experts(CONFIG, tensors)
    name = "layers.0.ffn.experts.gate_up_proj"
    message = _refused({**fused, name: fused[name].transpose(1, 2)})
    assert f"1 mis-shaped\n  mis-shaped: {name}: has [7, 200, 112] F32, should be [7, 112, 200]" in message


def test_integer_table_in_float(tensors: dict[str, torch.Tensor]) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    message = _refused({**tensors, name: tensors[name].float()})
    assert f"mis-typed: {name}: has [301, 3] F32, should be I64 or I32" in message


def test_integer_weight(tensors: dict[str, torch.Tensor]) -> None:
    message = _refused({**tensors, WQ_A: tensors[WQ_A].to(torch.int64)})
    assert (
        "1 format\n  format: layers.1.attn.wq_a: has weight [72, 200] I64, should be a weight in BF16, F16" in message
    )


@pytest.mark.parametrize("wrong", [-1, 7])
def test_expert_ids_out_of_range(wrong: int, tensors: dict[str, torch.Tensor]) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    table = tensors[name].clone()
    table[5, 1] = wrong
    message = _refused({**tensors, name: table})
    assert f"mis-valued: {name}" in message
    assert "should be 0 to n_routed_experts - 1 = 6" in message


@pytest.mark.parametrize(("dtype", "code"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantised_weight_and_scale(dtype: torch.dtype, code: str, tensors: dict[str, torch.Tensor]) -> None:
    scale = "layers.1.attn.wq_a.scale"
    message = _refused({**tensors, WQ_A: tensors[WQ_A].to(dtype)}, [(scale, torch.ones(1, 2))])
    assert (
        f"1 format\n  format: layers.1.attn.wq_a: has weight [72, 200] {code}, scale [1, 2] F32, should be" in message
    )
    assert "config.json has no quantization_config. Restore the one" in message


def test_packed_weights_are_quantised_not_missing(tensors: dict[str, torch.Tensor]) -> None:
    rest = {name: tensor for name, tensor in tensors.items() if name != WQ_A}
    packed = "model.layers.1.self_attn.q_a_proj"
    leaves = [(f"{packed}.qweight", torch.zeros(25, 72).int()), (f"{packed}.scales", torch.zeros(2, 72))]
    message = _refused(rest, leaves)
    assert "1 format\n  format: layers.1.attn.wq_a: has qweight [25, 72] I32, scales [2, 72] F32, should be" in message
    assert "missing" not in message


def test_a_bias_of_zeros_is_dropped_and_any_other_refused(tensors: dict[str, torch.Tensor]) -> None:
    model, bias = FakeModel(CONFIG), WQ_A.replace("weight", "bias")
    load_weights(model, CONFIG, [*tensors.items(), (bias, torch.zeros(72))])
    _check_filled(model, SPEC, tensors)
    message = _refused(tensors, [(bias, torch.ones(72))])
    assert f"1 mis-valued\n  mis-valued: {bias}: tensor bias is not zero" in message


def test_long_lists_are_cut() -> None:
    message = _refused({})
    assert message.count("\n  missing: ") == 20
    assert f"... and {len(names.expected_tensors(CONFIG)) - 20} more missing" in message


def test_pipeline_stages_together_fill_the_model(tensors: dict[str, torch.Tensor]) -> None:
    filled: set[str] = set()
    for layers, first, last in ((range(0, 2), True, False), (range(2, 4), False, True)):
        model = FakeModel(CONFIG, layers, first, last)
        stage = load_weights(model, CONFIG, tensors.items(), local_layers=layers, first_stage=first, last_stage=last)
        assert stage == set(dict(model.named_parameters()))
        _check_filled(model, SPEC, tensors)
        assert not filled & stage
        filled |= stage
    assert filled == set(dict(FakeModel(CONFIG).named_parameters()))


def test_other_stages_tensors_are_checked_but_need_not_come(tensors: dict[str, torch.Tensor]) -> None:
    model = FakeModel(CONFIG, range(0, 2), last=False)
    near = {name: tensor for name, tensor in tensors.items() if not name.startswith(("layers.3", "head"))}
    load_weights(model, CONFIG, near.items(), local_layers=range(0, 2), last_stage=False)
    with pytest.raises(CheckpointError, match=r"mis-shaped: head\.weight: has \[1\]"):
        load_weights(
            model,
            CONFIG,
            {**near, "head.weight": torch.zeros(1)}.items(),
            local_layers=range(0, 2),
            last_stage=False,
        )


def test_local_experts(tensors: dict[str, torch.Tensor]) -> None:
    local = range(2, 5)
    model = FakeModel(CONFIG)
    mine = {k: v for k, v in tensors.items() if names.expert_index(k) in (None, *local)}
    load_weights(model, CONFIG, mine.items(), local_experts=local)
    everything = FakeModel(CONFIG)
    load_weights(everything, CONFIG, tensors.items(), local_experts=local)
    for (name, one), other in zip(model.named_parameters(), everything.parameters(), strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), name
        if name.endswith("w2_weight"):
            assert one[2:5].isfinite().all()
            assert one[:2].isnan().all()
            assert one[5:].isnan().all()


def test_a_shared_expert_without_parameters_is_one_more_of_the_stack(tensors: dict[str, torch.Tensor]) -> None:
    model: Any = FakeModel(CONFIG)
    experts, inter, hidden = CONFIG.n_routed_experts, CONFIG.moe_intermediate_size, CONFIG.hidden_size
    ffn = model.get_submodule("model.layers.1.ffn")
    del ffn.shared_experts
    for name, shape in (("w13", (experts + 1, 2 * inter, hidden)), ("w2", (experts + 1, hidden, inter))):
        model.add(f"model.layers.1.ffn.experts.{name}_weight", shape).weight_loader = load_stacked
    assert load_weights(model, CONFIG, tensors.items()) == set(dict(model.named_parameters()))
    shared = {n: tensors[f"layers.1.ffn.shared_experts.{n}.weight"] for n in ("w1", "w2", "w3")}
    assert torch.equal(ffn.experts.w13_weight[experts], torch.cat([shared["w1"], shared["w3"]]))
    assert torch.equal(ffn.experts.w2_weight[experts], shared["w2"])
    last = tensors[f"layers.1.ffn.experts.{experts - 1}.w2.weight"]
    assert torch.equal(ffn.experts.w2_weight[experts - 1], last)
    missing = {name: tensor for name, tensor in tensors.items() if name != "layers.1.ffn.shared_experts.w3.weight"}
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.ffn\.shared_experts\.w3\.weight"):
        load_weights(model, CONFIG, missing.items())


def test_own_weight_loader_is_used(tensors: dict[str, torch.Tensor]) -> None:
    model = FakeModel(CONFIG)
    parameter: Any = dict(model.named_parameters())["model.layers.0.attn.attn_sink"]
    parameter.data = torch.full((3,), float("nan"))
    parameter.weight_loader = lambda parameter, tensor: parameter.copy_(tensor[3:])
    load_weights(model, CONFIG, tensors.items())
    assert torch.equal(parameter.data, tensors["layers.0.attn.attn_sink"][3:])


def test_sharded_parameter_without_a_loader_is_a_bug(tensors: dict[str, torch.Tensor]) -> None:
    model = FakeModel(CONFIG)
    parameter: Any = dict(model.named_parameters())["model.layers.0.attn.attn_sink"]
    parameter.data = torch.zeros(1)
    with pytest.raises(TypeError, match="a sharded parameter needs a weight_loader"):
        load_weights(model, CONFIG, tensors.items())


def test_model_without_a_place(tensors: dict[str, torch.Tensor]) -> None:
    model: Any = FakeModel(CONFIG)
    del model.model.norm.weight
    with pytest.raises(CheckpointError, match=r"unplaceable: norm\.weight.*the model has no model\.norm"):
        load_weights(model, CONFIG, tensors.items())


def test_a_router_bias_where_none_belongs_is_unexpected_not_quantised(tensors: dict[str, torch.Tensor]) -> None:
    assert CONFIG.num_hash_layers > 0
    stray = "layers.0.ffn.gate.bias"
    stored = [*tensors.items(), (stray, torch.zeros(CONFIG.n_routed_experts))]
    with pytest.raises(CheckpointError) as error:
        load_weights(FakeModel(CONFIG), CONFIG, stored)
    assert f"unexpected: {stray}" in str(error.value)
    assert "format" not in str(error.value)
    assert "gate.weight" not in str(error.value)


MERGED = "model.layers.1.attn.fused_wqa_wkv"
PARTS = {"layers.1.attn.wq_a": (MERGED, 0), "layers.1.attn.wkv": (MERGED, 1)}


def _merged_model() -> FakeModel:
    """Layer 1's wq_a and wkv are rows of one parameter."""
    model = FakeModel(CONFIG)
    rows = []
    for module in PARTS:
        owner: Any = model.get_submodule(f"model.{module}")
        rows.append(owner.weight.shape[0])
        del owner._parameters["weight"]
    parameter = model.add(f"{MERGED}.weight", (sum(rows), CONFIG.hidden_size))

    def place(parameter: torch.nn.Parameter, tensor: torch.Tensor, part: int) -> None:
        parameter.data.split(rows)[part].copy_(tensor)

    parameter.weight_loader = place
    return model


def test_a_merged_layer_takes_its_parts(tensors: dict[str, torch.Tensor]) -> None:
    model = _merged_model()
    filled = load_weights(model, CONFIG, tensors.items(), merged=PARTS)
    assert filled == set(dict(model.named_parameters()))
    assert f"{MERGED}.weight" in filled
    expected = torch.cat([tensors[f"{module}.weight"] for module in PARTS])
    assert torch.equal(model.get_parameter(f"{MERGED}.weight"), expected.float())


def test_a_missing_part_of_a_merged_layer_is_reported(tensors: dict[str, torch.Tensor]) -> None:
    rest = {name: tensor for name, tensor in tensors.items() if name != WQ_A}
    with pytest.raises(CheckpointError, match=f"missing: {WQ_A}"):
        load_weights(_merged_model(), CONFIG, rest.items(), merged=PARTS)


def test_a_merged_parameter_needs_a_loader(tensors: dict[str, torch.Tensor]) -> None:
    model = _merged_model()
    parameter: Any = model.get_parameter(f"{MERGED}.weight")
    del parameter.weight_loader
    with pytest.raises(TypeError, match=f"{MERGED}.weight has no weight_loader to place the rows of"):
        load_weights(model, CONFIG, tensors.items(), merged=PARTS)
