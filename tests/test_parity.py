"""The model in vLLM compared with transformers in fp32: every logprob of every position, prefill and decode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from testing import engine, oracle, tiny
from testing.parity import TOLERANCE, Served, serve

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NEW_TOKENS = 40


# All kinds of layers and the indexer's choice, as far as the interpreter's speed allows.
ON_BOTH_RUNNERS = ("topk", "odd")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.both_runners if name in ON_BOTH_RUNNERS else ()) for name in tiny.CONFIGS
    ],
)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(request.param, tmp_path_factory.mktemp("parity")) as running:
        yield running


def test_prefill_equals_transformers(served: Served) -> None:
    assert served.error() <= TOLERANCE


def test_greedy_decode_equals_transformers(served: Served) -> None:
    """Tokens and whole distributions of 40 decode steps, compared with one teacher-forced pass."""
    ((tokens, table),) = engine.decode(served.llm, [served.tokens], NEW_TOKENS)
    expected = oracle.logprobs(served.oracle, served.tokens + tokens)[len(served.tokens) - 1 : -1]
    assert tokens == expected.argmax(-1).tolist()
    assert (table - expected).abs().max() <= TOLERANCE


def test_any_length_in_one_batch(served: Served) -> None:
    """Prompts that end before, at and after the first compressed entries, in one step."""
    lengths = (1, 2, 3, 4, 5, 8, 127, 128)
    tables = engine.full_logprobs(served.llm, [served.tokens[:length] for length in lengths])
    for length, table in zip(lengths, tables, strict=True):
        # The model is causal: the logprobs of a prefix are the prefix of the logprobs.
        error = (table - served.expected[:length]).abs().max()
        assert error <= TOLERANCE, f"{length} tokens: {error}"


def _transformers_saves(original: Path, target: Path, *, hybrid: bool) -> None:
    oracle.load_oracle(original).save_pretrained(target, save_original_format=hybrid)


STYLES: dict[str, Callable[[Path, Path, tiny.TinySpec], object]] = {
    "prefixed, in shards": lambda _, target, spec: tiny.write_checkpoint(target, spec, style="prefixed", shards=3),
    "transformers' names, experts separate": lambda _, target, spec: tiny.write_checkpoint(
        target, spec, style="transformers", resaved_config=True
    ),
    "hybrid names, experts fused": lambda _, target, spec: tiny.write_checkpoint(
        target, spec, style="saved", fused=True
    ),
    "save_pretrained, as it does by default": lambda original, target, _: _transformers_saves(
        original, target, hybrid=True
    ),
    "save_pretrained, transformers' own names": lambda original, target, _: _transformers_saves(
        original, target, hybrid=False
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_way_of_writing_a_checkpoint_gives_the_same_model(style: str, tmp_path: Path) -> None:
    spec = tiny.CONFIGS["yarn"]  # its rope parameters differ most between the two forms of config.json
    original = tiny.write_checkpoint(tmp_path / "native", spec)
    STYLES[style](original, tmp_path / "other", spec)
    tokens = tiny.prompt_tokens(spec)
    expected = oracle.logprobs(oracle.load_oracle(original), tokens)
    with engine.running(tmp_path / "other") as llm:
        (table,) = engine.full_logprobs(llm, [tokens])
    assert (table - expected).abs().max() <= TOLERANCE


def test_the_comparison_sees_every_token(served: Served) -> None:
    """Two constant tables would agree; these vary from position to position."""
    spread = served.expected.std(0)
    assert torch.all(spread > 100 * TOLERANCE)
