"""The paged caches of one layer as vLLM's scheduler sees them (spec sections 3.6 and 3.11).

| cache | rows | spec |
|---|---|---|
| window | one per token | sliding window of `sliding_window` tokens, in every layer |
| entries | one per `ratio` tokens | full attention, CSA and HCA layers |
| states | one fp32 row [kv, gate] per token | sliding window over the tokens that an unfinished entry still pools |
| index_entries, index_states | the same two for the indexer's keys | CSA layers |

All are ordinary vLLM specs, so chunked prefill, prefix caching and preemption need nothing from the model. Prefix
hits fall on multiples of 256 tokens, where an HCA window has just been completed and a CSA window needs the states of
the one before it, which the sliding window retains.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..compat import AttentionLayerBase, KVCacheSpec, MLAAttentionSpec, SlidingWindowMLASpec, VllmConfig
from ..config import BLOCK_TOKENS, DeepseekV4Config, LayerKind
from ..ops.rows import PagedRows, RowFormat
from .formats import CacheFormats

if TYPE_CHECKING:
    from .metadata import DeepseekV4Metadata

WINDOW_BLOCK_TOKENS = 64
# State rows are large and short-lived: small blocks give their memory back soon.
CSA_STATE_BLOCK_TOKENS = 4
HCA_STATE_BLOCK_TOKENS = 8
# Every page starts at a multiple of this many bytes, so that kernels may use their widest loads.
PAGE_ALIGNMENT = 16


def window_spec(fmt: RowFormat, window: int, block_tokens: int = WINDOW_BLOCK_TOKENS) -> SlidingWindowMLASpec:
    """One row per token, kept while a query may still reach it."""
    return SlidingWindowMLASpec(
        block_size=block_tokens,
        num_kv_heads=1,
        head_size=_row_size(fmt, block_tokens),
        dtype=fmt.dtype,
        sliding_window=window,
    )


def entry_spec(fmt: RowFormat, ratio: int, block_tokens: int = BLOCK_TOKENS) -> MLAAttentionSpec:
    """One row per `ratio` tokens, kept for the life of the request."""
    if block_tokens % ratio:
        raise ValueError(
            f"--block-size {block_tokens} cannot hold whole entries of {ratio} tokens: use {BLOCK_TOKENS}, the default"
        )
    return MLAAttentionSpec(
        block_size=block_tokens,
        num_kv_heads=1,
        head_size=_row_size(fmt, block_tokens // ratio),
        dtype=fmt.dtype,
        tokens_per_state=ratio,
    )


def _row_size(fmt: RowFormat, rows: int) -> int:
    """Elements that vLLM accounts for a row, so that a page of `rows` is a multiple of PAGE_ALIGNMENT bytes."""
    unit = PAGE_ALIGNMENT // math.gcd(PAGE_ALIGNMENT, rows * fmt.dtype.itemsize)
    return -(-fmt.row_size // unit) * unit


def state_spec(fmt: RowFormat, ratio: int, overlap: bool) -> SlidingWindowMLASpec:
    """One fp32 row per token, kept until the last entry that pools it is complete."""
    if overlap:
        return window_spec(fmt, 2 * ratio, CSA_STATE_BLOCK_TOKENS)
    return window_spec(fmt, ratio, HCA_STATE_BLOCK_TOKENS)


def state_format(dim: int, overlap: bool) -> RowFormat:
    """kv and gate of a compressor whose entries have `dim` values; with overlap each is twice as wide."""
    return RowFormat.plain((4 if overlap else 2) * dim, torch.float32)


def layer_specs(
    config: DeepseekV4Config, layer: int, formats: CacheFormats, block_tokens: int = BLOCK_TOKENS
) -> dict[str, tuple[KVCacheSpec, RowFormat]]:
    """Every cache of one backbone layer by name, with the format of its rows."""
    kind, ratio = config.layer_kinds[layer], config.compress_ratios[layer]
    specs: dict[str, tuple[KVCacheSpec, RowFormat]] = {
        "window": (window_spec(formats.rows, config.sliding_window), formats.rows)
    }
    if kind is LayerKind.WINDOW:
        return specs
    overlap = kind is LayerKind.CSA
    state = state_format(config.head_dim, overlap)
    specs["entries"] = entry_spec(formats.rows, ratio, block_tokens), formats.rows
    specs["states"] = state_spec(state, ratio, overlap), state
    if kind is LayerKind.CSA:
        index_state = state_format(config.index_head_dim, overlap)
        specs["index_entries"] = entry_spec(formats.index, ratio, block_tokens), formats.index
        specs["index_states"] = state_spec(index_state, ratio, overlap), index_state
    return specs


def kv_bytes_per_token(config: DeepseekV4Config, formats: CacheFormats) -> float:
    """Bytes of cache that each further token of context costs: the entries. Windows and states stay constant."""
    return sum(
        spec.page_size_bytes / spec.block_size
        for layer in range(config.num_hidden_layers)
        for spec, _ in layer_specs(config, layer, formats).values()
        if isinstance(spec, MLAAttentionSpec)
    )


class PagedCache(AttentionLayerBase):
    """One cache of one layer: declares its spec to vLLM and receives its memory.

    Registers itself in vLLM's forward context under `prefix`, which must contain the layer index.
    """

    def __init__(self, name: str, layer: int, config: DeepseekV4Config, formats: CacheFormats, *, prefix: str,
                 registry: dict[str, Any]) -> None:  # fmt: skip
        if prefix in registry:
            raise ValueError(f"a cache named {prefix} is registered already")
        registry[prefix] = self
        self.name, self.layer, self.config, self.formats, self.prefix = name, layer, config, formats, prefix
        self.format = layer_specs(config, layer, formats)[name][1]
        self.spec: KVCacheSpec | None = None
        # vLLM's own name for the bound memory: it zeroes, resets and puts to sleep through this attribute.
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type:
        from .backend import DeepseekV4Backend

        return DeepseekV4Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # The platform may change the block size after the model is built, so it is read only now; and only once,
        # because vLLM later puts the smallest block size of all caches in its place.
        if self.spec is None:
            specs = layer_specs(self.config, self.layer, self.formats, vllm_config.cache_config.block_size)
            self.spec = specs[self.name][0]
        return self.spec

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take vLLM's view [pages, 1, rows, row_size]; its pages are strided, each is contiguous."""
        self.kv_cache = kv_cache

    def rows(self, metadata: DeepseekV4Metadata) -> PagedRows:
        """The cache as the ops address it in this step."""
        if self.kv_cache.ndim != 4:
            raise RuntimeError(f"vLLM has not bound memory to the cache {self.prefix}")
        rows_per_page = self.kv_cache.shape[2]
        return PagedRows(self.kv_cache.squeeze(1).flatten(1), rows_per_page, self.format, metadata.block_table)
