"""The reference of the other files is transformers' answer, and the comparison can fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from testing import oracle
from testing.scheduler.engines import References
from testing.scheduler.prompts import MIN_MARGIN, TEXTS
from testing.scheduler.runner import TOLERANCE, Result, difference

NEW_TOKENS = 40


def test_reference_is_what_transformers_says(checkpoint: Path, references: References) -> None:
    model = oracle.load_oracle(checkpoint)
    for prompt in TEXTS:
        result = references.get(prompt, NEW_TOKENS)
        tokens = [*prompt, *result.tokens]
        expected = oracle.logprobs(model, tokens)[:-1]
        assert result.prompt_logprobs is not None
        served = torch.cat((result.prompt_logprobs, result.logprobs))
        assert (served - expected).abs().max() <= TOLERANCE

        assert min(oracle.selection_margins(model, tokens).values()) > MIN_MARGIN
        # Nor any token: with these prompts the comparison never needs its exception for undecided tokens.
        best, second = result.logprobs.topk(2).values.unbind(-1)
        assert (best - second).min() > 2 * TOLERANCE


def _result(logprobs: list[list[float]], tokens: list[int], prompt: list[list[float]] | None = None) -> Result:
    return Result(tokens, torch.tensor(logprobs), None if prompt is None else torch.tensor(prompt), 0)


def test_comparison_accepts_rounding_and_reports_it() -> None:
    reference = _result([[-1.0, -2.0], [-3.0, -0.5], [-1.0, -9.0]], [0, 1, 0], [[-0.5, -0.6]])
    served = _result([[-1.0, -2.00005], [-3.0, -0.5]], [0, 1], [[-0.5, -0.6]])
    assert difference(served, reference) == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [0, 0]},
        {"logprobs": torch.tensor([[-1.0, -2.0], [-3.0, -0.5 + 2 * TOLERANCE]])},
        {"logprobs": torch.tensor([[-1.0, torch.nan], [-3.0, -0.5]])},
        {"prompt_logprobs": torch.tensor([[-0.5, -0.6 + 2 * TOLERANCE]])},
        {"prompt_logprobs": torch.zeros(0, 2)},
        {"tokens": [], "logprobs": torch.zeros(0, 2)},
    ],
    ids=["token", "logprob", "nan", "prompt", "missing row", "no tokens"],
)
def test_comparison_refuses(change: dict[str, Any]) -> None:
    reference = _result([[-1.0, -2.0], [-3.0, -0.5]], [0, 1], [[-0.5, -0.6]])
    assert difference(reference, reference) == 0
    with pytest.raises(AssertionError):
        difference(dataclasses.replace(reference, **change), reference)


def test_comparison_stops_where_the_reference_is_undecided() -> None:
    reference = _result([[-1.0, -1.00001], [-3.0, -0.5]], [0, 1])
    another_text = _result([[-1.00001, -1.0], [-0.1, -7.0]], [1, 0])
    assert difference(another_text, reference) < 2e-5
