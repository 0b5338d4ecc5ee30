"""All caches of one layer, registered with vLLM and handed to the layer step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..compat import get_forward_context
from ..config import DeepseekV4Config
from .formats import CacheFormats
from .layer_step import EntryCaches, LayerStep
from .metadata import DeepseekV4Metadata
from .paged_cache import PagedCache, layer_specs

# Kernels are specialised for numbers of tokens rounded up to powers of two.
_DECODE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def _compiles_at_use(device: torch.device) -> bool:
    return device.type == "cuda"


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

    def steps(self, positions: torch.Tensor) -> Iterator[LayerStep]:
        """What the layer is to compute: the current step, in vLLM's profiling run on a GPU after some smaller ones.

        Args:
            positions: [>= T] int64; tokens beyond the step's T are padding.
        """
        yield from self.warm_up(positions)
        yield self.step(positions)

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

        Kernels that Triton has not compiled by then would be compiled during a request.
        """
        if _compiles_at_use(positions.device) and get_forward_context().attn_metadata is None:
            for tokens in _DECODE_SIZES:
                if tokens < positions.shape[0]:
                    yield self._blank_step(positions[:tokens], requests=tokens)

    def _blank_step(self, positions: torch.Tensor, requests: int) -> LayerStep:
        """A step that writes nothing and sees next to nothing, but runs every op and takes every workspace.

        vLLM measures the memory of its profiling run, and thus leaves enough for the workspaces.
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
