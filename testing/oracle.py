"""transformers' DeepSeek-V4 in fp32: the reference for the model in vLLM.

It simulates no quantisation, is correct in fp32 only (its bf16 path crashes or rounds elsewhere) and with eager
attention only, and takes one unpadded sequence at a time: its compressors pool padding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling


def load_oracle(directory: Path | str) -> Any:
    """The model of a directory with native, saved or transformers names, in fp32 and in eval mode."""
    model, info = DeepseekV4ForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    # transformers fills missing tensors with random numbers and goes on.
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise ValueError(f"transformers could not read all of {directory}: {wrong}")
    return model.eval()


@torch.no_grad()
def logprobs(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """The log-softmax over the vocabulary at every position, fp32 [T, V]."""
    logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], max_tokens: int, stop: Collection[int] = ()) -> list[int]:
    """The greedy continuation with the token that stopped it. No cache is used, so none can be wrong."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        logits = model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


@torch.no_grad()
def selection_margins(model: Any, tokens: Sequence[int]) -> dict[str, float]:
    """How clear the model's discrete choices are: the smallest gap of any of them, for "router" and "indexer".

    A gap is the difference between the last chosen score and the first one left out, divided by the scores' standard
    deviation. Two correct implementations may differ where it is not far above fp32 rounding (6e-8, which grows from
    layer to layer). inf if nothing was left out.
    """
    margins = {"router": math.inf, "indexer": math.inf}
    with _record_topk(margins):
        model(torch.tensor([list(tokens)]), use_cache=False)
    return margins


@contextmanager
def _record_topk(margins: dict[str, float]) -> Iterator[None]:
    """Watch the model's two uses of torch.topk: the router on experts, the indexer on entries."""

    def recorder(kind: str, original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _TopK(kind, margins):
                return original(self, *args, **kwargs)

        return forward

    patched = {"router": modeling.DeepseekV4TopKRouter, "indexer": modeling.DeepseekV4Indexer}
    originals = {kind: cls.forward for kind, cls in patched.items()}
    for kind, cls in patched.items():
        cls.forward = recorder(kind, originals[kind])
    try:
        yield
    finally:
        for kind, cls in patched.items():
            cls.forward = originals[kind]


class _TopK(torch.overrides.TorchFunctionMode):
    def __init__(self, kind: str, margins: dict[str, float]) -> None:
        self.kind = kind
        self.margins = margins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, torch.Tensor.topk):
            scores, k = args[0].flatten(0, -2), args[1]
            if k < scores.shape[-1]:
                edge = scores.topk(k + 1, dim=-1).values
                gap = (edge[:, k - 1] - edge[:, k])[torch.isfinite(edge[:, k])]
                spread = scores[torch.isfinite(scores)].std()
                if gap.numel():
                    self.margins[self.kind] = min(self.margins[self.kind], float(gap.min() / spread))
        return func(*args, **(kwargs or {}))
