"""The part `long`: the ops of a layer of each kind at 1,048,576 tokens of context, compared with the PyTorch reference.

Inputs, comparisons and bounds are those of the attention benchmarks. Nothing is timed, to fit into the budget, and what
the reference cannot compute for all tokens, such as a score for each of 262,144 entries, it computes for a sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch

from benchmarks.attention.indexer import indexer_case
from benchmarks.attention.sparse import attention_case
from benchmarks.attention.writes import compress_case
from benchmarks.inputs import FLASH, TINY, Sizes
from benchmarks.roofline import Bench, Case, UnavailableError, interpret

from .results import NotRunError, Recorder

CONTEXT = 1 << 20
BATCH = 4
CHUNK = 1024
"""Tokens of a prefill that ends at the context's last token."""
NEEDS = 12.0


def cases(s: Sizes) -> Iterator[Case]:
    """The most important first: each kind's attention, the indexer, the compressors; then chunks of a prefill."""
    context, (chunk, _) = s.contexts[0], s.prefills[0]
    for new, requests in ((1, BATCH), (chunk, 1)):
        for kind in ("window", "CSA", "HCA"):
            yield attention_case(s, kind, "fp8", requests, new, context, 1)
        for rows in ("fp8", "fp4"):
            yield indexer_case(s, rows, requests, new, context)
        for cache in ("CSA", "HCA", "keys"):
            yield compress_case(s, cache, requests, new)
    yield attention_case(s, "HCA", "plain", BATCH, 1, context, 1)
    yield compress_case(s, "CSA", BATCH, 1, completing=False)


def sizes(dry: bool) -> Sizes:
    if dry:
        return TINY
    return dataclasses.replace(FLASH, contexts=(CONTEXT,), prefills=((CHUNK, CONTEXT),))


class Untimed(Bench):
    """One copy of each input: nothing is timed, so the L2 does not matter."""

    def copies(self, size: int) -> int:
        return 1


def run(recorder: Recorder) -> None:
    if recorder.dry:
        interpret()
    torch.manual_seed(0)
    device = torch.device("cpu" if recorder.dry else "cuda")
    on = Bench.on(device)
    bench = Untimed(device, on.dry, on.l2_bytes, on.memory_bytes)
    s = sizes(recorder.dry)
    recorder.result.notes.append(
        f"The last token is at position {s.contexts[0] - 1:,}. Found: the relative error of a row, and its bound."
    )
    for case in cases(s):
        recorder.attempt(f"{case.op}: {case.label}", checked(case, bench), NEEDS)
        if not recorder.dry:
            # The caches of the next case are as large.
            bench.store.clear()
            torch.cuda.empty_cache()


def checked(case: Case, bench: Bench) -> Callable[[], str]:
    def check() -> str:
        try:
            work = case.build(bench)
            found = work.check()
        except UnavailableError as error:
            raise NotRunError(str(error)) from error
        if not bench.dry:
            torch.cuda.synchronize()
        return "; ".join(filter(None, (found, work.note)))

    return check
