"""Rotary frequencies and their scaling, from either spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .source import Source, as_integer, as_positive, config_error


@dataclass(frozen=True)
class RopeScaling:
    """YaRN of the compressed layers. There is no mscale: cos, sin and the softmax scale stay as they are."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def read_rope_head_dim(source: Source, head_dim: int) -> int:
    """The rotated channels of a head, from `qk_rope_head_dim` or `partial_rotary_factor`."""
    explicit = source.get("qk_rope_head_dim")
    factor = source.get("partial_rotary_factor")
    if factor is not None and as_positive("partial_rotary_factor", factor) > 1:
        raise config_error("partial_rotary_factor", factor, "must be at most 1, the whole head")
    if explicit is not None:
        rope_dim = as_integer("qk_rope_head_dim", explicit)
        # transformers stores both, and truncates the product to an integer, which may lose one to rounding.
        if factor is not None and abs(factor * head_dim - rope_dim) > 1:
            raise config_error(
                "partial_rotary_factor", factor, f"must be qk_rope_head_dim / head_dim = {rope_dim} / {head_dim}"
            )
        return rope_dim
    return round(head_dim * (64 / 512 if factor is None else factor))


def read_rope(source: Source) -> tuple[float, float, RopeScaling | None]:
    """`rope_theta`, `compress_rope_theta` and the compressed layers' scaling."""
    # In transformers' class `rope_scaling` is an alias of `rope_parameters`; vLLM's copies one to the other.
    parameters = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise config_error("rope_parameters", parameters, "must be a mapping or null")
    main_theta = source.get("rope_theta", parameters.get("rope_theta") or 10000.0)
    compress_theta = source.get("compress_rope_theta", 160000.0)
    scaling, field = parameters, "rope_scaling"
    main, compress = parameters.get("main"), parameters.get("compress")
    if isinstance(main, Mapping) or isinstance(compress, Mapping):
        if not (isinstance(main, Mapping) and isinstance(compress, Mapping)):
            raise config_error("rope_parameters", dict(parameters), "must have both 'main' and 'compress', as mappings")
        if _rope_type(main) != "default":
            raise config_error(
                "rope_parameters['main'].rope_type", _rope_type(main), "must be 'default'; window layers never scale"
            )
        main_theta = main.get("rope_theta") or main_theta
        compress_theta = compress.get("rope_theta") or compress_theta
        scaling, field = compress, "rope_parameters['compress']"
    return (
        as_positive("rope_theta", main_theta),
        as_positive("compress_rope_theta", compress_theta),
        _read_scaling(scaling, field),
    )


def _rope_type(parameters: Mapping[str, Any]) -> Any:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _read_scaling(parameters: Mapping[str, Any], field: str) -> RopeScaling | None:
    rope_type = _rope_type(parameters)
    if rope_type == "default":
        if parameters.get("factor") not in (None, 1, 1.0):
            raise config_error(f"{field}.type", None, "must be 'yarn' where there is a factor")
        return None
    if rope_type != "yarn":
        raise config_error(f"{field}.type", rope_type, "must be 'yarn', 'default' or null (no scaling)")
    if parameters.get("attention_factor") not in (None, 1, 1.0):
        raise config_error(
            f"{field}.attention_factor", parameters["attention_factor"], "must be 1.0; V4 has no YaRN mscale"
        )
    if parameters.get("truncate") not in (None, True):
        raise config_error(f"{field}.truncate", parameters["truncate"], "must be true; V4 rounds the ramp outwards")
    beta_fast = as_positive(f"{field}.beta_fast", parameters.get("beta_fast") or 32)
    beta_slow = as_positive(f"{field}.beta_slow", parameters.get("beta_slow") or 1)
    if beta_fast <= beta_slow:
        raise config_error(f"{field}.beta_fast", beta_fast, f"must be more than beta_slow={beta_slow}")
    factor = as_positive(f"{field}.factor", parameters.get("factor"))
    if factor < 1:
        raise config_error(f"{field}.factor", factor, "must be a number >= 1")
    return RopeScaling(
        factor=factor,
        original_max_position_embeddings=as_integer(
            f"{field}.original_max_position_embeddings", parameters.get("original_max_position_embeddings")
        ),
        beta_fast=beta_fast,
        beta_slow=beta_slow,
    )
