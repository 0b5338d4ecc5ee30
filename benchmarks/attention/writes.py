"""What writes cached rows: the compressors, and the norm and rotation of queries and window rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vllm_deepseek_v4flash.kv_cache.page_sizes import entry_page, state_format, state_page, window_page

from .. import roofline, vllm_kernels
from ..flash_cases import EPS, row_format
from ..inputs import Sizes, paged, quarter_turns, slots_of, stored, stored_bound
from ..roofline import Bench, Case, Work, compare, sampled
from .common import BF16, BF16_ROUNDING, row_bytes


def compress_case(s: Sizes, cache: str, requests: int, new: int, completing: bool = True) -> Case:
    """cache: CSA, HCA or keys. completing: the last token of each request completes a window."""
    ratio = s.ratio("HCA" if cache == "HCA" else "CSA")
    overlap = cache != "HCA"
    dim, rope = (s.index_dim, 0) if cache == "keys" else (s.dim, s.rope)
    channels, span = (2 * dim, 2 * ratio) if overlap else (dim, ratio)
    context = s.contexts[0] - (0 if completing else 1)
    first, last = context - new, context - 1
    page, states = (
        entry_page(row_format("fp8", "bf16", dim, rope), ratio),
        state_page(state_format(dim, overlap), ratio, overlap),
    )
    ends = [t for t in range(first, context) if (t + 1) % ratio == 0]
    # A completed window's rows from earlier steps are read from the states.
    older = sum(max(0, first - max(0, t - span + 1)) for t in ends)
    moved = requests * (4 * channels * 4 * new + older * 2 * dim * 4 + len(ends) * row_bytes(page))

    def build(bench: Bench) -> Work:
        kernel, reference = roofline.kernel_and_reference("compress")
        copies, tokens = bench.copies(moved), requests * new
        all_states, note = paged(bench, f"{cache} states", states, copies, requests, max(0, first - span + 1), last)
        entries, shared = paged(bench, f"{cache} written", page, copies, requests, first // ratio * ratio, last)
        positions = torch.arange(first, context, device=bench.device).repeat(requests)
        request = torch.arange(requests, device=bench.device, dtype=torch.int32).repeat_interleave(new)
        ape, inv_freq = (
            torch.randn((ratio, channels), device=bench.device),
            torch.rand(s.rope // 2, device=bench.device),
        )
        norm_weight = torch.ones(dim, device=bench.device, dtype=BF16)
        inputs: list[tuple[Any, ...]] = [
            (
                *(torch.randn((tokens, channels), device=bench.device) for _ in range(2)), ape, norm_weight, inv_freq,
                positions, request, state, slots_of(state, request, positions), entry,
            )
            for state, entry in zip(all_states, entries, strict=True)
        ]  # fmt: skip
        options = {"ratio": ratio, "eps": EPS, "dtype": BF16}
        ending = [r * new + t - first for r in range(requests) for t in ends]

        def check() -> str:
            kv, gate, *_, state, slots, entry = inputs[0]
            kernel(*inputs[0], **options)
            written = stored(state, slots)
            # Like a kernel, the reference rounds gate + ape once.
            compare("a state row", written, torch.cat((kv, gate + ape[positions % ratio]), dim=1), 2.0**-22)
            if not ending:
                return "states"
            pick = torch.tensor([ending[i] for i in sampled(len(ending))], device=bench.device)
            at = slots_of(entry, request[pick], positions[pick] // ratio)
            found, (kv, gate, *rest) = stored(entry, at), inputs[0]
            reference(
                kv[pick], gate[pick], *rest[:3], positions[pick], request[pick], state, slots[pick], entry, **options
            )
            bound = stored_bound(entry.format, BF16)
            return f"{compare('an entry', found, stored(entry, at), bound):.1e} of {bound:.1e}"

        calls = [partial(kernel, *x, **options) for x in inputs]
        return Work(calls, check, [vllm_kernels.UNTIMED_COMPRESSOR], "; ".join(filter(None, (note, shared))))

    what = f"prefill, {new} tokens" if new > 1 else f"decode, batch {requests}"
    if new == 1:
        what += ", each completes an entry" if completing else ", none completes an entry"
    return Case("compress", f"{cache}, ratio {ratio}, {what}, fp8 rows", moved, 0, build)


def insert_case(s: Sizes, tokens: int) -> Case:
    page = window_page(row_format("fp8", "bf16", s.dim, s.rope), s.window)
    moved = tokens * (2 * 2 * s.heads * s.dim + 2 * s.dim + 4 * s.rope + row_bytes(page))

    def build(bench: Bench) -> Work:
        kernel, reference = roofline.kernel_and_reference("qnorm_rope_kv_insert")
        requests = 1 if tokens == s.prefills[0][0] else tokens
        new = tokens // requests
        windows, note = paged(bench, "written rows", page, bench.copies(moved), requests, 0, new - 1)
        positions = torch.arange(new, device=bench.device).repeat(requests)
        request = torch.arange(requests, device=bench.device).repeat_interleave(new)
        cos_sin = quarter_turns(bench, tokens, s.rope)
        inputs: list[tuple[Any, ...]] = [
            (
                torch.randn((tokens, s.heads, s.dim), device=bench.device, dtype=BF16),
                torch.randn((tokens, s.dim), device=bench.device, dtype=BF16),
                cos_sin, window, slots_of(window, request, positions),
            )
            for window in windows
        ]  # fmt: skip
        pick = sampled(tokens)

        def expected() -> tuple[torch.Tensor, torch.Tensor]:
            q, kv, _, window, slots = inputs[0]
            out = reference(q[pick], kv[pick], cos_sin[pick], window, slots[pick], eps=EPS)
            return out, stored(window, slots[pick])

        def check() -> str:
            *_, window, slots = inputs[0]
            out = kernel(*inputs[0], eps=EPS)
            found = stored(window, slots[pick])
            queries, rows = expected()
            # The results of norm and rotation are rounded, and each may go to the neighbour of the reference's.
            bound = 4 * BF16_ROUNDING
            off = compare("a query", out[pick], queries, bound)
            compare("a window row", found, rows, stored_bound(window.format, BF16))
            return f"{off:.1e} of {bound:.1e}"

        calls = [partial(kernel, *x, eps=EPS) for x in inputs]
        return Work(calls, check, [vllm_kernels.qnorm_insert(bench, inputs, pick, expected)], note)

    return Case("qnorm_rope_kv_insert", f"{tokens} tokens, {s.heads} heads, fp8 rows", moved, 0, build)
