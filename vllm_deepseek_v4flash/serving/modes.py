"""Reasoning modes: those that each generation of V4 weights was trained with, and the one that a request selects.

A mode is a text before the prompt and the token that opens the answer, `<think>` or `</think>`. Each generation has
three, and they differ (source: DeepSeek's model cards and the encoders shipped with the weights):

| request's effort | April (preview, Pro, DSpark) | 0731             |
|------------------|------------------------------|------------------|
| none             | non-think                    | non-think        |
| minimal, low     | high: no text                | low: no text     |
| medium           | high                         | low              |
| high (default)   | high                         | high: "Absolute" |
| xhigh            | max: "Absolute"              | high             |
| max              | max                          | max: "Beyond"    |
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Generation(enum.Enum):
    """The post-training of a checkpoint, which decides its chat encoding."""

    APRIL = "april"
    JULY = "0731"


@dataclass(frozen=True)
class Mode:
    """One reasoning mode: `text` follows the BOS, and `thinking` decides which token opens the answer."""

    name: str
    thinking: bool
    text: str = ""


# DeepSeek's exact wording, on which the weights were trained.
_ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying "
    "cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain "
    "that no assumption remains unchecked and no error remains undiscovered.\n\n"
)

NON_THINK = Mode("non-think", thinking=False)
DEFAULT_EFFORT = "high"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

_APRIL_HIGH, _APRIL_MAX = Mode("high", True), Mode("max", True, _ABSOLUTE)
_JULY_LOW, _JULY_HIGH, _JULY_MAX = Mode("low", True), Mode("high", True, _ABSOLUTE), Mode("max", True, _BEYOND)

MODES: Mapping[Generation, Mapping[str, Mode]] = {
    generation: dict(zip(EFFORTS, (NON_THINK, *modes), strict=True))
    for generation, modes in {
        Generation.APRIL: (_APRIL_HIGH, _APRIL_HIGH, _APRIL_HIGH, _APRIL_HIGH, _APRIL_MAX, _APRIL_MAX),
        Generation.JULY: (_JULY_LOW, _JULY_LOW, _JULY_LOW, _JULY_HIGH, _JULY_HIGH, _JULY_MAX),
    }.items()
}


def select_mode(
    generation: Generation, *, thinking: Any = None, enable_thinking: Any = None, reasoning_effort: Any = None
) -> Mode:
    """The mode that a request selects; an argument is None if the request does not set it.

    An explicit "do not think" overrides everything else: `thinking=False`, `enable_thinking=False` or the effort
    "none". Otherwise the effort decides; the default is DEFAULT_EFFORT, the same as in DeepSeek's hosted API.

    Raises:
        ValueError: for a switch that is not a boolean, or an unknown effort.
    """
    for name, value in (("thinking", thinking), ("enable_thinking", enable_thinking)):
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: not a boolean. Use true or false.")
    if reasoning_effort is not None and reasoning_effort not in EFFORTS:
        raise ValueError(f"reasoning_effort={reasoning_effort!r}: unknown effort. Use one of {', '.join(EFFORTS)}.")
    if thinking is False or enable_thinking is False:
        return NON_THINK
    return MODES[generation][reasoning_effort or DEFAULT_EFFORT]
