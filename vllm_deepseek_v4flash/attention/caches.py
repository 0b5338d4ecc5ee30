"""All caches of one layer, and what that layer sees of them in one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..compat import get_forward_context
from ..config import DeepseekV4Config
from ..ops.rows import PagedRows
from .cache import PagedCache, layer_specs
from .formats import CacheFormats


@dataclass(frozen=True)
class EntryCaches:
    """Where one compressor writes: its finished entries, and the states of the windows that are still open."""

    entries: PagedRows
    states: PagedRows
    state_slots: torch.Tensor
    """[T] int64, negative for padding."""


@dataclass(frozen=True)
class LayerStep:
    """One step of one layer: tensors only, ready for the ops. T tokens."""

    positions: torch.Tensor
    """[T] int64."""
    request: torch.Tensor
    """[T] int32, row of the block tables."""
    window: PagedRows
    window_slots: torch.Tensor
    """[T] int64, negative for padding."""
    main: EntryCaches | None
    index: EntryCaches | None
    max_entries: int
    """No token of this step sees more compressed entries than this; 0 in window layers."""


class LayerCaches(nn.Module):
    """Registers the caches of one layer with vLLM and hands them to the layer, step by step."""

    def __init__(
        self, config: DeepseekV4Config, layer: int, formats: CacheFormats, *, prefix: str, registry: dict[str, nn.Module]
    ) -> None:
        super().__init__()
        self.ratio = config.compress_ratios[layer]
        for name in layer_specs(config, layer, formats):
            cache = PagedCache(name, layer, config, formats, prefix=f"{prefix}.{name}", registry=registry)
            self.add_module(name, cache)

    def step(self, positions: torch.Tensor) -> LayerStep | None:
        """The current step's caches; None in vLLM's profiling run, which has no cache yet.

        Args:
            positions: [>= T] int64; tokens beyond the step's T are padding.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return None
        by_cache = {name: metadata[cache.prefix] for name, cache in self.named_children()}
        window = by_cache["window"]
        return LayerStep(
            positions=positions[: window.num_tokens],
            request=window.request,
            window=self.window.rows(window),
            window_slots=window.slot_mapping,
            main=self._compressor("entries", "states", by_cache),
            index=self._compressor("index_entries", "index_states", by_cache),
            max_entries=window.max_seq_len // self.ratio if self.ratio else 0,
        )

    def _compressor(self, entries: str, states: str, metadata: dict) -> EntryCaches | None:
        if entries not in metadata:
            return None
        return EntryCaches(
            entries=getattr(self, entries).rows(metadata[entries]),
            states=getattr(self, states).rows(metadata[states]),
            state_slots=metadata[states].slot_mapping,
        )
