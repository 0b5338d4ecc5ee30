"""The indexer's scores and selection, and the top-k alone."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from vllm_deepseek_v4flash.kv_cache.page_sizes import entry_page
from vllm_deepseek_v4flash.ops.apply_rope import apply_rope
from vllm_deepseek_v4flash.ops.rows import dequantise, quantise

from .. import roofline, vllm_kernels
from ..flash_cases import row_format
from ..inputs import Sizes, paged, quarter_turns, slots_of, stored
from ..roofline import Aim, Bench, Case, Work, WrongResultError, sampled
from .common import BF16, FP32_SUM, known, row_bytes, share_of_bandwidth, short


def indexer_case(s: Sizes, rows: str, requests: int, new: int, context: int) -> Case:
    ratio, first = s.ratio("CSA"), context - new
    page = entry_page(row_format(rows, "bf16", s.index_dim), ratio)
    visible, tokens = context // ratio, requests * new
    moved = requests * visible * row_bytes(page) + tokens * (2 * s.index_heads * (s.index_dim + 1) + 4 * s.topk)
    scored = sum((t + 1) // ratio for t in range(first, context) if (t + 1) // ratio > s.topk)

    def build(bench: Bench) -> Work:
        kernel, _ = roofline.kernel_and_reference("indexer_topk")
        caches, note = paged(bench, "index entries", page, bench.copies(moved), requests, 0, context - 1)
        positions = torch.arange(first, context, device=bench.device).repeat(requests)
        request = torch.arange(requests, device=bench.device, dtype=torch.int32).repeat_interleave(new)
        options = {
            "ratio": ratio, "topk": s.topk, "max_entries": visible, "scale": (s.index_dim * s.index_heads) ** -0.5,
        }  # fmt: skip
        inputs = [
            (
                # Whole numbers: rotating them by quarter turns and transforming them gives the same bits everywhere.
                torch.randint(-3, 4, (tokens, s.index_heads, s.index_dim), device=bench.device).to(BF16),
                quarter_turns(bench, tokens, s.rope),
                torch.randn((tokens, s.index_heads), device=bench.device, dtype=BF16),
                cache, positions, request,
            )
            for cache in caches
        ]  # fmt: skip
        calls = [partial(kernel, *x, **options) for x in inputs]

        def check() -> str:
            chosen = calls[0]()
            pick = sampled(tokens, 4)
            for t in pick:
                check_selection(f"token {t}", chosen[t], *index_scores(inputs[0], t, **options), s.topk)
            return f"the best entries for {len(pick)} tokens, within rounding"

        return Work(calls, check, [vllm_kernels.UNTIMED_INDEXER], note)

    what = f"decode, batch {requests}" if new == 1 else f"prefill, {new} tokens"
    return Case(
        "indexer_topk", f"{what}, {short(context)}, {rows} keys", moved,
        2 * requests * scored * s.index_heads * s.index_dim, build, share_of_bandwidth(requests) if new == 1 else [],
    )  # fmt: skip


def index_scores(
    inputs: Sequence[Any], t: int, *, ratio: int, scale: float, **_: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of all visible entries in fp64, as the reference of `indexer_topk` defines them, and the error of each
    in fp32."""
    q, cos_sin, weights, entries, positions, request = inputs
    visible = torch.arange(int((positions[t] + 1) // ratio), device=q.device)
    keys = stored(entries, slots_of(entries, request[t], visible)).double()
    query = apply_rope(q[t : t + 1], cos_sin[t : t + 1])[0]
    if entries.format.codec == "e2m1":
        query = dequantise(*quantise(query, entries.format), entries.format)
    query, factor = query.double(), weights[t].double() * scale
    scores = factor @ (query @ keys.T).relu()
    sizes = factor.abs() @ (query.abs() @ keys.abs().T)
    # A product and an addition for each dimension and head, the factor's own rounding, and one for the scale.
    return scores, (q.shape[1] + q.shape[2] + 2) * FP32_SUM * sizes


def check_selection(what: str, chosen: torch.Tensor, scores: torch.Tensor, off: torch.Tensor, topk: int) -> None:
    """`chosen` has min(topk, visible) entries in ascending order, then -1, and no entry left out is clearly better."""
    count = min(topk, len(scores))
    listed = chosen[:count].long()
    if not (listed.diff() > 0).all() or not ((listed >= 0) & (listed < len(scores))).all():
        raise WrongResultError(f"{what}: chosen={listed.tolist()}: not ascending entries below {len(scores)}")
    if not (chosen[count:] == -1).all():
        raise WrongResultError(f"{what}: after {count} entries follows {chosen[count:].tolist()}, not -1")
    left = torch.ones_like(scores, dtype=torch.bool)
    left[listed] = False
    if left.any():
        worst, best = (scores[listed] + off[listed]).min(), (scores[left] - off[left]).max()
        if not worst >= best:
            raise WrongResultError(f"{what}: an entry that scores {best - worst:.3e} above a chosen one was left out")


def topk_case(s: Sizes, rows: int) -> Case:
    moved = rows * (s.candidates * 4 + s.topk * 4)

    def build(bench: Bench) -> Work:
        roofline.kernel_and_reference("indexer_topk")
        kernel = importlib.import_module("vllm_deepseek_v4flash.ops.triton.topk").topk
        counts = torch.full((rows,), s.candidates, dtype=torch.int32, device=bench.device)
        inputs = [torch.randn((rows, s.candidates), device=bench.device) for _ in range(bench.copies(moved))]

        def select(scores: torch.Tensor) -> torch.Tensor:
            selected = torch.empty((rows, s.topk), dtype=torch.int32, device=bench.device)
            kernel(scores, counts, selected, limit=s.candidates)
            return selected

        expected = inputs[0].sort(dim=-1, descending=True, stable=True).indices[:, : s.topk].sort(dim=-1).values

        def check() -> str:
            if not torch.equal(select(inputs[0]), expected.int()):
                raise WrongResultError("the selection is not the reference's")
            return "equal"

        peers = vllm_kernels.topk_peers(bench, inputs, counts, s.topk)
        return Work([partial(select, x) for x in inputs], check, peers)

    aims = [Aim("under 40 µs", lambda row: known(row.us, lambda us: us < 40))] if rows == 8 else []
    return Case("topk", f"{rows} rows x {s.candidates}, k={s.topk}", moved, 0, build, aims)
