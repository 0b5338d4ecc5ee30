"""From headers to parameters: what is planned, what is refused, and vocabulary layers that arrive packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from testing import format_cases as cases
from testing import tiny
from testing.fake_model import FakeModel
from vllm_deepseek_v4flash.checkpoint.dtypes import header_of
from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError
from vllm_deepseek_v4flash.checkpoint.headers import TensorHeader
from vllm_deepseek_v4flash.checkpoint.loader import load_weights
from vllm_deepseek_v4flash.checkpoint.plan import PackedModule
from vllm_deepseek_v4flash.checkpoint.survey import survey
from vllm_deepseek_v4flash.integration.quantization import DeepseekV4QuantConfig
from vllm_deepseek_v4flash.ops.packed_weight import canonical_shapes, dequantise

SPEC = tiny.CONFIGS["mixed"]
CONFIG = SPEC.config


FILE = Path("model-00001.safetensors")


def stored(tensors: dict[str, torch.Tensor]) -> list[TensorHeader]:
    return [dataclasses.replace(header_of(tensor, name), file=FILE) for name, tensor in tensors.items()]


def with_packed(module: str, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """SPEC's tensors with the weight of one module packed by GPTQ."""
    tensors = tiny.random_tensors(SPEC)
    n, k = tensors.pop(f"{module}.weight").shape
    case = cases.gptq(n=n, k=k, **options)
    tensors.update({f"{module}.{leaf}": tensor for leaf, tensor in case.leaves.items()})
    return tensors, case


def plan_of(tensors: dict[str, torch.Tensor], case: Any) -> dict[str, PackedModule]:
    found = survey(CONFIG, case.config, stored(tensors))
    assert found.problems == []
    return found.plan()


def load(
    model: FakeModel, tensors: Iterable[tuple[str, torch.Tensor]], case: Any, plan: dict[str, PackedModule]
) -> None:
    load_weights(model, CONFIG, tensors, quantization=case.config, packed=plan)


@pytest.mark.parametrize("module", ["embed", "head"])
def test_packed_vocabulary_layers_are_unpacked_at_load(module: str) -> None:
    tensors, case = with_packed(module)
    plan = plan_of(tensors, case)
    assert plan.keys() == {module}
    model = FakeModel(CONFIG)
    load(model, tensors.items(), case, plan)
    weight = model.get_parameter("head.weight" if module == "head" else "model.embed.weight")
    expected = plan[module].format.dequantise(case.leaves, plan[module].scheme)
    assert torch.equal(weight, expected)


def test_an_embedding_that_is_packed_along_its_tokens_is_turned_round() -> None:
    """As GPTQModel packs it: the table is a layer from tokens to channels."""
    tensors = tiny.random_tensors(SPEC)
    n, k = tensors.pop("embed.weight").shape
    case = cases.gptq(n=k, k=n, group=8, asymmetric=True, ordered=True)
    tensors.update({f"model.embed_tokens.{leaf}": tensor for leaf, tensor in case.leaves.items()})
    plan = plan_of(tensors, case)
    assert plan["embed"].transposed
    model = FakeModel(CONFIG)
    load(model, tensors.items(), case, plan)
    assert torch.equal(model.get_parameter("model.embed.weight"), case.weight.t())


def test_only_gptq_turns_an_embedding_round() -> None:
    tensors = tiny.random_tensors(SPEC)
    n, k = tensors["embed.weight"].shape
    (problem,) = survey(CONFIG, None, stored({**tensors, "embed.weight": torch.zeros(k, n)})).problems
    assert problem.kind == "mis-shaped"
    awq = cases.awq(n=k, k=n, group=8)
    del tensors["embed.weight"]
    tensors.update({f"embed.{leaf}": tensor for leaf, tensor in awq.leaves.items()})
    assert [problem.kind for problem in survey(CONFIG, awq.config, stored(tensors)).problems] == ["mis-shaped"]


def test_weights_are_repacked_one_by_one_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "layers.0.attn.wq_a"
    tensors, case = with_packed(module)
    plan = plan_of(tensors, case)
    shapes = canonical_shapes(plan[module].scheme, *plan[module].scheme.shape)
    seen = []

    def repack(self: PackedModule, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append({leaf: tensor.device.type for leaf, tensor in leaves.items()})
        return {leaf: torch.empty(shape, dtype=dtype, device="meta") for leaf, (shape, dtype) in shapes.items()}

    monkeypatch.setattr(PackedModule, "repack", repack)
    with torch.device("meta"):
        model = FakeModel(CONFIG)
        for leaf, (shape, _) in shapes.items():
            model.add(f"model.{module}.{leaf}", shape)
    load(model, tensors.items(), case, plan)
    assert seen == [dict.fromkeys(case.leaves, "meta")]


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("scales", r"1 format\n  format: head: tensor scales is missing; should be \[2, 264\]"),
        # A symmetric layout may do without these, but the headers promised them.
        ("qzeros", r"1 missing\n  missing: head\.qzeros: is part of a packed weight in model-00001\.safetensors"),
    ],
)
def test_a_leaf_that_never_comes_is_missing(leaf: str, message: str) -> None:
    tensors, case = with_packed("head")
    plan = plan_of(tensors, case)
    tensors.pop(f"head.{leaf}")
    with pytest.raises(CheckpointError, match=message):
        load(FakeModel(CONFIG), tensors.items(), case, plan)


def test_a_leaf_that_comes_twice_is_a_duplicate() -> None:
    tensors, case = with_packed("head")
    twice = [*tensors.items(), ("lm_head.scales", tensors["head.scales"])]
    with pytest.raises(CheckpointError, match=r"duplicate: lm_head\.scales"):
        load(FakeModel(CONFIG), twice, case, plan_of(tensors, case))


def test_a_bad_value_names_file_and_tensor() -> None:
    tensors, case = with_packed("head")
    plan = plan_of(tensors, case)
    tensors["head.scales"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors: .*head.*scales"):
        load(FakeModel(CONFIG), tensors.items(), case, plan)


def test_a_hub_repository_is_described_by_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, case = with_packed("head")
    asked = []

    def metadata(repo: str, revision: str | None = None) -> Any:
        asked.append((repo, revision))
        found = {header.name: SimpleNamespace(dtype=header.dtype, shape=[*header.shape]) for header in stored(tensors)}
        return SimpleNamespace(files_metadata={FILE.name: SimpleNamespace(tensors=found)})

    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    config = DeepseekV4QuantConfig(case.config)
    config.maybe_update_config("someone/a-checkpoint", hf_config=SPEC.hf_config, revision="main")
    assert asked == [("someone/a-checkpoint", "main")]
    assert config.plan == plan_of(tensors, case)


@pytest.mark.parametrize("layer", [0, CONFIG.num_hash_layers], ids=["hash", "biased"])
def test_a_packed_router_keeps_its_bias_and_table(layer: int) -> None:
    gate = f"layers.{layer}.ffn.gate"
    tensors, case = with_packed(gate)
    plan = plan_of(tensors, case)
    assert plan[gate].leaves == set(case.leaves)
    other = "tid2eid" if layer == 0 else "bias"
    model = FakeModel(CONFIG)
    for leaf, (shape, dtype) in canonical_shapes(plan[gate].scheme, *plan[gate].scheme.shape).items():
        model.add(f"model.{gate}.{leaf}", shape).data = torch.zeros(shape, dtype=dtype)
    load(model, tensors.items(), case, plan)
    loaded = {leaf: model.get_parameter(f"model.{gate}.{leaf}") for leaf in ("qweight", "scales", other)}
    assert torch.equal(loaded[other], tensors[f"{gate}.{other}"].to(loaded[other].dtype))
    canonical = {leaf: loaded[leaf] for leaf in ("qweight", "scales")}
    assert torch.equal(
        dequantise(canonical, plan[gate].scheme), plan[gate].format.dequantise(case.leaves, plan[gate].scheme)
    )
