"""All caches of one layer, and what that layer sees of them in one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..compat import get_forward_context
from ..config import DeepseekV4Config
from ..ops.rows import PagedRows
from .formats import CacheFormats
from .metadata import DeepseekV4Metadata
from .paged_cache import PagedCache, layer_specs

# Kernels are specialised by powers of two of what a step's tokens are divided into.
_DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def _compiles_at_use(device: torch.device) -> bool:
    return device.type == "cuda"


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


class LayerCaches:
    """Registers the caches of one layer with vLLM and hands them to the layer, step by step."""

    def __init__(
        self,
        config: DeepseekV4Config,
        layer: int,
        formats: CacheFormats,
        *,
        max_model_len: int,
        prefix: str,
        registry: dict[str, Any],
    ) -> None:
        self.ratio, self.max_model_len = config.compress_ratios[layer], max_model_len
        self.caches: dict[str, PagedCache] = {
            name: PagedCache(name, layer, config, formats, prefix=f"{prefix}.{name}", registry=registry)
            for name in layer_specs(config, layer, formats)
        }

    def step(self, positions: torch.Tensor) -> LayerStep:
        """The current step's caches; in vLLM's profiling and warm-up runs, which have none, blank ones.

        Args:
            positions: [>= T] int64; tokens beyond the step's T are padding.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return self._blank_step(positions, requests=1)
        by_cache = {name: metadata[cache.prefix] for name, cache in self.caches.items()}
        window = by_cache["window"]
        return LayerStep(
            positions=positions[: window.num_tokens],
            request=window.request,
            window=self.caches["window"].rows(window),
            window_slots=window.slot_mapping,
            main=self._compressor("entries", "states", by_cache),
            index=self._compressor("index_entries", "index_states", by_cache),
            max_entries=window.max_seq_len // self.ratio if self.ratio else 0,
        )

    def warm_up(self, positions: torch.Tensor) -> Iterator[LayerStep]:
        """In vLLM's profiling run on a GPU: decoding steps of several sizes, on blank caches; otherwise none.

        Kernels that Triton has not compiled by then, it compiles in somebody's request.
        """
        if _compiles_at_use(positions.device) and get_forward_context().attn_metadata is None:
            for tokens in _DECODE_SIZES:
                if tokens < positions.shape[0]:
                    yield self._blank_step(positions[:tokens], requests=tokens)

    def _blank_step(self, positions: torch.Tensor, requests: int) -> LayerStep:
        """A step that writes nothing and sees next to nothing, but runs every op and takes every workspace.

        So vLLM, which measures the memory of its profiling run, leaves enough of it beside the KV cache.
        """
        device = positions.device
        padding = torch.full_like(positions, -1)
        rows = {name: cache.blank(requests, device) for name, cache in self.caches.items()}

        def compressor(entries: str, states: str) -> EntryCaches | None:
            return EntryCaches(rows[entries], rows[states], padding) if entries in rows else None

        return LayerStep(
            positions=torch.zeros_like(positions),
            request=torch.zeros_like(positions, dtype=torch.int32),
            window=rows["window"],
            window_slots=padding,
            main=compressor("entries", "states"),
            index=compressor("index_entries", "index_states"),
            max_entries=self.max_model_len // self.ratio if self.ratio else 0,
        )

    def _compressor(self, entries: str, states: str, metadata: dict[str, DeepseekV4Metadata]) -> EntryCaches | None:
        if entries not in metadata:
            return None
        return EntryCaches(
            entries=self.caches[entries].rows(metadata[entries]),
            states=self.caches[states].rows(metadata[states]),
            state_slots=metadata[states].slot_mapping,
        )
