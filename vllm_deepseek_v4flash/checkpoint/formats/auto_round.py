"""AutoRound's own config, on top of GPTQ's and AWQ's layouts.

`packing_format` is the layout: `auto_round:auto_gptq` (zero points stored minus one), `auto_round:gptqmodel` and plain
`auto_round` (stored as is), or `auto_round:auto_awq`.

The label does not tell how AutoRound's model-free path stored a zero point. Before 0.16 it took one off every zero
point, under both labels. Since 0.16 it does so for symmetric weights only, and the label is that of most weights:
a layer that `extra_config` makes symmetric or asymmetric keeps the layout of its own kind.
"""

from __future__ import annotations

import logging
import re
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
_GPTQ_LABELS = ("auto_round:auto_gptq", "auto_round")
# The release whose model-free path stores asymmetric zero points as they are.
_ZEROS_AS_THEY_ARE = (0, 16)
_MISLABELLED = (
    "packing_format=%r in quantization_config: AutoRound's model-free path (version %s) stores %s zero points %s, "
    "whatever the label says; read accordingly."
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


def _model_free_layout(config: Mapping[str, Any], label: str, module: str, symmetric: bool) -> str:
    """How the model-free path of the AutoRound that wrote the checkpoint stored this module's zero points."""
    version = config.get("autoround_version")
    if symmetric:
        layout = gptq.V1
    else:
        # A development version may be from before or after the change.
        release = re.fullmatch(r"(\d+)\.(\d+)(?:\.\d+)*(?:\.?post\d+)?(?:\+.*)?", str(version))
        if release is None:
            refuse_value(
                module, "autoround_version", version,
                "the release that wrote the checkpoint, because it decides how an asymmetric zero point is stored: "
                "minus one before 0.16, as it is since",
            )  # fmt: skip
        layout = gptq.V2 if (int(release[1]), int(release[2])) >= _ZEROS_AS_THEY_ARE else gptq.V1
    if layout != _LAYOUTS[label]:
        kind = "symmetric" if symmetric else "asymmetric"
        stored = "minus one" if layout == gptq.V1 else "as they are"
        warning_once(logger, _MISLABELLED, label, str(version), kind, stored)
    return layout


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
    if label in _GPTQ_LABELS and config.get("model_free"):
        source = _model_free_layout(config, label, module, bool(symmetric))
    if data_type != "int":
        bits = f"{bits} ({data_type})"
    settings = gptq.Settings(bits, group_size, bool(symmetric))
    return gptq.describe_packed(source, settings, module, leaves)


FORMAT = Format("auto-round", ("auto-round", "intel/auto-round", "inc"), describe, gptq.repack, gptq.dequantise)
