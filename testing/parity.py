"""One of `tiny.CONFIGS` in an fp32 engine, with transformers' answer to the same prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from testing import engine, oracle, tiny

# Two correct fp32 implementations differ by the order of their sums: 5e-6 to 1.1e-5 over these configurations.
# A logprob near -10 has an ulp of 1e-6, and sums of a few hundred terms lose a few ulps in each layer.
TOLERANCE = 1e-4


@dataclass
class Served:
    """A running engine and its checkpoint's prompt of T tokens."""

    name: str
    llm: Any
    model: torch.nn.Module
    """Ours, inside the engine."""
    oracle: Any
    """transformers' model of the same checkpoint."""
    tokens: list[int]
    expected: torch.Tensor
    """transformers' log-softmax [T, V]."""

    def error(self) -> float:
        """Run the prompt: the largest |difference| from transformers over all positions and the vocabulary."""
        return float((engine.full_logprobs(self.llm, [self.tokens])[0] - self.expected).abs().max())


@contextlib.contextmanager
def serve(name: str, directory: Path, **overrides: Any) -> Iterator[Served]:
    """Write CONFIGS[name] below `directory` and run it. overrides: as for `engine.make_llm`."""
    spec = tiny.CONFIGS[name]
    path = tiny.write_checkpoint(directory / name, spec)
    reference, tokens = oracle.load_oracle(path), tiny.prompt_tokens(spec)
    expected = oracle.logprobs(reference, tokens)
    with engine.running(path, **overrides) as llm:
        model = llm.apply_model(lambda model: model)[0]
        yield Served(name, llm, model, reference, tokens, expected)
