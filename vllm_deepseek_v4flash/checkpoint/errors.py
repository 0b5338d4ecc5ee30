"""The exception of everything that reads a checkpoint; apart from `loader`, so that reading headers needs no torch."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint's files or tensors are not those its config.json and index ask for."""
