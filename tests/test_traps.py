"""Each mistake of `traps.TRAPS`, made in the running model, must fail the parity test.

A mistake that the small configurations do not show could be made unnoticed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testing import engine, tiny
from testing.mutate import mutated
from testing.parity import TOLERANCE, Served, serve
from testing.traps import CHUNK, HARMLESS, TRAPS, Trap
from vllm_deepseek_v4flash.ops import dispatch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# Far enough above the tolerance that the rounding of another machine does not decide whether a trap is caught.
VISIBLE = 5 * TOLERANCE


class Engines:
    """The last engine asked for; cases are sorted so that each one starts once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key: tuple[str, bool] | None = None
        self.open = contextlib.ExitStack()
        self.served: Served

    def get(self, config: str, chunked: bool) -> Served:
        if self.key != (config, chunked):
            self.close()
            options = {"max_num_batched_tokens": CHUNK} if chunked else {}
            directory = self.directory / ("chunked" if chunked else "whole")
            self.served = self.open.enter_context(serve(config, directory, **options))
            self.key = config, chunked
        return self.served

    def close(self) -> None:
        self.open.close()
        self.key = None


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    engines = Engines(tmp_path_factory.mktemp("traps"))
    yield engines
    engines.close()


@pytest.fixture(autouse=True)
def _reference_ops() -> Iterator[None]:
    """The traps change the references; other implementations would not fall into them."""
    with dispatch.use("reference"):
        yield


def _error(served: Served, trap: Trap) -> float:
    with contextlib.ExitStack() as stack:
        for make in trap.breaks:
            stack.enter_context(make(served.model))
        try:
            return served.error()
        except engine.NanError:  # some mistakes are that visible
            return math.inf


def _sorted(traps: tuple[Trap, ...]) -> list[Any]:
    ordered = sorted(traps, key=lambda trap: (trap.chunked, list(tiny.CONFIGS).index(trap.config)))
    return [pytest.param(trap, id=trap.what) for trap in ordered]


@pytest.mark.parametrize("trap", _sorted(TRAPS))
def test_parity_fails_in_a_model_with_this_mistake(trap: Trap, engines: Engines) -> None:
    served = engines.get(trap.config, trap.chunked)
    assert served.error() <= TOLERANCE, "the model must be right before the mistake is made"
    assert _error(served, trap) > VISIBLE


@pytest.mark.parametrize("change", _sorted(HARMLESS))
def test_parity_holds_after_this_change(change: Trap, engines: Engines) -> None:
    assert _error(engines.get(change.config, change.chunked), change) <= TOLERANCE


def test_a_trap_whose_code_is_gone_is_an_error() -> None:
    """Otherwise the trap would leave the model unchanged, and no test would catch it."""
    with pytest.raises(LookupError, match="0 times"), mutated("ops.swiglu:swiglu", ("softplus", "silu")):
        pass
    with pytest.raises(LookupError, match="has no geglu"), mutated("ops.swiglu:geglu", ("silu", "gelu")):
        pass


# 16: the layer schedule. A layer of another kind has other tensors, so the load stops.
SCHEDULES: dict[str, tuple[dict[str, Any], str]] = {
    "the MTP slot's ratio for the last layer": (
        {"compress_ratios": [0, 4, 0, 0]},
        "unexpected: layers.2.attn.compressor.ape",
    ),
    "every ratio one layer early": (
        {"compress_ratios": [4, 4, 0, 0]},
        "missing: layers.0.attn.compressor.ape",
    ),
    "the MTP slot counted as a layer": (
        {"num_hidden_layers": 4},
        "num_hidden_layers=4 in config.json: the tensors have 3",
    ),
    "one hash layer too many": ({"num_hash_layers": 2}, "missing: layers.1.ffn.gate.tid2eid"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wrong_schedule_does_not_load(schedule: str, tmp_path: Path) -> None:
    overrides, complaint = SCHEDULES[schedule]
    right = tiny.CONFIGS["topk"]
    wrong = dataclasses.replace(right, overrides={**right.overrides, **overrides})
    path = tiny.write_checkpoint(tmp_path, right)
    (path / "config.json").write_text(json.dumps(wrong.hf_config | {"torch_dtype": "float32"}))
    # vLLM builds its config as a pydantic dataclass, which turns our CheckpointError into its own ValueError.
    with pytest.raises(ValueError, match=re.escape(complaint)):
        engine.make_llm(path)
