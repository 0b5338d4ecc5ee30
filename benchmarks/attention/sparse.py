"""Attention of decoding and prefilling requests over window rows and compressed entries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from vllm_deepseek_v4flash.kv_cache.page_sizes import entry_page, window_page
from vllm_deepseek_v4flash.ops.rows import PagedRows

from .. import roofline, vllm_kernels
from ..flash_cases import row_format
from ..inputs import Attention, Sizes, paged, quarter_turns, spread_indices
from ..report import Row
from ..roofline import Aim, Bench, Case, Work, compare, sampled
from .common import BF16, BF16_ROUNDING, known, row_bytes, share_of_bandwidth, short

_ROWS = {"fp8": "fp8", "plain": "bf16"}


def level_with_flashmla(row: Row) -> bool | None:
    # Two runs of the same kernel differ by up to 5 %.
    return known(row.ratio, lambda ratio: ratio >= 0.95) if row.peer.startswith("FlashMLA") else None


def visible_sum(first: int, last: int, ratio: int, most: int) -> int:
    """The sum of min((t + 1) // ratio, most) over t = first..last."""
    return sum(min((t + 1) // ratio, most) for t in range(first, last + 1))


def attention_case(s: Sizes, kind: str, rows: str, requests: int, new: int, context: int, tp: int) -> Case:
    """Each request has `new` tokens, the last of them at position context - 1."""
    heads, ratio, first, last = s.heads // tp, s.ratio(kind), context - new, context - 1
    most = {"window": 0, "CSA": s.topk, "HCA": context}[kind]
    keys = visible_sum(first, last, 1, s.window) + (visible_sum(first, last, ratio, most) if ratio else 0)
    visible = context // ratio if ratio else 0
    unique = min(context, new + s.window - 1) + min(visible, new * most)
    page = window_page(row_format(rows, "bf16", s.dim, s.rope), s.window)
    moved = unique * row_bytes(page) + new * (2 * 2 * heads * s.dim + 4 * s.rope)
    moved += new * s.topk * 4 if kind == "CSA" else 0

    def build(bench: Bench) -> Work:
        kernel, reference = roofline.kernel_and_reference("sparse_attention")
        copies, tokens = bench.copies(requests * moved), requests * new
        windows, note = paged(bench, "window rows", page, copies, requests, max(0, first - s.window + 1), last)
        entries: Sequence[PagedRows | None] = [None] * copies
        shared = ""
        if ratio:
            entries, shared = paged(bench, f"{kind} entries", entry_page(page.format, ratio), copies, requests, 0, last)
        positions = torch.arange(first, context, device=bench.device).repeat(requests)
        request = torch.arange(requests, device=bench.device, dtype=torch.int32).repeat_interleave(new)
        seen = (positions + 1) // ratio if ratio else positions
        sinks = torch.randn(heads, device=bench.device)
        cos_sin = quarter_turns(bench, tokens, s.rope)
        inputs = [
            Attention(
                torch.randn((tokens, heads, s.dim), device=bench.device, dtype=BF16), sinks, positions, request, window,
                s.window, s.dim**-0.5, entry, spread_indices(seen, s.topk) if kind == "CSA" else None, ratio, visible,
            )
            for window, entry in zip(windows, entries, strict=True)
        ]  # fmt: skip
        calls = [partial(kernel, **vars(x), cos_sin=cos_sin) for x in inputs]

        def expected(tokens: list[int], cos_sin: torch.Tensor | None = None) -> torch.Tensor:
            return reference(**vars(inputs[0].part(tokens)), cos_sin=cos_sin)

        def check() -> str:
            # The softmax's weights and the result are rounded to bf16.
            bound, pick = 2 * BF16_ROUNDING, sampled(tokens)
            off = compare("the result", calls[0]()[pick], expected(pick, cos_sin[pick]), bound)
            return f"{off:.1e} of {bound:.1e}"

        peer = vllm_kernels.flashmla_decode if new == 1 else vllm_kernels.flashmla_prefill
        return Work(calls, check, [peer(bench, inputs, expected)], "; ".join(filter(None, (note, shared))))

    what = f"batch {requests}" if new == 1 else f"{new} tokens"
    label = f"{kind} {'decode' if new == 1 else 'prefill'}, {what}, {short(context)}, {heads} heads, {_ROWS[rows]} rows"
    aims = []
    if new == 1:
        aims = share_of_bandwidth(requests)
        if requests >= 32 and rows == "fp8":
            aims.append(Aim("level with FlashMLA (95 % or more of its speed)", level_with_flashmla))
    elif kind == "CSA" and tp == 1:
        aims = [Aim("250 TFLOP/s", lambda row: known(row.tflop_per_s, lambda rate: rate >= 250))]
    return Case("sparse_attention", label, requests * moved, 4 * requests * keys * heads * s.dim, build, aims)
