"""Whether a `quantization_config` has lists and objects where the formats look into them, which judge the values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ...config import shown
from ...ops.packed_weight import QuantizationError

_NAMES = "a list of module names or patterns"
_OBJECTS = "an object with an object for each of its keys"


def check_structure(config: Mapping[str, Any]) -> None:
    """Refuse a list that is none, or an object that is none.

    Raises:
        QuantizationError: with the key, its value and what it should be.
    """
    for key in ("ignore", "modules_to_not_convert"):
        _check_names(key, config.get(key))
    block = config.get("weight_block_size")
    if block is not None and not isinstance(block, list | tuple):
        _refuse("weight_block_size", block, "a list of two integers")
    for key, entry in _objects(config, "dynamic"):
        # What it excludes needs no settings.
        if not key.startswith("-:"):
            _check_object(f"dynamic[{shown(key)}]", entry)
    for key, entry in _objects(config, "extra_config"):
        _check_object(f"extra_config[{shown(key)}]", entry)
        _check_integer(f"extra_config[{shown(key)}].bits", entry.get("bits"))
    for key, group in _objects(config, "config_groups"):
        name = f"config_groups[{shown(key)}]"
        _check_object(name, group)
        _check_names(f"{name}.targets", group.get("targets"))
        weights = group.get("weights")
        if weights is not None:
            _check_weights(f"{name}.weights", weights)


def _check_weights(name: str, weights: Any) -> None:
    _check_object(name, weights)
    _check_integer(f"{name}.group_size", weights.get("group_size"))
    block = weights.get("block_structure")
    spelled = isinstance(block, str) and re.fullmatch(r"[0-9]{1,9}x[0-9]{1,9}", block)
    if block is not None and not spelled and not isinstance(block, list | tuple):
        _refuse(f"{name}.block_structure", block, "a list of two integers, or '128x128'")


def _objects(config: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        _refuse(key, value, _OBJECTS)
    return list(value.items())


def _check_object(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        _refuse(name, value, "an object")


def _check_names(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)):
        _refuse(name, value, _NAMES)


def _check_integer(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        _refuse(name, value, "an integer")


def _refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise QuantizationError(
        f"quantization_config.{name}={shown(value)}: must be {allowed}. Correct it in the model's config.json."
    )
