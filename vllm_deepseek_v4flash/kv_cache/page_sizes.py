"""How large each cache's pages are and what they hold: arithmetic only, used by the vLLM specs and by `inspect`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import BLOCK_TOKENS, DeepseekV4Config, LayerKind
from ..ops.rows import RowFormat
from ..ops.torch_or_dtypes import torch
from .formats import CacheFormats

WINDOW_BLOCK_TOKENS = 64
# State rows are large and short-lived: small blocks return their memory soon.
CSA_STATE_BLOCK_TOKENS = 4
HCA_STATE_BLOCK_TOKENS = 8
# Every page starts at a multiple of this many bytes, so that kernels may use their widest loads.
PAGE_ALIGNMENT = 16


@dataclass(frozen=True)
class PageSize:
    """One page of one cache: the rows of `block_tokens` tokens."""

    format: RowFormat
    block_tokens: int
    tokens_per_row: int = 1
    window: int | None = None
    """Tokens that stay reachable; None: all of them, for the life of the request."""

    @property
    def rows(self) -> int:
        return self.block_tokens // self.tokens_per_row

    @property
    def row_size(self) -> int:
        """Elements of the format's dtype that each row takes, so that pages are multiples of PAGE_ALIGNMENT."""
        unit = PAGE_ALIGNMENT // math.gcd(PAGE_ALIGNMENT, self.rows * self.format.dtype.itemsize)
        return -(-self.format.row_size // unit) * unit

    @property
    def page_bytes(self) -> int:
        return self.rows * self.row_size * self.format.dtype.itemsize


def window_page(fmt: RowFormat, window: int, block_tokens: int = WINDOW_BLOCK_TOKENS) -> PageSize:
    """One row per token, kept while a query may still reach it."""
    return PageSize(fmt, block_tokens, window=window)


def entry_page(fmt: RowFormat, ratio: int, block_tokens: int = BLOCK_TOKENS) -> PageSize:
    """One row per `ratio` tokens, kept for the life of the request."""
    if block_tokens % ratio:
        raise ValueError(
            f"--block-size={block_tokens}: not a multiple of the {ratio} tokens of an entry. Use {BLOCK_TOKENS}."
        )
    return PageSize(fmt, block_tokens, tokens_per_row=ratio)


def state_page(fmt: RowFormat, ratio: int, overlap: bool) -> PageSize:
    """One fp32 row per token, kept until the last entry that pools it is complete."""
    if overlap:
        return window_page(fmt, 2 * ratio, CSA_STATE_BLOCK_TOKENS)
    return window_page(fmt, ratio, HCA_STATE_BLOCK_TOKENS)


def state_format(dim: int, overlap: bool) -> RowFormat:
    """kv and gate of a compressor whose entries have `dim` values; with overlap each is twice as wide."""
    return RowFormat.plain((4 if overlap else 2) * dim, torch.float32)


def layer_pages(
    config: DeepseekV4Config, layer: int, formats: CacheFormats, block_tokens: int = BLOCK_TOKENS
) -> dict[str, PageSize]:
    """The pages of every cache of one backbone layer, by name."""
    kind, ratio = config.layer_kinds[layer], config.compress_ratios[layer]
    pages = {"window": window_page(formats.rows, config.sliding_window)}
    if kind is LayerKind.WINDOW:
        return pages
    overlap = kind is LayerKind.CSA
    pages["entries"] = entry_page(formats.rows, ratio, block_tokens)
    pages["states"] = state_page(state_format(config.head_dim, overlap), ratio, overlap)
    if kind is LayerKind.CSA:
        pages["index_entries"] = entry_page(formats.index, ratio, block_tokens)
        pages["index_states"] = state_page(state_format(config.index_head_dim, overlap), ratio, overlap)
    return pages


def kv_bytes_per_token(config: DeepseekV4Config, formats: CacheFormats) -> float:
    """Bytes of cache that each further token of context costs: the entries. Windows and states stay constant."""
    return sum(
        page.page_bytes / page.block_tokens
        for layer in range(config.num_hidden_layers)
        for page in layer_pages(config, layer, formats).values()
        if page.window is None
    )
