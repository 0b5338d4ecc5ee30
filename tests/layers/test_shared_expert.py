"""When the shared expert is computed as one more of the routed experts, and when it cannot be."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vllm_deepseek_v4flash import log
from vllm_deepseek_v4flash.layers import moe
from vllm_deepseek_v4flash.layers.methods import Schemes, why_not_fused
from vllm_deepseek_v4flash.ops.packed_weight import Scheme

INT4 = Scheme("int4", 128, scale_dtype=torch.bfloat16, module="layers.1.ffn.experts.0.w1", shape=(64, 128))


def schemes(routed: Scheme | None, shared: Scheme | None, **others: Scheme | None) -> Schemes:
    """The packed modules of layer 1: `shared` for all of the shared expert's weights but `others`, by name."""
    found = {}
    for name in ("w1", "w2", "w3"):
        for expert, scheme in (("experts.0", routed), ("shared_experts", others.get(name, shared))):
            if scheme is not None:
                found[f"layers.1.ffn.{expert}.{name}"] = scheme
    return found


def test_weights_packed_in_the_same_way_are_in_one_stack() -> None:
    elsewhere = dataclasses.replace(INT4, module="layers.1.ffn.shared_experts.w1", source="other", shape=(1, 2))
    assert why_not_fused(schemes(INT4, elsewhere), "model.layers.1.ffn") is None


@pytest.mark.parametrize(
    ("shared", "summary"),
    [
        (Scheme("fp8", 128, scale_dtype=torch.float32), "fp8 in groups of 128 (torch.float32 scales)"),
        (dataclasses.replace(INT4, group_size=64), "int4 in groups of 64 "),
        (dataclasses.replace(INT4, zero_points=True), "int4 in groups of 128 with zeros "),
        (dataclasses.replace(INT4, act_order=True), "int4 in groups of 128 in activation order "),
        (dataclasses.replace(INT4, scale_dtype=torch.float16), "int4 in groups of 128 (torch.float16 scales)"),
        (None, None),
    ],
    ids=["kind", "group", "zeros", "order", "scales", "plain"],
)
@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_one_weight_packed_otherwise_keeps_the_expert_separate(shared: Scheme | None, summary: str, name: str) -> None:
    reason = why_not_fused(schemes(INT4, INT4, **{name: shared}), "model.layers.1.ffn")
    expected = "both would have to be packed" if summary is None else f"their {name} is {summary}"
    assert reason is not None
    assert expected in reason


@pytest.mark.parametrize(
    ("packed", "expert_parallel", "said"),
    [
        (schemes(INT4, INT4), False, "run as one more of the routed experts"),
        (schemes(INT4, INT4), True, "run separately from the routed ones: ranks hold different experts."),
        (schemes(Scheme("fp4", 32), None), False, "run separately from the routed ones: both would have to be packed."),
        ({}, False, "run separately from the routed ones: both would have to be packed."),
    ],
)
def test_the_log_says_once_how_shared_experts_run(
    packed: Schemes, expert_parallel: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(moe.logger, "info", lambda message, *values, **_: messages.append(message % values))
    log.info_once.cache_clear()
    for _ in range(2):
        fused = moe.shared_is_fused(packed, expert_parallel, "model.layers.1.ffn")
        assert fused == ("one more" in said)
    (message,) = messages
    assert said in message
