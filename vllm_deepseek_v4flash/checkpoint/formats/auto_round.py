"""AutoRound's own config, on top of GPTQ's and AWQ's layouts.

`packing_format` is the layout: `auto_round:auto_gptq` (zero points stored minus one), `auto_round:gptqmodel` and plain
`auto_round` (stored as is), or `auto_round:auto_awq`. One label is wrong: AutoRound's model-free path labels asymmetric
weights `auto_round` although it stores zero points minus one. They are read accordingly, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ...log import logger_name, warning_once
from ...ops.packed_weight import Scheme
from ..headers import TensorHeader
from . import awq, floats, gptq
from .common import either, refuse_excluded, refuse_value
from .format import Format
from .patterns import find_name, regex_match

logger = logging.getLogger(logger_name(__name__))

_LAYOUTS = {
    "auto_round:auto_gptq": gptq.V1,
    "auto_round:gptqmodel": gptq.V2,
    "auto_round": gptq.V2,
    "auto_round:auto_awq": awq.SOURCE,
}
_REGEX_CHARACTERS = set(r"*+?^$()[]{}|\\")
_MISLABELLED = (
    "packing_format='auto_round' in quantization_config: AutoRound's model-free path (%s) wrote it, which stores "
    "asymmetric zero points minus one; read as 'auto_round:auto_gptq'."
)


def _override(config: Mapping[str, Any], module: str) -> tuple[str, Mapping[str, Any], bool] | None:
    """The key and entry of `extra_config` that apply to the module, and whether that is certain.

    A name takes precedence over a part of a name (`wo_a`), and that over a regular expression.
    """
    entries = config.get("extra_config") or {}
    name = find_name(entries, module)
    if name is not None:
        return name, entries[name], True
    for key in _regexes(tuple(entries)):
        found = regex_match(key, module, anchored=False)
        if found != "none":
            return key, entries[key], found == "all"
    return None


@lru_cache(maxsize=64)
def _regexes(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if not _REGEX_CHARACTERS.isdisjoint(key))


def describe(config: Mapping[str, Any], module: str, leaves: Mapping[str, TensorHeader]) -> Scheme:
    if "qweight" not in leaves:
        return floats.describe(module, leaves, "auto-round")
    label = str(config.get("packing_format") or "auto_round:auto_gptq")
    if label not in _LAYOUTS:
        refuse_value(module, "packing_format", label, either(tuple(_LAYOUTS)))
    bits, group_size = config.get("bits", 4), config.get("group_size", 128)
    symmetric, data_type = config.get("sym", True), config.get("data_type", "int")
    found = _override(config, module)
    if found is not None:
        key, entry, certain = found
        if entry.get("bits", bits) >= 16:
            if certain:
                refuse_excluded(module, "qweight", key, "`extra_config`")
        else:
            bits, group_size = entry.get("bits", bits), entry.get("group_size", group_size)
            symmetric, data_type = entry.get("sym", symmetric), entry.get("data_type", data_type)
    excluded = find_name(config.get("modules_to_not_convert") or (), module)
    if excluded is not None:
        refuse_excluded(module, "qweight", excluded, "`modules_to_not_convert`")
    source = _LAYOUTS[label]
    if label == "auto_round" and config.get("model_free"):
        source = gptq.V1
        warning_once(logger, _MISLABELLED, str(config.get("autoround_version", "no version given")))
    if data_type != "int":
        bits = f"{bits} ({data_type})"
    settings = gptq.Settings(bits, group_size, bool(symmetric))
    return gptq.describe_packed(source, settings, module, leaves)


FORMAT = Format("auto-round", ("auto-round", "intel/auto-round", "inc"), describe, gptq.repack, gptq.dequantise)
