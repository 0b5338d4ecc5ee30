"""What each layer attends to and how it routes, from either spelling of the schedule."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from .source import Source, as_integer, as_list, config_error


class LayerKind(enum.Enum):
    """What a layer attends to besides its sliding window (arXiv 2606.19348, sections 2.3.1 and 2.3.2)."""

    WINDOW = "window"
    CSA = "csa"
    HCA = "hca"


Schedule = tuple[tuple[LayerKind, ...], tuple[int, ...]]
"""The kind and the compression ratio of each backbone layer; a window layer has ratio 0."""

_KIND_OF_RATIO = {0: LayerKind.WINDOW, 1: LayerKind.WINDOW, 4: LayerKind.CSA, 128: LayerKind.HCA}
_KIND_OF_LAYER_TYPE = {
    "sliding_attention": LayerKind.WINDOW,
    "compressed_sparse_attention": LayerKind.CSA,
    "heavily_compressed_attention": LayerKind.HCA,
}
_LAYER_TYPE_OF_KIND = {kind: name for name, kind in _KIND_OF_LAYER_TYPE.items()}


def read_schedule(source: Source, n_layers: int) -> Schedule:
    """From DeepSeek's `compress_ratios` or transformers' `layer_types`; where both are set they must agree."""
    native = source.get("compress_ratios")
    saved = source.get("layer_types")
    if native is None and saved is None:
        raise config_error(
            "compress_ratios", None, "must have one of 0, 1, 4, 128 for each layer, or layer_types must be set"
        )
    if native is None:
        return _schedule_from_layer_types(source, saved, n_layers)
    schedule = _schedule_from_ratios(native, n_layers)
    if saved is not None and _schedule_from_layer_types(source, saved, n_layers) != schedule:
        raise config_error("layer_types", as_list("layer_types", saved), "must be the same schedule as compress_ratios")
    return schedule


def _schedule_from_ratios(native: Any, n_layers: int) -> Schedule:
    entries = as_list("compress_ratios", native)
    if len(entries) < n_layers:
        raise config_error("compress_ratios", entries, f"must have at least num_hidden_layers={n_layers} entries")
    for i, ratio in enumerate(entries):
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio not in _KIND_OF_RATIO:
            raise config_error(f"compress_ratios[{i}]", ratio, "must be 0 or 1 (window), 4 (CSA) or 128 (HCA)")
    # What follows the backbone belongs to the MTP blocks: one entry in Flash, three with DSpark.
    entries = entries[:n_layers]
    return tuple(_KIND_OF_RATIO[r] for r in entries), tuple(r if r > 1 else 0 for r in entries)


def _schedule_from_layer_types(source: Source, saved: Any, n_layers: int) -> Schedule:
    entries = as_list("layer_types", saved)
    if len(entries) != n_layers:
        raise config_error("layer_types", entries, f"must have exactly num_hidden_layers={n_layers} entries")
    for i, name in enumerate(entries):
        if not isinstance(name, str) or name not in _KIND_OF_LAYER_TYPE:
            raise config_error(f"layer_types[{i}]", name, "must be one of " + ", ".join(_KIND_OF_LAYER_TYPE))
    rates = source.get("compress_rates", {})
    if not isinstance(rates, Mapping):
        raise config_error("compress_rates", rates, "must be a mapping from layer type to the tokens of an entry")
    ratio_of_kind = {LayerKind.WINDOW: 0}
    # Scalars are how the first transformers configs of V4 spelled the rates.
    for kind, default, scalar in (
        (LayerKind.CSA, 4, "compress_rate_csa"),
        (LayerKind.HCA, 128, "compress_rate_hca"),
    ):
        layer_type = _LAYER_TYPE_OF_KIND[kind]
        rate = source.get(scalar, rates.get(layer_type, default))
        ratio_of_kind[kind] = as_integer(f"compress_rates[{layer_type!r}]", rate, minimum=2)
    kinds = tuple(_KIND_OF_LAYER_TYPE[name] for name in entries)
    return kinds, tuple(ratio_of_kind[kind] for kind in kinds)


def read_hash_layers(source: Source, n_layers: int) -> int:
    """How many of the first layers are hash-routed, from `num_hash_layers` or transformers' `mlp_layer_types`."""
    native = source.get("num_hash_layers")
    saved = source.get("mlp_layer_types")
    if saved is None:
        count = as_integer("num_hash_layers", min(3, n_layers) if native is None else native, minimum=0)
        if count > n_layers:
            raise config_error("num_hash_layers", count, f"must be at most num_hidden_layers={n_layers}")
        return count
    entries = as_list("mlp_layer_types", saved)
    if len(entries) != n_layers:
        raise config_error("mlp_layer_types", entries, f"must have exactly num_hidden_layers={n_layers} entries")
    count = entries.count("hash_moe")
    if entries != ["hash_moe"] * count + ["moe"] * (n_layers - count):
        raise config_error(
            "mlp_layer_types", entries, "must be 'hash_moe' for the first layers and 'moe' for all others"
        )
    if native is not None and native != count:
        raise config_error("num_hash_layers", native, f"must be {count}, the number of 'hash_moe' in mlp_layer_types")
    return count
