"""The exception raised while reading a checkpoint, in a module of its own so that reading headers needs no torch."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint's files or tensors do not match its config.json or its index."""
