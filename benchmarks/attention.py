"""The attention, indexer, compressor, mHC and router kernels at DeepSeek-V4-Flash's shapes, beside vLLM's own.

    python -m benchmarks.attention [--only sparse_attention topk ...] [--budget SECONDS] [--out DIR] [--dry-run]

Every case is compared with the PyTorch reference on sampled tokens and then timed (`roofline.py` says how). Bytes and
operations are those that no implementation can avoid: each row of a cache and each weight read once, however many
tokens use it; each input read and each output written once. What a kernel moves beyond that lowers its share.

Exits with 1 if a result is further from its reference than its bound, or a kernel does not run.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vllm_deepseek_v4flash.kv_cache.page_sizes import PageSize, entry_page, state_format, state_page, window_page
from vllm_deepseek_v4flash.ops.apply_rope import apply_rope
from vllm_deepseek_v4flash.ops.rows import PagedRows, dequantise, quantise

from . import roofline, vllm_kernels
from .flash_cases import EPS, row_format
from .inputs import (
    FLASH,
    TINY,
    Attention,
    Sizes,
    paged,
    quarter_turns,
    slots_of,
    spread_indices,
    stored,
    stored_bound,
)
from .report import Row
from .roofline import Aim, Bench, Case, Work, WrongResultError, compare, sampled, twin_and_reference

BF16 = torch.bfloat16
BF16_ROUNDING = 2.0**-8
"""What rounding to bf16 moves a value by at most, relative to it; 2^-7 is its distance to the next value."""
FP32_SUM = 2.0**-23
"""What a tensor core loses of an fp32 sum at each addition: it truncates."""
HC_EPS = 1e-6
_ROWS = {"fp8": "fp8", "plain": "bf16"}


def share_of_bandwidth(batch: int) -> list[Aim]:
    if batch < 32:
        return []
    return [Aim("at least 70 % of the copy bandwidth", lambda row: _known(row.bandwidth_percent, lambda p: p >= 70))]


def _known(value: float | None, test: Callable[[float], bool]) -> bool | None:
    return None if value is None else test(value)


def level_with_flashmla(row: Row) -> bool | None:
    # 5 % is what two runs of one kernel differ by at most.
    return _known(row.ratio, lambda ratio: ratio >= 0.95) if row.peer.startswith("FlashMLA") else None


def short(tokens: int) -> str:
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def nbytes(page: PageSize) -> int:
    return page.format.row_size * page.format.dtype.itemsize


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
    moved = unique * nbytes(page) + new * (2 * 2 * heads * s.dim + 4 * s.rope)
    moved += new * s.topk * 4 if kind == "CSA" else 0

    def build(bench: Bench) -> Work:
        twin, reference = twin_and_reference("sparse_attention")
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
        calls = [partial(twin, **vars(x), cos_sin=cos_sin) for x in inputs]

        def expected(tokens: list[int], cos_sin: torch.Tensor | None = None) -> torch.Tensor:
            return reference(**vars(inputs[0].part(tokens)), cos_sin=cos_sin)

        def check() -> str:
            # Rounded to bf16 are the softmax's weights and the result.
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
        aims = [Aim("250 TFLOP/s", lambda row: _known(row.tflop_per_s, lambda rate: rate >= 250))]
    return Case("sparse_attention", label, requests * moved, 4 * requests * keys * heads * s.dim, build, aims)


def indexer_case(s: Sizes, rows: str, requests: int, new: int, context: int) -> Case:
    ratio, first = s.ratio("CSA"), context - new
    page = entry_page(row_format(rows, "bf16", s.index_dim), ratio)
    visible, tokens = context // ratio, requests * new
    moved = requests * visible * nbytes(page) + tokens * (2 * s.index_heads * (s.index_dim + 1) + 4 * s.topk)
    scored = sum((t + 1) // ratio for t in range(first, context) if (t + 1) // ratio > s.topk)

    def build(bench: Bench) -> Work:
        twin, _ = twin_and_reference("indexer_topk")
        caches, note = paged(bench, "index entries", page, bench.copies(moved), requests, 0, context - 1)
        positions = torch.arange(first, context, device=bench.device).repeat(requests)
        request = torch.arange(requests, device=bench.device, dtype=torch.int32).repeat_interleave(new)
        options = {
            "ratio": ratio, "topk": s.topk, "max_entries": visible, "scale": (s.index_dim * s.index_heads) ** -0.5,
        }  # fmt: skip
        inputs = [
            (
                # Whole numbers: their rotation by quarter turns and their transform have the same bits everywhere.
                torch.randint(-3, 4, (tokens, s.index_heads, s.index_dim), device=bench.device).to(BF16),
                quarter_turns(bench, tokens, s.rope),
                torch.randn((tokens, s.index_heads), device=bench.device, dtype=BF16),
                cache, positions, request,
            )
            for cache in caches
        ]  # fmt: skip
        calls = [partial(twin, *x, **options) for x in inputs]

        def check() -> str:
            chosen = calls[0]()
            pick = sampled(tokens, 4)
            for t in pick:
                check_selection(f"token {t}", chosen[t], *index_scores(inputs[0], t, **options), s.topk)
            return f"the best of {len(pick)} tokens, to within rounding"

        return Work(calls, check, [vllm_kernels.UNTIMED_INDEXER], note)

    what = f"decode, batch {requests}" if new == 1 else f"prefill, {new} tokens"
    return Case(
        "indexer_topk", f"{what}, {short(context)}, {rows} keys", moved,
        2 * requests * scored * s.index_heads * s.index_dim, build, share_of_bandwidth(requests) if new == 1 else [],
    )  # fmt: skip


def index_scores(
    inputs: Sequence[Any], t: int, *, ratio: int, scale: float, **_: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of all visible entries in fp64, as the reference of `indexer_topk` defines them, and what fp32 may
    move each by."""
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
    """`chosen` lists min(topk, visible) entries ascending, then -1, and none that was left out is clearly better."""
    count = min(topk, len(scores))
    listed = chosen[:count].long()
    if not (listed.diff() > 0).all() or not ((listed >= 0) & (listed < len(scores))).all():
        raise WrongResultError(f"{what}: the chosen entries are not ascending ones of {len(scores)}: {listed.tolist()}")
    if not (chosen[count:] == -1).all():
        raise WrongResultError(f"{what}: after {count} entries follows {chosen[count:].tolist()}, not -1")
    left = torch.ones_like(scores, dtype=torch.bool)
    left[listed] = False
    if left.any():
        worst, best = (scores[listed] + off[listed]).min(), (scores[left] - off[left]).max()
        if not worst >= best:
            raise WrongResultError(f"{what}: an entry was left out that scores {best - worst:.3e} above a chosen one")


def topk_case(s: Sizes, rows: int) -> Case:
    moved = rows * (s.candidates * 4 + s.topk * 4)

    def build(bench: Bench) -> Work:
        twin_and_reference("indexer_topk")
        twin = importlib.import_module("vllm_deepseek_v4flash.ops.triton.topk").topk
        counts = torch.full((rows,), s.candidates, dtype=torch.int32, device=bench.device)
        inputs = [torch.randn((rows, s.candidates), device=bench.device) for _ in range(bench.copies(moved))]

        def select(scores: torch.Tensor) -> torch.Tensor:
            selected = torch.empty((rows, s.topk), dtype=torch.int32, device=bench.device)
            twin(scores, counts, selected, limit=s.candidates)
            return selected

        expected = inputs[0].sort(dim=-1, descending=True, stable=True).indices[:, : s.topk].sort(dim=-1).values

        def check() -> str:
            if not torch.equal(select(inputs[0]), expected.int()):
                raise WrongResultError("the selection is not the reference's")
            return "equal"

        peers = vllm_kernels.topk_peers(bench, inputs, counts, s.topk)
        return Work([partial(select, x) for x in inputs], check, peers)

    aims = [Aim("under 40 µs", lambda row: _known(row.us, lambda us: us < 40))] if rows == 8 else []
    return Case("topk", f"{rows} rows x {s.candidates}, k={s.topk}", moved, 0, build, aims)


def compress_case(s: Sizes, cache: str, requests: int, new: int, completing: bool = True) -> Case:
    """cache: CSA, HCA or keys. completing: whether the last token of each request completes a window."""
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
    # Of the window of a token that completes one, what is older than this step is read from the states.
    older = sum(max(0, first - max(0, t - span + 1)) for t in ends)
    moved = requests * (4 * channels * 4 * new + older * 2 * dim * 4 + len(ends) * nbytes(page))

    def build(bench: Bench) -> Work:
        twin, reference = twin_and_reference("compress")
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
            twin(*inputs[0], **options)
            written = stored(state, slots)
            # The reference rounds gate + ape once, as a kernel does.
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

        calls = [partial(twin, *x, **options) for x in inputs]
        return Work(calls, check, [vllm_kernels.UNTIMED_COMPRESSOR], "; ".join(filter(None, (note, shared))))

    what = f"prefill, {new} tokens" if new > 1 else f"decode, batch {requests}"
    if new == 1:
        what += ", each completes an entry" if completing else ", none completes an entry"
    return Case("compress", f"{cache}, ratio {ratio}, {what}, fp8 rows", moved, 0, build)


def insert_case(s: Sizes, tokens: int) -> Case:
    page = window_page(row_format("fp8", "bf16", s.dim, s.rope), s.window)
    moved = tokens * (2 * 2 * s.heads * s.dim + 2 * s.dim + 4 * s.rope + nbytes(page))

    def build(bench: Bench) -> Work:
        twin, reference = twin_and_reference("qnorm_rope_kv_insert")
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
            out = twin(*inputs[0], eps=EPS)
            found = stored(window, slots[pick])
            queries, rows = expected()
            # The norm's result and the rotation's are rounded; either may go to the neighbour of the reference's.
            bound = 4 * BF16_ROUNDING
            off = compare("a query", out[pick], queries, bound)
            compare("a window row", found, rows, stored_bound(window.format, BF16))
            return f"{off:.1e} of {bound:.1e}"

        calls = [partial(twin, *x, eps=EPS) for x in inputs]
        return Work(calls, check, [vllm_kernels.qnorm_insert(bench, inputs, pick, expected)], note)

    return Case("qnorm_rope_kv_insert", f"{tokens} tokens, {s.heads} heads, fp8 rows", moved, 0, build)


def mhc_inputs(s: Sizes, bench: Bench, tokens: int, outputs: int) -> tuple[torch.Tensor, ...]:
    """streams, fn, base. fn is such that the mixes are about normal."""
    width = s.streams * s.hidden
    return (
        torch.randn((tokens, s.streams, s.hidden), device=bench.device, dtype=BF16),
        torch.randn((outputs, width), device=bench.device) * width**-0.5,
        torch.randn(outputs, device=bench.device),
    )


def mhc_post_pre_case(s: Sizes, tokens: int) -> Case:
    n, outputs, width = s.streams, (2 + s.streams) * s.streams, s.streams * s.hidden
    moved = 4 * outputs * width + tokens * (2 * 2 * (width + s.hidden) + 2 * 4 * (n + n * n)) + 2 * s.hidden
    options = {"norm_eps": EPS, "hc_eps": HC_EPS, "sinkhorn_iters": s.sinkhorn}

    def build(bench: Bench) -> Work:
        twin, reference = twin_and_reference("mhc_post_pre")

        def make() -> tuple[torch.Tensor, ...]:
            streams, fn, base = mhc_inputs(s, bench, tokens, outputs)
            x = torch.randn((tokens, s.hidden), device=bench.device, dtype=BF16)
            post, comb = (torch.rand((tokens, *shape), device=bench.device) for shape in ((n,), (n, n)))
            weight = torch.ones(s.hidden, device=bench.device, dtype=BF16)
            return x, streams, post, comb, fn, torch.ones(3, device=bench.device), base, weight

        inputs = [make() for _ in range(bench.copies(moved))]
        pick = sampled(tokens)

        def expected() -> tuple[torch.Tensor, ...]:
            return reference(*(x[pick] for x in inputs[0][:4]), *inputs[0][4:], **options)

        def near(found: Sequence[torch.Tensor]) -> str:
            return check_mhc([out[pick] for out in found], expected(), width)

        calls = [partial(twin, *x, **options) for x in inputs]
        return Work(calls, lambda: near(calls[0]()), vllm_kernels.mhc_post_pre(bench, inputs, options, near))

    aims = [Aim("under 10 µs", lambda row: _known(row.us, lambda us: us < 10))] if tokens == 8 else []
    return Case("mhc_post_pre", f"{tokens} tokens", moved, 2 * tokens * outputs * width, build, aims)


def check_mhc(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], width: int) -> str:
    """Streams, x, post and comb."""
    told = []
    for name, actual, reference in zip(("streams", "x", "post", "comb"), found, expected, strict=True):
        # x is rounded before and after its norm. A sum of `width` products may lose one rounding at each; one that is
        # rounded to the other neighbour moves a stream, and with it the mixes, by more than a short sum loses.
        bound = 4 * BF16_ROUNDING if name in ("streams", "x") else max(width, 1 << 13) * 2.0**-24
        told.append(f"{name} {compare(name, actual.flatten(1), reference.flatten(1), bound):.1e} of {bound:.1e}")
    return ", ".join(told)


def mhc_head_case(s: Sizes, tokens: int) -> Case:
    width = s.streams * s.hidden
    moved = 4 * s.streams * width + tokens * 2 * (width + s.hidden)
    options = {"norm_eps": EPS, "hc_eps": HC_EPS}

    def build(bench: Bench) -> Work:
        twin, reference = twin_and_reference("mhc_head")
        inputs = []
        for _ in range(bench.copies(moved)):
            streams, fn, base = mhc_inputs(s, bench, tokens, s.streams)
            inputs.append((streams, fn, torch.ones(1, device=bench.device), base))
        pick, bound = sampled(tokens), 2 * BF16_ROUNDING

        def near(found: torch.Tensor) -> str:
            expected = reference(inputs[0][0][pick], *inputs[0][1:], **options)
            return f"{compare('the result', found[pick], expected, bound):.1e} of {bound:.1e}"

        calls = [partial(twin, *x, **options) for x in inputs]
        return Work(calls, lambda: near(calls[0]()), vllm_kernels.mhc_head(bench, inputs, options, near))

    return Case("mhc_head", f"{tokens} tokens", moved, 2 * tokens * s.streams * width, build)


def route_case(s: Sizes, tokens: int) -> Case:
    moved = tokens * (4 * s.experts + (4 + 8) * s.chosen) + 4 * s.experts

    def build(bench: Bench) -> Work:
        twin, reference = twin_and_reference("route")
        bias = torch.rand(s.experts, device=bench.device)
        inputs = [torch.randn((tokens, s.experts), device=bench.device) for _ in range(bench.copies(moved))]
        options = {"bias": bias, "expert_ids": None, "scaling": 1.5, "renormalize": True}
        pick = sampled(tokens, 64)

        def near(found: tuple[torch.Tensor, torch.Tensor]) -> str:
            (weights, ids), (expected, chosen) = found, reference(inputs[0][pick], s.chosen, **options)
            if not torch.equal(ids[pick].long(), chosen):
                raise WrongResultError("other experts were chosen than by the reference")
            # A softplus, a square root, a sum of `chosen` and a division: each within a few units of 2^-23.
            bound = 32 * 2.0**-23
            return f"same experts, weights {compare('a weight', weights[pick], expected, bound):.1e} of {bound:.1e}"

        calls = [partial(twin, x, s.chosen, **options) for x in inputs]
        return Work(calls, lambda: near(calls[0]()), [vllm_kernels.route(bench, inputs, bias, s.chosen, near)])

    return Case("route", f"{tokens} tokens, {s.chosen} of {s.experts}", moved, 0, build)


def all_cases(dry: bool) -> list[Case]:
    """What matters most comes first, for a budget that does not reach to the end."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
