"""Which of the model's steps are replayed from recordings on a CPU, where Python would take most of their time.

A recording serves every decoding step of as many tokens whose inputs and caches are where they were: vLLM keeps them in
buffers that never move. The step's longest context is rounded up to a power of two, so that few recordings serve all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..compat import IntermediateTensors, VllmConfig, get_forward_context
from ..ops.cpu.replay import Replays
from ..ops.dispatch import backends
from .metadata import DeepseekV4Metadata
from .paged_cache import PagedCache

MOST_TOKENS = 64
"""Of a step that is recorded; longer ones spend little of their time in Python."""

Compute = Callable[[torch.Tensor | None, torch.Tensor, IntermediateTensors | None, torch.Tensor | None], Any]
"""The model: input_ids, positions, intermediate_tensors, inputs_embeds."""


def replays_steps(vllm_config: VllmConfig) -> bool:
    """Whether steps are replayed: on one CPU rank whose ops are compiled, unless --enforce-eager forbids it."""
    if torch.get_default_device().type != "cpu" or "cpu" not in backends("cpu"):
        return False
    return vllm_config.parallel_config.world_size == 1 and not vllm_config.model_config.enforce_eager


class StepReplay:
    """Runs the model's steps, and repeats what it can of them."""

    def __init__(self, compute: Compute, caches: list[PagedCache], vllm_config: VllmConfig) -> None:
        self.compute, self.caches = compute, caches
        self.longest = vllm_config.model_config.max_model_len
        self.replays = Replays() if replays_steps(vllm_config) else None

    def __call__(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """`compute` of the same arguments."""
        if self.replays is not None and input_ids is not None and inputs_embeds is None:
            metadata = get_forward_context().attn_metadata
            if self._decodes(metadata, positions.shape[0]):
                return self._replay(self.replays, input_ids, positions, metadata)
        return self.compute(input_ids, positions, intermediate_tensors, inputs_embeds)

    def forget(self) -> None:
        """Drop all recordings: weights may have moved."""
        if self.replays is not None:
            self.replays.clear()

    def _decodes(self, metadata: Any, tokens: int) -> bool:
        """Whether every request has one token: such steps come in as many sizes as requests may run."""
        if not isinstance(metadata, dict) or not 0 < tokens <= MOST_TOKENS:
            return False
        return metadata[self.caches[0].prefix].block_table.shape[0] == tokens

    def _replay(
        self,
        replays: Replays,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: dict[str, DeepseekV4Metadata],
    ) -> torch.Tensor:
        bound = self._bound(metadata[self.caches[0].prefix].max_seq_len)

        def compute() -> torch.Tensor:
            return self.compute(input_ids, positions, None, None)

        def bounded() -> torch.Tensor:
            context: Any = get_forward_context()
            context.attn_metadata = {
                name: dataclasses.replace(group, max_seq_len=bound) for name, group in metadata.items()
            }
            try:
                return compute()
            finally:
                context.attn_metadata = metadata

        held = input_ids, positions, metadata, [cache.kv_cache for cache in self.caches]
        addresses = self._addresses(input_ids, positions, metadata)
        return replays.call((positions.shape[0], bound), addresses, held, compute, bounded)

    def _bound(self, length: int) -> int:
        return min(1 << (length - 1).bit_length(), self.longest) if length > 1024 else min(1024, self.longest)

    def _addresses(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: dict[str, DeepseekV4Metadata]
    ) -> tuple[int, ...]:
        """Where a step's inputs are: the KV cache first, whose parts move together."""
        tokens = metadata[self.caches[0].prefix].num_tokens
        found = [self.caches[0].kv_cache.data_ptr(), input_ids.data_ptr(), positions.data_ptr(), tokens]
        for group in {id(m): m for m in metadata.values()}.values():
            table = group.block_table
            found += table.data_ptr(), table.stride(0), group.slot_mapping.data_ptr(), group.request.data_ptr()
        return tuple(found)
