"""The inputs of the attention benchmarks: shapes, and paged caches of random rows on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_deepseek_v4flash.kv_cache.page_sizes import PageSize
from vllm_deepseek_v4flash.ops.rows import PagedRows, RowFormat, read_rows, write_rows

from . import flash_cases as flash
from .roofline import Bench

_FILL = 1 << 26  # values that are written at once
# All caches may take half of the device's memory, and one of them a quarter.
_SHARE = 4


@dataclass(frozen=True)
class Sizes:
    """The shapes of the model and of the cases."""

    heads: int = flash.HEADS
    dim: int = flash.DIM
    rope: int = flash.ROPE
    index_heads: int = flash.INDEX_HEADS
    index_dim: int = flash.INDEX_DIM
    topk: int = flash.TOPK
    window: int = flash.WINDOW
    hidden: int = flash.HIDDEN
    streams: int = flash.STREAMS
    experts: int = flash.EXPERTS
    chosen: int = flash.CHOSEN
    hca_ratio: int = 128
    sinkhorn: int = 20
    ranks: tuple[int, ...] = flash.RANKS
    batches: tuple[int, ...] = (1, 8, 32, 128)
    contexts: tuple[int, ...] = (1 << 13, 1 << 17, 1 << 20)
    prefills: tuple[tuple[int, int], ...] = ((8192, 8192), (8192, 1 << 16))
    """Tokens of the chunk, and of the context including it."""
    streams_tokens: tuple[int, ...] = (1, 8, 128, 8192)
    candidates: int = 1 << 18
    """Scores of a row, for the top-k alone."""

    def ratio(self, kind: str) -> int:
        return {"window": 0, "CSA": 4, "HCA": self.hca_ratio}[kind]


FLASH = Sizes()
TINY = Sizes(
    heads=4, dim=64, rope=16, index_heads=2, index_dim=32, topk=8, window=16, hidden=64, experts=16, chosen=2,
    hca_ratio=32, sinkhorn=3, ranks=(1,), batches=(2,), contexts=(128,), prefills=((8, 128),), streams_tokens=(3,),
    candidates=64,
)  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """The arguments of `sparse_attention` without `cos_sin`."""

    q: torch.Tensor
    sinks: torch.Tensor
    positions: torch.Tensor
    request: torch.Tensor
    window: PagedRows
    window_size: int
    scale: float
    entries: PagedRows | None
    indices: torch.Tensor | None
    ratio: int
    max_entries: int

    def part(self, tokens: Sequence[int]) -> Attention:
        pick = torch.tensor(tokens, device=self.q.device)
        indices = None if self.indices is None else self.indices[pick]
        return Attention(**vars(self) | {
            "q": self.q[pick], "positions": self.positions[pick], "request": self.request[pick], "indices": indices,
        })  # fmt: skip


def paged(
    bench: Bench, name: str, page: PageSize, copies: int, requests: int, first: int, last: int
) -> tuple[list[PagedRows], str]:
    """`copies` caches in which each request has the pages of its tokens first..last: random rows on shuffled pages.

    Caches with different names share no pages. Page 0 belongs to no request; tables have it where nothing is read. If
    the pages would take more than a quarter of the device's memory, they are assigned again in the same order, so that
    a page with two owners is used again only after all others.

    Returns:
        The caches, and a note about shared pages, which is empty if there are none.
    """
    low, high = first // page.block_tokens, last // page.block_tokens + 1
    needed = copies * requests * (high - low)
    # Pages start two page sizes from each other, like those of several layers in one allocation.
    most = max(2, bench.memory_bytes // _SHARE // (2 * page.page_bytes))
    pages = _pool(bench, name, page, min(needed, most) + 1)
    owned = len(pages) - 1
    order = torch.randperm(owned, device=bench.device, dtype=torch.int32) + 1
    dealt = order[torch.arange(needed, device=bench.device) % owned].view(copies, requests, high - low)
    tables = torch.zeros((copies, requests, high), dtype=torch.int32, device=bench.device)
    tables[:, :, low:] = dealt
    note = "" if needed <= owned else f"each page of {name} is shared by {needed / owned:.1f} requests"
    return [PagedRows(pages, page.rows, page.format, table) for table in tables], note


def _pool(bench: Bench, name: str, page: PageSize, count: int) -> torch.Tensor:
    """At least `count` pages of random rows, which all cases that need no more share."""
    key = (name, page.format, page.rows)
    pool = bench.store.get(key)
    if pool is None or len(pool) < count:
        bench.store.pop(key, None)
        size = page.rows * page.row_size
        held = sum(p.untyped_storage().nbytes() for p in bench.store.values())
        if held + 2 * count * page.page_bytes > bench.memory_bytes // 2:
            bench.store.clear()
        pool = torch.empty((count, 2 * size), dtype=page.format.dtype, device=bench.device)[:, :size]
        _fill(pool, page)
        bench.store[key] = pool
    return pool


def _fill(pages: torch.Tensor, page: PageSize) -> None:
    cache = PagedRows(pages, page.rows, page.format, torch.empty((0, 0), dtype=torch.int32, device=pages.device))
    rows, at_once = len(pages) * page.rows, max(1, _FILL // page.format.dim)
    for start in range(0, rows, at_once):
        row = torch.arange(start, min(start + at_once, rows), device=pages.device)
        values = torch.randn((len(row), page.format.dim), device=pages.device)
        write_rows(cache, row // page.rows, row % page.rows, values)


def stored(cache: PagedRows, slots: torch.Tensor) -> torch.Tensor:
    """The values of the rows at slots [N], [N, dim] fp32."""
    page, row = slots // cache.rows_per_page, slots % cache.rows_per_page
    return read_rows(cache, page, row, torch.ones_like(page, dtype=torch.bool))


def slots_of(cache: PagedRows, request: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Slots, page * rows_per_page + row, int64, of row numbers; broadcastable."""
    page, offset = cache.locate(request, row)
    return page * cache.rows_per_page + offset


def stored_bound(fmt: RowFormat, dtype: torch.dtype) -> float:
    """The relative difference of two rows whose last rounding differs by one step.

    2^-7 for bf16 and 2^-3 for e4m3, the largest relative distance of neighbours. Rows of another codec or dtype are not
    compared here.
    """
    if fmt.codec == "e4m3":
        return 2.0**-3
    if fmt.codec == "plain" and dtype == torch.bfloat16:
        return 2.0**-7
    raise ValueError(f"no bound for {fmt.codec} rows of {dtype}")


def quarter_turns(bench: Bench, tokens: int, rope: int) -> torch.Tensor:
    """cos_sin [T, R] of 0, 1, 2 and 3 quarter turns: rotations without rounding."""
    turn = torch.randint(4, (tokens, rope // 2), device=bench.device)
    cos, sin = (torch.tensor(values, device=bench.device)[turn] for values in ([1.0, 0, -1, 0], [0.0, 1, 0, -1]))
    return torch.cat((cos, sin), dim=1)


def spread_indices(visible: torch.Tensor, topk: int) -> torch.Tensor:
    """[T, topk] int32, ascending: a random entry of each of `topk` equal parts of the first visible[t] entries.

    A token that sees at most `topk` entries gets all of them, then -1.
    """
    k, seen = torch.arange(topk, device=visible.device), visible[:, None].clamp(min=1)
    low, high = k * seen // topk, (k + 1) * seen // topk
    drawn = low + (torch.rand(low.shape, device=low.device) * (high - low)).long().clamp(max=high - low - 1)
    few = torch.where(k < visible[:, None], k, -1)
    return torch.where(visible[:, None] > topk, drawn, few).int()
