"""vLLM's own kernels for the work of the attention benchmarks, called as by its own DeepSeek-V4 model.

Each function returns `Peer`s. A peer imports and builds what it needs when it is prepared, or raises UnavailableError
with the reason. Peers get the same values as our kernels, in their own layouts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from vllm_deepseek_v4flash.ops.rows import PagedRows

from .flash_cases import EPS
from .inputs import Attention, slots_of, stored, stored_bound
from .roofline import Bench, Peer, UnavailableError, Work, WrongResultError, compare, sampled

BF16 = torch.bfloat16
# FlashMLA's paged rows: 448 e4m3 and 64 bf16 values, and 8 scale bytes of which the last is unused. A page has the
# data of all its rows first, and its size is a multiple of a row's data.
_DATA, _SCALES = 576, 8
_HEADS = 64  # the minimum of FlashMLA
_INDEX_BLOCK = 128  # lists of keys are multiples of this
_TOPK_WORKSPACE = 1 << 20
# Our kernels and FlashMLA round the softmax's weights and the result to bf16, each by at most 2^-8.
_ATTENTION_BOUND = 2 * 2.0**-8
_TRITON_ROUNDING = 4 * 2.0**-8

Expected = Callable[[list[int]], torch.Tensor]


def _none(name: str, reason: str) -> Peer:
    def prepare() -> Work:
        raise UnavailableError(reason)

    return Peer(name, prepare)


UNTIMED_INDEXER = _none("vLLM", "it scores keys with DeepGEMM, which is not its own kernel; its top-k is under topk")
UNTIMED_COMPRESSOR = _none("vLLM", "its compressor is several kernels over states in another layout")


def need_cuda(bench: Bench) -> None:
    if bench.device.type != "cuda":
        raise UnavailableError("needs a CUDA device")


def load(bench: Bench, module: str) -> Any:
    """One of vLLM's modules."""
    need_cuda(bench)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported: {error}") from error


def load_op(bench: Bench, namespace: str, name: str) -> Callable[..., Any]:
    """One of vLLM's compiled ops."""
    load(bench, "vllm._custom_ops")
    found = getattr(getattr(torch.ops, namespace), name, None)
    if found is None:
        raise UnavailableError(f"this build of vLLM has no op {namespace}.{name}")
    return found


def load_flashmla(bench: Bench) -> Any:
    module = load(bench, "vllm.v1.attention.ops.flashmla")
    supported, reason = module.is_flashmla_sparse_supported()
    if not supported:
        raise UnavailableError(str(reason))
    return module


def ds_mla_pages(cache: PagedRows) -> torch.Tensor:
    """The pages of fp8 rows of 512 values in FlashMLA's layout: [P, N, 584] uint8, with strided pages."""
    rows = cache.rows_per_page
    page = -(-rows * (_DATA + _SCALES) // _DATA) * _DATA
    found = torch.zeros((len(cache.pages), page), dtype=torch.uint8, device=cache.pages.device)
    _copy_rows(cache.pages, cache.format.num_scales, found, _SCALES, rows)
    return found[:, : rows * (_DATA + _SCALES)].unflatten(1, (rows, _DATA + _SCALES))


def _copy_rows(source: torch.Tensor, source_scales: int, target: torch.Tensor, target_scales: int, rows: int) -> None:
    """Copy pages of `rows` rows between layouts with different numbers of scale bytes."""
    to, of = (
        pages[:, rows * _DATA : rows * (_DATA + size)].unflatten(1, (rows, size))
        for pages, size in ((target, target_scales), (source, source_scales))
    )
    scales = min(source_scales, target_scales)
    target[:, : rows * _DATA] = source[:, : rows * _DATA]
    to[..., :scales] = of[..., :scales]


def _padded(q: torch.Tensor, heads: int) -> torch.Tensor:
    return q if q.shape[1] == heads else torch.nn.functional.pad(q, (0, 0, 0, heads - q.shape[1]))


def _padded_name(heads: int) -> str:
    return "" if heads == _HEADS else f" ({heads} heads padded to {_HEADS})"


def _padded_sinks(x: Attention) -> torch.Tensor:
    return torch.nn.functional.pad(x.sinks, (0, max(0, _HEADS - len(x.sinks))))


def window_indices(x: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """The window rows that each token attends to: positions [T, W] ascending, then -1; and their number [T] int32."""
    oldest = (x.positions - x.window_size + 1).clamp(min=0)
    position = oldest[:, None] + torch.arange(x.window_size, device=oldest.device)
    return position.where(position <= x.positions[:, None], -1), (x.positions - oldest + 1).int()


def entry_indices(x: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries that each token attends to: numbers [T, K] ascending, then -1; and how many [T] int32."""
    if x.indices is not None:
        return x.indices.long(), (x.indices >= 0).sum(1, dtype=torch.int32)
    width = -(-x.max_entries // _INDEX_BLOCK) * _INDEX_BLOCK
    visible = (x.positions + 1) // x.ratio
    number = torch.arange(width, device=visible.device)
    return number.where(number < visible[:, None], -1), visible.int()


def _global(cache: PagedRows, x: Attention, rows: torch.Tensor) -> torch.Tensor:
    """Row numbers [T, K] of each token's request to slots [T, 1, K] int32; -1 stays."""
    slots = slots_of(cache, x.request[:, None], rows.clamp(min=0))
    return slots.where(rows >= 0, -1).int()[:, None]


def flashmla_decode(bench: Bench, inputs: Sequence[Attention], expected: Expected) -> Peer:
    """The decode kernel over fp8 rows. Its time excludes the schedule, which vLLM computes once a step, and translating
    indices, once a layer. Its work excludes rotating the result."""
    heads = inputs[0].q.shape[1]

    def prepare() -> Work:
        flashmla = load_flashmla(bench)
        if inputs[0].window.format.codec != "e4m3":
            raise UnavailableError("its decode kernel reads fp8 rows only")
        # One for all copies, which have the same lengths. The first call fills it.
        schedule = flashmla.FlashMLASchedMeta()
        pages: dict[int, torch.Tensor] = {}

        def cache_of(rows: PagedRows) -> torch.Tensor:
            if rows.pages.data_ptr() not in pages:
                pages[rows.pages.data_ptr()] = ds_mla_pages(rows)
            return pages[rows.pages.data_ptr()].unsqueeze(-2)

        def arguments(x: Attention) -> dict[str, Any]:
            position, count = window_indices(x)
            q = _padded(x.q, _HEADS)[:, None]
            found = {
                "q": q, "k_cache": cache_of(x.window), "block_table": None, "head_dim_v": x.q.shape[2],
                "tile_scheduler_metadata": schedule, "cache_seqlens": None, "is_fp8_kvcache": True,
                "indices": _global(x.window, x, position), "topk_length": count, "softmax_scale": x.scale,
                "attn_sink": _padded_sinks(x), "extra_k_cache": None, "extra_indices_in_kvcache": None,
                "extra_topk_length": None, "out": torch.empty_like(q),
            }  # fmt: skip
            if x.entries is not None:
                number, seen = entry_indices(x)
                found |= {
                    "extra_k_cache": cache_of(x.entries), "extra_indices_in_kvcache": _global(x.entries, x, number),
                    "extra_topk_length": seen,
                }  # fmt: skip
            return found

        calls = [partial(flashmla.flash_mla_with_kvcache, **arguments(x)) for x in inputs]
        return Work(calls, _check(lambda: calls[0]()[0][:, 0], inputs[0], expected))

    return Peer("FlashMLA decode" + _padded_name(heads), prepare)


def flashmla_prefill(bench: Bench, inputs: Sequence[Attention], expected: Expected) -> Peer:
    """The prefill kernel, for one request. Its time excludes gathering, dequantising and listing its keys, which are
    three more launches in vLLM. Its work excludes rotating the result."""
    heads = inputs[0].q.shape[1]

    def prepare() -> Work:
        flashmla = load_flashmla(bench)

        def arguments(x: Attention) -> dict[str, Any]:
            kv, indices, count = gathered(x)
            q = _padded(x.q, _HEADS)
            return {
                "q": q, "kv": kv[:, None], "indices": indices[:, None], "sm_scale": x.scale,
                "attn_sink": _padded_sinks(x), "topk_length": count, "out": torch.empty_like(q),
            }  # fmt: skip

        calls = [partial(flashmla.flash_mla_sparse_fwd, **arguments(x)) for x in inputs]
        return Work(calls, _check(lambda: calls[0]()[0], inputs[0], expected))

    return Peer("FlashMLA sparse prefill" + _padded_name(heads), prepare)


def gathered(x: Attention) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries and window rows of one request as bf16 keys [S, D], and each token's indices into them [T, K] int32
    with their number [T]."""
    oldest = int((x.positions[0] - x.window_size + 1).clamp(min=0))
    last = int(x.positions[-1])
    entries = 0 if x.entries is None else x.max_entries
    parts = [(x.window, oldest, last + 1)]
    if x.entries is not None:
        parts.insert(0, (x.entries, 0, entries))
    kv = torch.cat([
        stored(cache, slots_of(cache, x.request[0], torch.arange(begin, end, device=x.q.device))).to(BF16)
        for cache, begin, end in parts
    ])  # fmt: skip
    position, _ = window_indices(x)
    listed = torch.where(position >= 0, position - oldest + entries, -1)
    if x.entries is not None:
        listed = torch.cat((entry_indices(x)[0], listed), dim=1)
    listed = torch.nn.functional.pad(listed, (0, -listed.shape[1] % _INDEX_BLOCK), value=-1)
    valid = listed >= 0
    order = (~valid).sort(dim=1, stable=True).indices
    return kv, listed.gather(1, order).int(), valid.sum(1, dtype=torch.int32)


def _check(call: Callable[[], torch.Tensor], x: Attention, expected: Expected) -> Callable[[], str]:
    def check() -> str:
        pick = sampled(len(x.q))
        off = compare("its result", call()[pick, : x.q.shape[1]], expected(pick), _ATTENTION_BOUND)
        return f"{off:.1e} of {_ATTENTION_BOUND:.1e}"

    return check


def topk_peers(bench: Bench, inputs: Sequence[torch.Tensor], counts: torch.Tensor, topk: int) -> list[Peer]:
    """vLLM's two kernels; it uses the cooperative one for up to 64 rows."""

    def prepare(name: str) -> Work:
        op = load_op(bench, "_C", name)
        lengths, longest = counts[:, None].contiguous(), inputs[0].shape[1]
        workspace = torch.zeros(_TOPK_WORKSPACE, dtype=torch.uint8, device=bench.device)

        def select(scores: torch.Tensor) -> torch.Tensor:
            selected = torch.empty((len(scores), topk), dtype=torch.int32, device=scores.device)
            op(scores, lengths, selected, workspace, topk, longest)
            return selected

        def check() -> str:
            # In any order, and with any of equal scores.
            found = inputs[0].gather(1, select(inputs[0]).long()).sort(dim=1, descending=True).values
            if not torch.equal(found, inputs[0].topk(topk, dim=1).values):
                raise WrongResultError("it selects other scores")
            return "equal"

        return Work([partial(select, x) for x in inputs], check)

    names = ("cooperative_topk", "persistent_topk")
    return [Peer(f"vLLM {name}", partial(prepare, name)) for name in names]


def mhc_post_pre(
    bench: Bench, inputs: Sequence[tuple[torch.Tensor, ...]], options: dict[str, Any],
    near: Callable[[Sequence[torch.Tensor]], str],
) -> list[Peer]:  # fmt: skip
    """vLLM's TileLang kernel and its PyTorch code. near: checks streams, x, post and comb."""
    eps, hc_eps, iterations = options["norm_eps"], options["hc_eps"], options["sinkhorn_iters"]

    def tilelang() -> Work:
        module = load(bench, f"{_MHC}.tilelang")

        def run(x: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, *rest: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:  # fmt: skip
            fn, scale, base, weight = rest
            streams, post, comb, x = module.mhc_fused_post_pre_tilelang(
                x, streams, post[..., None], comb, fn, scale, base, eps, hc_eps, hc_eps, 2.0, iterations,
                norm_weight=weight, norm_eps=eps,
            )  # fmt: skip
            return streams, x, post[..., 0], comb

        return Work([partial(run, *given) for given in inputs], lambda: near(run(*inputs[0])))

    def pytorch() -> Work:
        module = load(bench, f"{_MHC}.torch")

        def run(x: torch.Tensor, streams: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, *rest: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:  # fmt: skip
            fn, scale, base, weight = rest
            streams = module.mhc_post_torch(x, streams, post[..., None], comb)
            post, comb, x = module.mhc_pre_torch(streams, fn, scale, base, eps, hc_eps, hc_eps, 2.0, iterations)
            return streams, torch.nn.functional.rms_norm(x, weight.shape, weight, eps), post[..., 0], comb

        return Work([partial(run, *given) for given in inputs], lambda: near(run(*inputs[0])))

    return [Peer("vLLM mHC (TileLang)", tilelang), Peer("vLLM mHC (PyTorch)", pytorch)]


_MHC = "vllm.model_executor.kernels.mhc"


def mhc_head(
    bench: Bench, inputs: Sequence[tuple[torch.Tensor, ...]], options: dict[str, Any],
    near: Callable[[torch.Tensor], str],
) -> list[Peer]:  # fmt: skip
    """vLLM's TileLang kernel, and its Triton one."""

    def tilelang() -> Work:
        kernel = load(bench, f"{_MHC}.tilelang").hc_head_fused_kernel_tilelang
        calls = [partial(kernel, *given, options["norm_eps"], options["hc_eps"]) for given in inputs]
        return Work(calls, lambda: near(calls[0]()))

    def triton() -> Work:
        kernel = load(bench, f"{_MHC}.triton").hc_head_reduce_triton_kernel

        def run(streams: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(streams[:, 0])
            kernel(streams, *rest, out, options["norm_eps"], options["hc_eps"])
            return out

        calls = [partial(run, *given) for given in inputs]
        return Work(calls, lambda: near(calls[0]()))

    return [Peer("vLLM hc_head (TileLang)", tilelang), Peer("vLLM hc_head (Triton)", triton)]


def route(
    bench: Bench, inputs: Sequence[torch.Tensor], bias: torch.Tensor, topk: int,
    near: Callable[[tuple[torch.Tensor, torch.Tensor]], str],
) -> Peer:  # fmt: skip
    def prepare() -> Work:
        op = load_op(bench, "_moe_C", "topk_softplus_sqrt")

        def run(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights = torch.empty((len(logits), topk), device=logits.device)
            ids, rows = (torch.empty_like(weights, dtype=torch.int32) for _ in range(2))
            op(weights, ids, rows, logits, True, 1.5, bias, None, None, None, None, 0)
            return weights, ids

        return Work([partial(run, x) for x in inputs], lambda: near(run(inputs[0])))

    return Peer("vLLM topk_softplus_sqrt", prepare)


def qnorm_insert(
    bench: Bench, inputs: Sequence[tuple[Any, ...]], pick: list[int],
    expected: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> Peer:  # fmt: skip
    def prepare() -> Work:
        op = load_op(bench, "_C", "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert")
        positions = torch.arange(len(inputs[0][0]), device=bench.device)
        pages = ds_mla_pages(inputs[0][3])

        def run(q: torch.Tensor, kv: torch.Tensor, cos_sin: torch.Tensor, window: PagedRows, slots: torch.Tensor
        ) -> torch.Tensor:  # fmt: skip
            return op(q, kv, pages.flatten(1), slots, positions, cos_sin, q.shape[1], EPS, window.rows_per_page)

        def check() -> str:
            out, (queries, rows) = run(*inputs[0]), expected()
            *_, window, slots = inputs[0]
            _copy_rows(pages.flatten(1), _SCALES, window.pages, window.format.num_scales, window.rows_per_page)
            compare("a window row", stored(window, slots[pick]), rows, stored_bound(window.format, BF16))
            return f"{compare('a query', out[pick], queries, _TRITON_ROUNDING):.1e} of {_TRITON_ROUNDING:.1e}"

        return Work([partial(run, *x) for x in inputs], check)

    return Peer("vLLM qnorm_rope_kv_insert", prepare)
