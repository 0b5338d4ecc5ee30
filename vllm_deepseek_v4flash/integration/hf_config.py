"""A workaround: vLLM 0.32 cannot read a config.json that transformers saved again.

Its config class for model type `deepseek_v4` has DeepSeek's own keys only. transformers' base class rejects the
`mlp_layer_types` of a re-saved file, and `compress_ratios`, by which vLLM recognizes a V4 config, is absent. vLLM 0.33
has no class of its own and uses transformers', which reads both kinds; this file can go with vLLM 0.32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ..config import DeepseekV4Config

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


def native_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with DeepSeek's own keys in place of transformers'; a native config is returned as it is.

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


@functools.cache
def reader_for(config_class: Any) -> Any:
    """A subclass of the Hugging Face config class `config_class` whose `from_dict` also reads re-saved files.

    It returns instances of `config_class` itself, so nothing downstream can tell the difference, and they pickle to
    vLLM's other processes.
    """

    class ResavedConfigReader(config_class):
        @classmethod
        def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
            return config_class.from_dict(native_keys(config_dict), **kwargs)

    ResavedConfigReader.reads_resaved_configs = True
    return ResavedConfigReader
