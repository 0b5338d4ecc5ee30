"""The chat encoder that a checkpoint ships: it alone tells which generation of weights it holds."""

from __future__ import annotations

ENCODER = "encoding/encoding_dsv4.py"

# A text of each encoder, and the generation that has it. 0731's contains both, so it comes first.
_MARKERS = (("Beyond maximum", "0731"), ("Absolute maximum", "april"))


def generation_of(encoder: str) -> tuple[str, str] | None:
    """The generation whose encoder this is, "0731" or "april", and the text that tells; None if none does."""
    return next(((generation, marker) for marker, generation in _MARKERS if marker in encoder), None)
