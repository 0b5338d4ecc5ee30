"""The paged caches of one layer as vLLM's scheduler sees them (docs/model.md, "Caches").

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

from typing import TYPE_CHECKING, Any

import torch

from ..compat import AttentionLayerBase, KVCacheSpec, MLAAttentionSpec, SlidingWindowMLASpec, VllmConfig
from ..config import BLOCK_TOKENS, DeepseekV4Config
from ..ops.rows import PagedRows, RowFormat
from .formats import CacheFormats
from .page_sizes import PAGE_ALIGNMENT as PAGE_ALIGNMENT
from .page_sizes import PageSize, layer_pages
from .page_sizes import kv_bytes_per_token as kv_bytes_per_token

if TYPE_CHECKING:
    from .metadata import DeepseekV4Metadata


def layer_specs(
    config: DeepseekV4Config, layer: int, formats: CacheFormats, block_tokens: int = BLOCK_TOKENS
) -> dict[str, tuple[KVCacheSpec, RowFormat]]:
    """Every cache of one backbone layer by name, with the format of its rows."""
    pages = layer_pages(config, layer, formats, block_tokens)
    return {name: (_spec(page), page.format) for name, page in pages.items()}


def _spec(page: PageSize) -> SlidingWindowMLASpec | MLAAttentionSpec:
    shape: dict[str, Any] = {
        "block_size": page.block_tokens,
        "num_kv_heads": 1,
        "head_size": page.row_size,
        "dtype": page.format.dtype,
    }
    if page.window is not None:
        return SlidingWindowMLASpec(sliding_window=page.window, **shape)
    return MLAAttentionSpec(tokens_per_state=page.tokens_per_row, **shape)


class PagedCache(AttentionLayerBase):
    """One cache of one layer: declares its spec to vLLM and receives its memory.

    Registers itself in vLLM's forward context under `prefix`, which must contain the layer index.
    """

    def __init__(self, name: str, layer: int, config: DeepseekV4Config, formats: CacheFormats, *, prefix: str,
                 registry: dict[str, Any]) -> None:  # fmt: skip
        if prefix in registry:
            raise ValueError(f"{prefix}: a cache of this name is already registered. Give every layer its own prefix.")
        registry[prefix] = self
        self.name, self.layer, self.config, self.formats, self.prefix = name, layer, config, formats, prefix
        self.page = layer_pages(config, layer, formats)[name]
        self.format = self.page.format
        self.spec: KVCacheSpec | None = None
        # vLLM zeroes, resets and puts to sleep the bound memory through an attribute of this name.
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type:
        from .backend import DeepseekV4Backend

        return DeepseekV4Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # The platform may change the block size after the model is built, so it is read here; and only once, because
        # vLLM later replaces it by the smallest block size of all caches.
        if self.spec is None:
            specs = layer_specs(self.config, self.layer, self.formats, vllm_config.cache_config.block_size)
            self.spec = specs[self.name][0]
        return self.spec

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take vLLM's view [pages, 1, rows, row_size]; its pages are strided, each is contiguous."""
        self.kv_cache = kv_cache

    def blank(self, requests: int, device: torch.device) -> PagedRows:
        """One page of zeros and the requests on it, for a step without vLLM's memory."""
        pages = torch.zeros(1, self.page.rows * self.page.row_size, dtype=self.format.dtype, device=device)
        return PagedRows(pages, self.page.rows, self.format, torch.zeros(requests, 1, dtype=torch.int32, device=device))

    def rows(self, metadata: DeepseekV4Metadata) -> PagedRows:
        """The cache as the ops address it in this step."""
        if self.kv_cache.ndim != 4:
            raise RuntimeError(f"{self.prefix}: vLLM has not bound memory to this cache. Run the model after it has.")
        rows_per_page = self.kv_cache.shape[2]
        # view, not flatten: a copy would lose every write.
        pages = self.kv_cache.squeeze(1).view(self.kv_cache.shape[0], -1)
        return PagedRows(pages, rows_per_page, self.format, metadata.block_table)
