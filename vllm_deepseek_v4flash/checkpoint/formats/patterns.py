"""Which modules the patterns of a quantisation config select.

Tools write ignore lists and overrides with the names of the model they quantised, which may differ from the stored
names. An exact name is therefore translated before it is compared; a regular expression is tried on every spelling of
the module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Literal

from ...ops.packed_weight import QuantizationError
from ..names import Style, native_name, stored_name

# "all": the pattern matches the module in both DeepSeek's and transformers' spelling. "some": in only one of them, so
# it may have been written for the other (`.*gate$` is the router in transformers' names, and in DeepSeek's also the
# compressor's gate).
Match = Literal["all", "some", "none"]

_DEEPSEEK: tuple[Style, ...] = ("native", "prefixed", "saved")
_SWAPS = ((".self_attn.", ".attn."), (".mlp.", ".ffn."), (".attn.", ".self_attn."), (".ffn.", ".mlp."))


def _with_and_without_model(names: Iterable[str]) -> tuple[str, ...]:
    bare = {name.removeprefix("model.") for name in names}
    return tuple(sorted(bare | {f"model.{name}" for name in bare}))


@lru_cache(maxsize=1 << 17)
def spellings(module: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The module's names in DeepSeek's spelling, in transformers', and in the mixtures that tools write."""
    try:
        deepseek = {stored_name(module, style) for style in _DEEPSEEK}
        transformers = {stored_name(module, "transformers")}
    except KeyError:
        deepseek = transformers = {module}
    mixed = (
        {name.replace(old, new) for name in deepseek | transformers for old, new in _SWAPS if old in name}
        - deepseek
        - transformers
    )
    return (
        _with_and_without_model(deepseek),
        _with_and_without_model(transformers),
        _with_and_without_model(mixed),
    )


_native = lru_cache(maxsize=1 << 16)(native_name)


def is_module(pattern: str, module: str) -> bool:
    """Whether `pattern` is a name of `module`, in any spelling."""
    return pattern == module or _native(pattern) == module


@lru_cache(maxsize=1 << 17)
def _dotted(module: str) -> tuple[str, frozenset[str]]:
    """The module's spellings with dots around them, and all their components."""
    names = [name for names in spellings(module) for name in names]
    return "\n".join(f".{name}." for name in names), frozenset(part for name in names for part in name.split("."))


@lru_cache(maxsize=64)
def _classified(patterns: tuple[str, ...]) -> tuple[dict[str, str], tuple[tuple[str, str, str], ...]]:
    """Patterns that are a module's name, keyed by DeepSeek's name; the others with last component and dots."""
    exact: dict[str, str] = {}
    parts = []
    for pattern in patterns:
        name = _native(pattern)
        if name is not None:
            exact.setdefault(name, pattern)
        else:
            bare = pattern.strip(".")
            parts.append((bare.rpartition(".")[2], f".{bare}.", pattern))
    return exact, tuple(parts)


def find_name(patterns: Iterable[str], module: str) -> str | None:
    """The pattern that is the module's name, else the first that is one or more whole components of it.

    `mlp.gate`, `wo_a` and `layers.3` are components. A config may hold hundreds of patterns and a checkpoint
    has tens of thousands of modules, so the patterns are classified once.
    """
    exact, parts = _classified(tuple(patterns))
    if module in exact:
        return exact[module]
    if not parts:
        return None
    text, components = _dotted(module)
    return next((pattern for last, dotted, pattern in parts if last in components and dotted in text), None)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise QuantizationError(
            f"quantization_config holds {pattern!r}, which is not a regular expression: {error}. Correct it."
        ) from error


def regex_match(pattern: str, module: str, anchored: bool) -> Match:
    """How a regular expression fits the module; `anchored` ones must match from the start of the name."""
    compiled = _compiled(pattern)
    search: Callable[[str], object] = compiled.match if anchored else compiled.search
    deepseek, transformers, mixed = spellings(module)
    in_deepseek, in_transformers = any(map(search, deepseek)), any(map(search, transformers))
    if in_deepseek and in_transformers:
        return "all"
    return "some" if in_deepseek or in_transformers or any(map(search, mixed)) else "none"
