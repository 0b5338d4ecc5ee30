"""Registers the plugin in this vLLM process: model, quantization loader, attention backend, chat, config hook.

Everything is registered by name where vLLM allows it, so that this module imports neither torch nor the model.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from ..config import ARCHITECTURE, MODEL_TYPE
from ..kv_cache import BACKEND_NAME
from ..log import logger_name
from .in_tree import IN_TREE_ARCHITECTURE, keep_in_tree_class
from .refusals import check_engine_config, check_model_config, check_model_impl
from .rust_frontend import check_rust_frontend
from .serving import enable_thinking_budget, select_tokenizer_mode
from .switch import DISABLE_ENV
from .workarounds import (
    disable_mla_on_cpu,
    keep_paged_cache_on_cpu,
    turn_cuda_graphs_off_by_default,
    warm_up_pipeline_stages_on_cpu,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

MODEL_MODULE = "vllm_deepseek_v4flash.integration.registered_model"
BACKEND_PATH = "vllm_deepseek_v4flash.kv_cache.backend.DeepseekV4Backend"

GENERIC = "TransformersMoEForCausalLM"
"""vLLM's name for any mixture of experts that transformers' own code runs."""

# Marks our config hook: an isinstance check would miss one installed by an earlier import of this module.
_HOOK_MARK = "vllm_deepseek_v4flash_hook"

logger = logging.getLogger(logger_name(__name__))


def install() -> str:
    """Register everything in this process and return one line about it.

    Raises whatever the registration of the model raises; then nothing has been changed. A failure of any other step is
    logged with its consequence, and the rest is registered.
    """
    replaced = _register_model()
    done = [f"{ARCHITECTURE} (replacing vLLM's in-tree class)" if replaced else ARCHITECTURE]
    try:
        _register_quantization()
        done.append("quantization loader")
    except Exception as error:
        logger.warning(
            "vLLM's quantization registry has changed (%s): quantized DeepSeek-V4 checkpoints are refused.", error
        )
    try:
        _register_attention_backend()
        done.append("attention backend")
    except Exception as error:
        # The model's layers hand vLLM their backend class directly; the name serves listings only.
        logger.warning(
            "vLLM's attention backend registry has changed (%s): %s is missing from its listings.", error, BACKEND_NAME
        )
    try:
        _register_serving()
        done.append("chat encoding")
    except Exception as error:
        logger.warning(
            "vLLM's tokenizer, renderer or parser registry has changed (%s): vLLM encodes chats, and knows the "
            "reasoning modes of 0731 only.",
            error,
        )
    try:
        _install_config_reader()
    except Exception as error:
        logger.warning(
            "vLLM's config registry has changed (%s): a config.json saved again by transformers may not load; "
            "DeepSeek's own config.json does.",
            error,
        )
    try:
        _install_config_hook()
    except Exception as error:
        logger.warning(
            "vLLM's per-model config hook has moved (%s): options that are not supported for DeepSeek-V4 are not "
            "refused.",
            error,
        )
        disable_mla_on_cpu()
    listed = f"{', '.join(done[:-1])} and {done[-1]}" if len(done) > 1 else done[0]
    return f"Registered {listed}. Set {DISABLE_ENV}=1 to keep vLLM's."


def warn_about_version(supported: str) -> None:
    """Log a sentence if this vLLM is outside `supported`, a requirement such as "vllm>=0.32,<0.34"."""
    from vllm.version import __version__, __version_tuple__

    oldest, below = (tuple(map(int, bound)) for bound in re.findall(r"(\d+)\.(\d+)", supported))
    if not oldest <= tuple(__version_tuple__[:2]) < below:
        logger.warning(
            "vllm=%s: vllm-deepseek-v4flash has not been tested with this version and may fail where vLLM has changed. "
            "Install %s, or set %s=1 for vLLM's own model.",
            __version__, supported, DISABLE_ENV,
        )  # fmt: skip


def _register_model() -> bool:
    """Register the model class; True if it replaces one of vLLM's."""
    from vllm.model_executor.models.registry import ModelRegistry

    keep_in_tree_class(ModelRegistry.models, MODEL_MODULE)
    ModelRegistry.register_model(ARCHITECTURE, f"{MODEL_MODULE}:{ARCHITECTURE}")
    return IN_TREE_ARCHITECTURE in ModelRegistry.models


def _register_quantization() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config

    from .quantization import NAME, DeepseekV4QuantConfig

    try:
        known = get_quantization_config(NAME)
    except ValueError:
        known = None
    if known is not DeepseekV4QuantConfig:
        register_quantization_config(NAME)(DeepseekV4QuantConfig)


def _register_attention_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # vLLM raises on a second registration of a name, and the registry outlives a re-import of this package.
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)


def _register_serving() -> None:
    from . import serving

    serving.register()


def _install_config_reader() -> None:
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from .hf_config import Adapt, native_keys, reader_for, typed_values

    current: Any
    adapt: Adapt
    if MODEL_TYPE in _CONFIG_REGISTRY:
        current, adapt = _CONFIG_REGISTRY[MODEL_TYPE], native_keys
    else:  # vLLM 0.33 has no class of its own
        from transformers import DeepseekV4Config

        current, adapt = DeepseekV4Config, typed_values
    if not getattr(current, "reads_any_v4_config", False):
        _CONFIG_REGISTRY[MODEL_TYPE] = reader_for(current, adapt)


def _install_config_hook() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    original = MODELS_CONFIG_MAP.get(ARCHITECTURE, VerifyAndUpdateConfig)
    if getattr(original, _HOOK_MARK, False):
        return
    for name in ("verify_and_update_model_config", "verify_and_update_config"):
        if not callable(getattr(original, name, None)):
            raise AttributeError(f"{original.__name__}.{name} is missing")

    class DeepseekV4FlashConfigHook(original):  # type: ignore[misc,valid-type]
        """vLLM's hook for this architecture, preceded by the refusals, the workarounds and the chat encoding."""

        @staticmethod
        def verify_and_update_model_config(model_config: ModelConfig) -> None:
            check_model_config(model_config)
            select_tokenizer_mode(model_config)
            original.verify_and_update_model_config(model_config)
            keep_paged_cache_on_cpu(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            check_engine_config(vllm_config)
            check_rust_frontend(vllm_config)
            turn_cuda_graphs_off_by_default(vllm_config)
            warm_up_pipeline_stages_on_cpu(vllm_config)
            enable_thinking_budget(vllm_config)
            original.verify_and_update_config(vllm_config)

    setattr(DeepseekV4FlashConfigHook, _HOOK_MARK, True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = DeepseekV4FlashConfigHook
    _refuse_the_transformers_backend(MODELS_CONFIG_MAP, MODELS_CONFIG_MAP.get(GENERIC, VerifyAndUpdateConfig))


def _refuse_the_transformers_backend(hooks: dict[str, Any], original: Any) -> None:
    """`--model-impl transformers` gives the model another architecture, whose hook this one precedes."""

    class TransformersHook(original):
        @staticmethod
        def verify_and_update_model_config(model_config: ModelConfig) -> None:
            check_model_impl(model_config)
            original.verify_and_update_model_config(model_config)

    hooks[GENERIC] = TransformersHook
