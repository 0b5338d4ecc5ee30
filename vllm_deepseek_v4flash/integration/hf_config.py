"""Workarounds: config.json files that the config class of a vLLM release does not read.

vLLM 0.32 has a class of its own for model type `deepseek_v4`, with DeepSeek's own keys only: a config.json that
transformers saved again has `mlp_layer_types`, which transformers' base class rejects, and no `compress_ratios`, by
which vLLM recognizes a V4 config.

vLLM 0.33 uses transformers' class, which reads both kinds but checks the Python type of every field: a whole number
where it declares a float, a null, or a compression ratio that it does not know ends in an error that gives neither the
file nor the fix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ..config import MODEL_TYPE, DeepseekV4Config
from ..config.source import config_error

# What transformers writes in place of compress_ratios, num_hash_layers, rope_scaling and qk_rope_head_dim.
_RESAVED_KEYS = (
    "layer_types",
    "mlp_layer_types",
    "compress_rates",
    "compress_rate_csa",
    "compress_rate_hca",
    "rope_parameters",
    "partial_rotary_factor",
)


def native_keys(values: Mapping[str, Any], config_class: Any = None) -> dict[str, Any]:
    """`values` with DeepSeek's own keys in place of transformers'; a native config is returned as it is.

    Args:
        values: a parsed config.json.
        config_class: not used; an `Adapt` has it.

    Raises:
        ValueError: from `DeepseekV4Config.from_hf`, for a re-saved config with an unsupported value.
    """
    if values.get("compress_ratios") is not None or values.get("layer_types") is None:
        return dict(values)
    config = DeepseekV4Config.from_dict(values)
    native = {key: value for key, value in values.items() if key not in _RESAVED_KEYS}
    scaling = config.rope_scaling
    native.update(
        compress_ratios=list(config.compress_ratios),
        num_hash_layers=config.num_hash_layers,
        qk_rope_head_dim=config.qk_rope_head_dim,
        rope_theta=config.rope_theta,
        compress_rope_theta=config.compress_rope_theta,
        rope_scaling=None
        if scaling is None
        else {
            "type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        },
    )
    return native


def typed_values(values: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """`values` in the types that transformers' `config_class` demands, checked by `DeepseekV4Config` first.

    A null is left out, because it means the same as an absent key. The vision variant is returned as it is.

    Raises:
        ValueError: from `DeepseekV4Config.from_hf`, for an unsupported value.
    """
    if values.get("vision_n_layers"):
        return dict(values)
    # vLLM has chosen this reader, perhaps by an --hf-overrides of the model type.
    config = DeepseekV4Config.from_dict({**values, "model_type": MODEL_TYPE})
    typed = {key: value for key, value in values.items() if value is not None}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in typed and isinstance(value, (int, float, tuple)):
            # A ratio of 1, which is a window layer too, has become 0: transformers does not know 1.
            typed[field.name] = list(value) if isinstance(value, tuple) else value
    floats = {field.name for field in dataclasses.fields(config_class) if field.type in (float, "float")}
    for name in floats & typed.keys():
        if isinstance(typed[name], int) and not isinstance(typed[name], bool):
            typed[name] = float(typed[name])
    return typed


Adapt = Callable[[Mapping[str, Any], Any], dict[str, Any]]
"""From a parsed config.json and a config class to keys and values that the class reads."""


@functools.cache
def reader_for(config_class: Any, adapt: Adapt = native_keys) -> Any:
    """A subclass of the Hugging Face config class `config_class` whose `from_dict` reads what `adapt` makes readable.

    It returns instances of `config_class` itself, so nothing downstream can tell the difference, and they pickle to
    vLLM's other processes.

    Raises (its `from_dict`):
        ValueError: for a value that `adapt` or `config_class` refuses, with the field and its value.
    """
    from huggingface_hub.errors import StrictDataclassError

    class V4ConfigReader(config_class):
        @classmethod
        def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
            try:
                return config_class.from_dict(adapt(config_dict, config_class), **kwargs)
            except StrictDataclassError as error:
                raise _refusal(config_dict, error) from error

    V4ConfigReader.reads_any_v4_config = True
    return V4ConfigReader


def _refusal(values: Mapping[str, Any], error: Exception) -> ValueError:
    """What transformers' strict class says about a field that `DeepseekV4Config` does not read, in our form."""
    why = " ".join(str(error.__cause__ or error).split())
    field = next((name for name in values if f"'{name}'" in str(error)), None)
    if field is None:
        return ValueError(f"config.json: refused by transformers ({why}). Correct it.")
    return config_error(field, values[field], f"refused by transformers ({why})")
