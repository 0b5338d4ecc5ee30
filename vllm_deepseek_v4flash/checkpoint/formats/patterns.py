"""Which modules the patterns of a quantisation config select.

Tools write ignore lists and overrides with the names of the model they quantised, which may differ from the stored
names. An exact name is therefore translated before it is compared; a regular expression is tried on every spelling of
the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from ..names import TABLE, Style, native_name, stored_name
from .regular import rule

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


@cache
def _vocabulary() -> tuple[str, str]:
    """Every module's name in DeepSeek's and in transformers' spelling, with dots around it and `*` for a number."""
    deepseek, transformers = set(), set()
    for row in TABLE:
        prefix = "model." if row.where == "global" else "model.layers.*."
        deepseek |= {prefix + name.removeprefix("model.") for name in (row.native, row.saved) if name is not None}
        transformers.add(prefix + row.transformers.removeprefix("model."))
    return _with_dots(deepseek), _with_dots(transformers)


def _with_dots(names: Iterable[str]) -> str:
    return "\n".join(f".{name}." for name in names)


@lru_cache(maxsize=1 << 17)
def _dotted(module: str) -> tuple[tuple[str, str, str], frozenset[str]]:
    """The module's spellings by family, with dots around them, and all their components."""
    deepseek, transformers, mixed = spellings(module)
    components = frozenset(
        part for names in (deepseek, transformers, mixed) for name in names for part in name.split(".")
    )
    return (_with_dots(deepseek), _with_dots(transformers), _with_dots(mixed)), components


@dataclass(frozen=True)
class _Part:
    """A pattern that is a part of names: its last component, itself with dots, and which spellings have such a part."""

    pattern: str
    last: str
    dotted: str
    in_deepseek: bool
    in_transformers: bool

    def selects(self, names: tuple[str, str, str]) -> bool:
        deepseek, transformers, mixed = (self.dotted in text for text in names)
        if self.in_deepseek and self.in_transformers:
            return deepseek and transformers
        return deepseek if self.in_deepseek else transformers if self.in_transformers else mixed


def _part(pattern: str) -> _Part:
    bare = pattern.strip(".")
    general = "." + ".".join("*" if part.isdecimal() else part for part in bare.split(".")) + "."
    deepseek, transformers = (general in text for text in _vocabulary())
    return _Part(pattern, bare.rpartition(".")[2], f".{bare}.", deepseek, transformers)


@lru_cache(maxsize=64)
def _classified(patterns: tuple[str, ...]) -> tuple[dict[str, str], tuple[_Part, ...]]:
    """Patterns that are a module's name, keyed by DeepSeek's name, and the others."""
    exact: dict[str, str] = {}
    parts = []
    for pattern in patterns:
        name = _native(pattern)
        if name is not None:
            exact.setdefault(name, pattern)
        else:
            parts.append(_part(pattern))
    return exact, tuple(parts)


def find_name(patterns: Iterable[str], module: str) -> str | None:
    """The pattern that is the module's name, else the first that is one or more whole components of it.

    `mlp.gate`, `wo_a` and `layers.3` are components. One that occurs in both spellings, but in this module's name in
    one only, selects nothing: it may have been written for the other (`compressor` contains the indexer to
    transformers, not to DeepSeek).

    A config may hold hundreds of patterns and a checkpoint has tens of thousands of modules, so the patterns are
    classified once.
    """
    exact, parts = _classified(tuple(patterns))
    if module in exact:
        return exact[module]
    if not parts:
        return None
    names, components = _dotted(module)
    return next((part.pattern for part in parts if part.last in components and part.selects(names)), None)


def regex_match(pattern: str, module: str, anchored: bool) -> Match:
    """How a regular expression fits the module; `anchored` ones must match from the start of the name.

    Raises:
        PatternError: it is not a regular expression, or matching takes too long.
    """
    expression = rule(pattern)
    if not any(expression.needed in text for text in _dotted(module)[0]):
        return "none"
    deepseek, transformers, mixed = spellings(module)
    with expression.timed():
        search: Callable[[str], object] = expression.compiled.match if anchored else expression.compiled.search
        in_deepseek, in_transformers = any(map(search, deepseek)), any(map(search, transformers))
        if in_deepseek and in_transformers:
            return "all"
        return "some" if in_deepseek or in_transformers or any(map(search, mixed)) else "none"
