"""All cases in the order in which they run, and the command line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .. import roofline
from ..inputs import FLASH, TINY
from ..roofline import Case
from .indexer import indexer_case, topk_case
from .sparse import attention_case
from .streams import mhc_head_case, mhc_post_pre_case, route_case
from .writes import compress_case, insert_case


def all_cases(dry: bool) -> list[Case]:
    """The most important first, in case the budget does not suffice for all."""
    s = TINY if dry else FLASH
    kinds = ("CSA", "HCA")
    decode = [(1, c, b) for c, b in itertools.product(s.contexts, s.batches)]
    chunk = s.prefills[0][0]

    def attention(rows: str, tp: int) -> list[Case]:
        found = [attention_case(s, "window", rows, b, 1, s.contexts[0], tp) for b in s.batches]
        found += [attention_case(s, kind, rows, b, new, c, tp) for kind in kinds for new, c, b in decode]
        return found + [attention_case(s, kind, rows, 1, new, c, tp) for kind in kinds for new, c in s.prefills]

    cases = attention("fp8", 1)
    cases += [indexer_case(s, rows, b, new, c) for rows in ("fp8", "fp4") for new, c, b in decode]
    cases += [indexer_case(s, rows, 1, new, c) for rows in ("fp8", "fp4") for new, c in s.prefills]
    cases += [topk_case(s, rows) for rows in s.batches]
    cases += [mhc_post_pre_case(s, t) for t in s.streams_tokens] + [mhc_head_case(s, t) for t in s.streams_tokens]
    cases += [
        compress_case(s, cache, b, 1, completing)
        for cache in (*kinds, "keys") for completing in (True, False) for b in s.batches
    ]  # fmt: skip
    cases += [compress_case(s, cache, 1, chunk) for cache in (*kinds, "keys")]
    cases += [insert_case(s, t) for t in (*s.batches, chunk)] + [route_case(s, t) for t in (*s.batches, chunk)]
    cases += attention("plain", 1)
    return cases + [case for tp in s.ranks[1:] for rows in ("fp8", "plain") for case in attention(rows, tp)]


def main(arguments: Sequence[str]) -> int:
    return roofline.main(
        arguments, name="attention", title="Attention, indexer, compressor, mHC and router kernels", cases=all_cases
    )
