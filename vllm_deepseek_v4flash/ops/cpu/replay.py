"""Recordings of a function by what it is called with, kept within a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from .recording import Recording

MOST_BYTES = 256 << 20
"""Of all recordings' results together; beyond, all are made anew."""


@dataclass(frozen=True)
class Recorded:
    """One call that can be repeated."""

    addresses: tuple[int, ...]
    recording: Recording
    result: torch.Tensor
    held: Any
    """What is stored at the addresses; held, so that nothing else takes its place."""


class Replays:
    """Repeats a function's calls from recordings, where its tensors are at the addresses that they had."""

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Recorded | None] = {}
        """By key; None for calls that have run once."""

    def call(
        self,
        key: Hashable,
        addresses: tuple[int, ...],
        held: Any,
        compute: Callable[[], torch.Tensor],
        recordable: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """The result of `compute()`: computed at first, then recorded, from the third call on replayed.

        Args:
            key: what the result's shape and the kernels depend on.
            addresses: of every tensor that differs from call to call; the first is of memory that all keys share, so
                that when it moves all recordings are dropped.
            held: the tensors at the addresses.
            recordable: makes the same result, in a way that holds for all calls of this key.
        """
        if key not in self.recorded:
            # Most keys occur once, among others: they are not worth a recording.
            self.recorded[key] = None
            return compute()
        call = self.recorded[key]
        if call is None or call.addresses != addresses:
            self._make_room(addresses)
            with Recording() as recording:
                result = recordable()
            call = self.recorded[key] = Recorded(addresses, recording, result, held)
        elif call.recording.obstacle:
            return compute()
        else:
            call.recording.replay()
        # The next call overwrites it.
        return call.result.clone()

    def clear(self) -> None:
        """Forget everything: tensors may have moved."""
        self.recorded.clear()

    def _make_room(self, addresses: tuple[int, ...]) -> None:
        calls = [call for call in self.recorded.values() if call is not None]
        moved = any(call.addresses[0] != addresses[0] for call in calls)
        if moved or sum(call.recording.bytes for call in calls) > MOST_BYTES:
            self.clear()
