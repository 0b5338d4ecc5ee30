"""What a layer sees of its caches in one step: tensors only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.rows import PagedRows


@dataclass(frozen=True)
class EntryCaches:
    """Where one compressor writes: its finished entries, and the states of the windows that are still open."""

    entries: PagedRows
    states: PagedRows
    state_slots: torch.Tensor
    """[T] int64, negative for padding."""


@dataclass(frozen=True)
class LayerStep:
    """One step of one layer, ready for the ops. T tokens."""

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
