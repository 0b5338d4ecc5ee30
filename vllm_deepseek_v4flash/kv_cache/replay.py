"""Decoding steps on a CPU from recordings: the model's Python would take most of their time.

A recording serves every step of as many tokens whose inputs and caches lie where they lay: vLLM keeps them in buffers
that never move. What a step sees of its context is rounded up to a power of two, so that few recordings serve it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ..compat import VllmConfig, get_forward_context
from ..ops.cpu.recording import Recording
from ..ops.dispatch import backends
from .metadata import DeepseekV4Metadata
from .paged_cache import PagedCache

MOST_TOKENS = 64
"""Of a step that is recorded; longer ones spend little of their time in Python."""
MOST_BYTES = 256 << 20
"""Of all recordings' results together; beyond, all are made anew."""


@dataclasses.dataclass(frozen=True)
class _Step:
    addresses: tuple[int, ...]
    recording: Recording
    result: torch.Tensor
    inputs: Any
    """What lies at the addresses; held, so that nothing else comes to lie there."""


def replays(vllm_config: VllmConfig) -> bool:
    """Whether steps are recorded: on one CPU rank whose ops are compiled, unless --enforce-eager forbids it."""
    if torch.get_default_device().type != "cpu" or "cpu" not in backends("cpu"):
        return False
    return vllm_config.parallel_config.world_size == 1 and not vllm_config.model_config.enforce_eager


class StepReplay:
    """Calls `compute(input_ids, positions)`, or repeats what it did when it was last given as many tokens."""

    def __init__(
        self, compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], caches: list[PagedCache], longest: int
    ) -> None:
        self.compute, self.caches, self.longest = compute, caches, longest
        self.steps: dict[tuple[int, int], _Step | None] = {}

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        metadata = get_forward_context().attn_metadata
        tokens = positions.shape[0]
        if not isinstance(metadata, dict) or not 0 < tokens <= MOST_TOKENS:
            return self.compute(input_ids, positions)
        first = metadata[self.caches[0].prefix]
        # Decoding steps alone: there are as many sizes of them as requests may run, and so of recordings.
        if first.block_table.shape[0] != tokens:
            return self.compute(input_ids, positions)
        bound = self._bound(first.max_seq_len)
        addresses = self._addresses(input_ids, positions, metadata)
        key = tokens, bound
        if key not in self.steps:
            # Most sizes of a step occur once, between others: they are not worth a recording.
            self.steps[key] = None
            return self.compute(input_ids, positions)
        step = self.steps[key]
        if step is None or step.addresses != addresses:
            step = self.steps[key] = self._record(input_ids, positions, metadata, bound, addresses)
        elif step.recording.obstacle:
            return self.compute(input_ids, positions)
        else:
            step.recording.replay()
        # The next step overwrites it.
        return step.result.clone()

    def _bound(self, length: int) -> int:
        return min(1 << (length - 1).bit_length(), self.longest) if length > 1024 else min(1024, self.longest)

    def _addresses(
        self, input_ids: torch.Tensor, positions: torch.Tensor, metadata: dict[str, DeepseekV4Metadata]
    ) -> tuple[int, ...]:
        """Where a step's inputs lie, the KV cache first; its parts move together."""
        tokens = metadata[self.caches[0].prefix].num_tokens
        found = [self.caches[0].kv_cache.data_ptr(), input_ids.data_ptr(), positions.data_ptr(), tokens]
        for group in {id(m): m for m in metadata.values()}.values():
            table = group.block_table
            found += table.data_ptr(), table.stride(0), group.slot_mapping.data_ptr(), group.request.data_ptr()
        return tuple(found)

    def _record(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: dict[str, DeepseekV4Metadata],
        bound: int,
        addresses: tuple[int, ...],
    ) -> _Step:
        made = [step for step in self.steps.values() if step is not None]
        if any(step.addresses[0] != addresses[0] for step in made) or sum(s.recording.bytes for s in made) > MOST_BYTES:
            self.steps.clear()
        context: Any = get_forward_context()
        context.attn_metadata = {
            name: dataclasses.replace(group, max_seq_len=bound) for name, group in metadata.items()
        }
        try:
            with Recording() as recording:
                result = self.compute(input_ids, positions)
        finally:
            context.attn_metadata = metadata
        inputs = input_ids, positions, metadata, [cache.kv_cache for cache in self.caches]
        return _Step(addresses, recording, result, inputs)
