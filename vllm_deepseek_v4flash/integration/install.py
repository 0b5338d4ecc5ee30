"""What `register` does inside vLLM: the model class, the other registries, the per-model config hook."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_deepseek_v4flash import DISABLE_ENV
from vllm_deepseek_v4flash.config import DeepseekV4Config, LayerKind
from vllm_deepseek_v4flash.integration.serving import enable_thinking_budget, select_tokenizer_mode
from vllm_deepseek_v4flash.log import logger_name

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

ARCHITECTURE = "DeepseekV4ForCausalLM"
MODEL_PATH = "vllm_deepseek_v4flash.model:DeepseekV4ForCausalLM"
BACKEND_NAME = "DEEPSEEK_V4FLASH"
BACKEND_PATH = "vllm_deepseek_v4flash.kv_cache.backend.DeepseekV4Backend"

# vLLM's vision wrapper builds its text model by the architecture name that we take over.  It must keep getting
# vLLM's own class (`build_in_tree_model`), which therefore stays reachable under this second name.
IN_TREE_ARCHITECTURE = "DeepseekV4ForCausalLM_vllm_in_tree"

_MLA_DISABLE_ENV = "VLLM_MLA_DISABLE"
_BREAKABLE_GRAPH_ENV = "VLLM_USE_BREAKABLE_CUDAGRAPH"
# Marks our config hook: an isinstance check would miss one installed by an earlier import of this module.
_HOOK_MARK = "vllm_deepseek_v4flash_hook"

logger = logging.getLogger(logger_name(__name__))


def install() -> str:
    """Register everything in this process and return one line about it.

    Raises whatever the model registration raises; then nothing else has been changed.  The attention backend's
    name and the config hook are conveniences with a fallback each, so a failure there is only logged.
    """
    _register_model()
    done = [f"{ARCHITECTURE} is served by {MODEL_PATH} instead of vLLM's in-tree class"]
    try:
        _register_quantization()
        done.append("its packed weights are read by this plugin")
    except Exception as error:
        logger.warning(
            "vLLM's quantisation registry has changed (%s): quantised DeepSeek-V4 checkpoints are refused.", error
        )
    try:
        _register_attention_backend()
        done.append(f"attention backend {BACKEND_NAME}")
    except Exception as error:
        # The model's layers hand vLLM their backend class directly; the name only serves listings.
        logger.warning("vLLM's attention-backend registry has changed (%s): %s is not in it.", error, BACKEND_NAME)
    try:
        _register_serving()
        done.append("its chats are encoded as its generation of weights was trained")
    except Exception as error:
        logger.warning(
            "vLLM's tokenizer, renderer or parser registry has changed (%s): chats are encoded by vLLM, which knows "
            "the reasoning modes of 0731 only.",
            error,
        )
    try:
        _install_config_reader()
    except Exception as error:
        logger.warning(
            "vLLM's config registry has changed (%s): a DeepSeek-V4 config.json saved again by transformers may not "
            "load; DeepSeek's own config.json does.",
            error,
        )
    try:
        _install_config_hook()
    except Exception as error:
        logger.warning(
            "vLLM's per-model config hook has moved (%s): options that DeepSeek-V4 does not serve are not refused.",
            error,
        )
        _disable_mla_on_cpu()
    return f"{', '.join(done)}; {DISABLE_ENV}=1 leaves vLLM's in place."


def _register_model() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    models = ModelRegistry.models
    current = models.get(ARCHITECTURE)
    if current is not None and getattr(current, "module_name", None) != MODEL_PATH.partition(":")[0]:
        models[IN_TREE_ARCHITECTURE] = current
    ModelRegistry.register_model(ARCHITECTURE, MODEL_PATH)


def _register_quantization() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config, register_quantization_config

    from vllm_deepseek_v4flash.integration.quantization import NAME, DeepseekV4QuantConfig

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
    from vllm_deepseek_v4flash.integration import serving as registration

    registration.register()


def _install_config_reader() -> None:
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_deepseek_v4flash.integration.hf_config import reader_for

    model_type = "deepseek_v4"
    if model_type not in _CONFIG_REGISTRY:
        return  # vLLM 0.33 reads it with transformers' class, which needs no help
    current = _CONFIG_REGISTRY[model_type]
    if not getattr(current, "reads_resaved_configs", False):
        _CONFIG_REGISTRY[model_type] = reader_for(current)


def build_in_tree_model(vllm_config: VllmConfig, prefix: str) -> nn.Module | None:
    """vLLM's own text model if `vllm_config` is the inside of its vision wrapper, else None.

    For `DeepseekV4ForCausalLM.__new__`: `DeepseekV4ForConditionalGeneration` stays with vLLM, but it resolves
    its language model through the model registry, under the name that this plugin has taken over.
    """
    model_config = vllm_config.model_config
    if not getattr(model_config.hf_config, "vision_n_layers", 0):
        return None
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.models.registry import ModelRegistry

    in_tree, _ = ModelRegistry.resolve_model_cls([IN_TREE_ARCHITECTURE], model_config)
    return initialize_model(vllm_config, prefix=prefix, model_class=in_tree)


def _install_config_hook() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    original = MODELS_CONFIG_MAP.get(ARCHITECTURE, VerifyAndUpdateConfig)
    if getattr(original, _HOOK_MARK, False):
        return
    for name in ("verify_and_update_model_config", "verify_and_update_config"):
        if not callable(getattr(original, name, None)):
            raise AttributeError(f"{original.__name__}.{name} is missing")

    class DeepseekV4FlashConfigHook(original):  # type: ignore[misc,valid-type]
        """vLLM's hook for this architecture, preceded by what our model needs and refuses."""

        @staticmethod
        def verify_and_update_model_config(model_config: ModelConfig) -> None:
            check_model_config(model_config)
            select_tokenizer_mode(model_config)
            original.verify_and_update_model_config(model_config)
            _use_paged_cache_on_cpu(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            check_engine_config(vllm_config)
            _leave_cuda_graphs_to_who_asks(vllm_config)
            _warm_up_pipeline_stages_on_a_cpu(vllm_config)
            enable_thinking_budget(vllm_config)
            original.verify_and_update_config(vllm_config)

    setattr(DeepseekV4FlashConfigHook, _HOOK_MARK, True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = DeepseekV4FlashConfigHook


def check_model_config(model_config: ModelConfig) -> None:
    """Refuse a checkpoint that cannot be served, before anything is loaded: ValueError with what to do."""
    from vllm_deepseek_v4flash.integration.quantization import CLAIMED, NAME

    DeepseekV4Config.from_hf(model_config.hf_config)
    method = model_config.quantization or _quant_method(model_config.hf_config)
    if method is not None and method not in (NAME, *CLAIMED):
        raise ValueError(
            f"quantization {method!r} of {model_config.model!r} is not read by vllm-deepseek-v4flash; allowed: "
            f"{', '.join(CLAIMED)}, or unquantised bfloat16, float16 and float32. Use such a checkpoint, or set "
            f"{DISABLE_ENV}=1 for vLLM's in-tree model."
        )


def _quant_method(hf_config: Any) -> str | None:
    """`quantization_config.quant_method` of a checkpoint, which may be a mapping, an object, or absent."""
    quantization = getattr(hf_config, "quantization_config", None)
    if not quantization:
        return None
    if isinstance(quantization, Mapping):
        method = quantization.get("quant_method", "unnamed")
    else:
        method = getattr(quantization, "quant_method", "unnamed")
    return str(getattr(method, "value", method))


def _leave_cuda_graphs_to_who_asks(vllm_config: VllmConfig) -> None:
    """Turn CUDA graphs off unless a mode was named, and say so: they have been tried on a CPU's imitation only."""
    from vllm.platforms import current_platform

    model_config = vllm_config.model_config
    # vLLM fills in its default later, so a mode that is there by now is the user's.
    asked = vllm_config.compilation_config.cudagraph_mode
    if current_platform.is_cpu() or model_config.enforce_eager:
        return
    if asked is None:
        model_config.enforce_eager = True
        logger.info(
            "CUDA graphs are off (as with --enforce-eager): none of this version's has run on a GPU yet. "
            "-cc.cudagraph_mode=FULL_AND_PIECEWISE turns them on, and `make gpu-check` compares their tokens."
        )
    elif asked:
        logger.info("CUDA graphs (%s) are on as asked; none of this version's has run on a GPU yet.", asked.name)


def _warm_up_pipeline_stages_on_a_cpu(vllm_config: VllmConfig) -> None:
    """Make vLLM's CPU worker do its warm-up run, in which a later stage makes the buffer that it receives into.

    It skips that run, and then fails at the first step, when no compilation is asked for; that is so for this
    architecture because vLLM turns on breakable CUDA graphs for it, which a CPU has no use for.
    """
    from vllm.platforms import current_platform

    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages == 1 or not current_platform.is_cpu():
        return
    if vllm_config.model_config.enforce_eager:
        raise ValueError(
            f"--pipeline-parallel-size {stages} on a CPU needs vLLM's warm-up run, which --enforce-eager turns off: "
            f"start without --enforce-eager."
        )
    # Not only where it is unset: an earlier engine of this process has set it to 1.
    os.environ[_BREAKABLE_GRAPH_ENV] = "0"


def check_engine_config(vllm_config: VllmConfig) -> None:
    """Refuse the options that this model does not implement: ValueError with the option, its value, the mend."""
    from vllm_deepseek_v4flash.integration.quantization import NAME

    speculative = vllm_config.speculative_config
    if speculative is not None:
        raise ValueError(
            f"--speculative-config (method {getattr(speculative, 'method', None)!r}) is not served yet with "
            f"DeepSeek-V4 by vllm-deepseek-v4flash, and vLLM's in-tree drafts cannot drive its model. Start "
            f"without --speculative-config, or set {DISABLE_ENV}=1 for vLLM's in-tree model."
        )
    method = vllm_config.model_config.quantization
    if method not in (None, NAME):
        raise ValueError(
            f"quantization {method!r} of {vllm_config.model_config.model!r} would be read by vLLM's own classes, which "
            f"do not fit vllm-deepseek-v4flash's model: start without --quantization, or set {DISABLE_ENV}=1 for "
            f"vLLM's in-tree model."
        )
    if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        raise ValueError(
            "--enable-prompt-embeds is not served with DeepSeek-V4: its hash-routed layers choose experts by token id, "
            "which embeddings do not have. Start without it and send text or token ids."
        )
    config = DeepseekV4Config.from_hf(vllm_config.model_config.hf_config)
    check_cache_options(config, vllm_config)
    check_parallelism(config, vllm_config.parallel_config)


def check_cache_options(config: DeepseekV4Config, vllm_config: VllmConfig) -> None:
    """Refuse row formats that do not exist, and keys of `--additional-config` that nobody reads: ValueError."""
    from vllm_deepseek_v4flash.kv_cache.formats import CacheFormats

    options = dict(vllm_config.additional_config or {})
    index_dtype = options.pop("index_cache_dtype", "auto")
    if options:
        raise ValueError(
            f"--additional-config has {', '.join(map(repr, options))}, which nothing reads; allowed: "
            f"'index_cache_dtype'. Remove the others, or mend their names."
        )
    CacheFormats.select(config, vllm_config.cache_config.cache_dtype, index_dtype, vllm_config.model_config.dtype)


def check_parallelism(config: DeepseekV4Config, parallel: ParallelConfig) -> None:
    """Refuse what cannot be divided over the ranks: ValueError with the option, its value, the mend."""
    for option, why in (
        ("decode_context_parallel_size", "its compressed entries cannot be sharded over tokens"),
        ("prefill_context_parallel_size", "its compressors read across the chunk boundaries"),
    ):
        size = getattr(parallel, option, 1) or 1
        if size > 1:
            raise ValueError(
                f"--{option.replace('_', '-')} {size} is not served with DeepSeek-V4 by vllm-deepseek-v4flash: "
                f"{why}. Use 1; tensor and pipeline parallelism work."
            )
    size = parallel.tensor_parallel_size
    experts = "n_routed_experts" if parallel.enable_expert_parallel else "moe_intermediate_size"
    for field in ("num_attention_heads", "o_groups", experts):
        if getattr(config, field) % size:
            raise ValueError(
                f"--tensor-parallel-size {size} does not divide {field}, {getattr(config, field)}: use a size that does"
            )
    check_pipeline_stages(config, parallel.pipeline_parallel_size)
    if parallel.data_parallel_size > 1 and parallel.enable_expert_parallel:
        raise ValueError(
            f"--data-parallel-size {parallel.data_parallel_size} with --enable-expert-parallel is not served with "
            f"DeepSeek-V4 by vllm-deepseek-v4flash: experts are sharded inside the tensor-parallel group only. "
            f"Drop one of the two options."
        )


def check_pipeline_stages(config: DeepseekV4Config, stages: int) -> None:
    """Refuse a pipeline with a stage that lacks a kind of layer: ValueError with the stage and the mend.

    vLLM plans the caches of all stages together, and its plan names caches that such a stage does not have.
    """
    from vllm.distributed.utils import get_pp_indices

    kinds = set(config.layer_kinds) - {LayerKind.WINDOW}
    for stage in range(stages):
        start, end = get_pp_indices(config.num_hidden_layers, stage, stages)
        lacking = sorted(kind.value.upper() for kind in kinds - set(config.layer_kinds[start:end]))
        if lacking:
            raise ValueError(
                f"--pipeline-parallel-size {stages}: stage {stage} has layers {start} to {end - 1}, none of them "
                f"{' or '.join(lacking)}, and vLLM cannot lay out the cache of such a stage. Use fewer stages, or set "
                f"VLLM_PP_LAYER_PARTITION so that each has every kind of compressed layer."
            )


def _use_paged_cache_on_cpu(model_config: ModelConfig) -> None:
    """Keep chunked prefill and prefix caching on a CPU, for this model only.

    vLLM's CPU platform turns both off for models with `use_mla`, because its own CPU MLA kernel supports
    neither.  Ours does; `VLLM_MLA_DISABLE` would say so as well, but for every model in the process.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    # An absent or renamed field raises, or leaves use_mla true: both end at the same fallback.
    with contextlib.suppress(AttributeError, TypeError):
        model_config.model_arch_config = dataclasses.replace(model_config.model_arch_config, is_deepseek_mla=False)
    if getattr(model_config, "use_mla", False):
        logger.warning("vLLM's ModelConfig.use_mla no longer follows model_arch_config.is_deepseek_mla.")
        _disable_mla_on_cpu()


def _disable_mla_on_cpu() -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and _MLA_DISABLE_ENV not in os.environ:
        os.environ[_MLA_DISABLE_ENV] = "1"
        logger.warning(
            "Set %s=1 so that chunked prefill and prefix caching stay on for DeepSeek-V4 on this CPU; it changes "
            "other MLA models in this process as well. Set it yourself to choose.",
            _MLA_DISABLE_ENV,
        )
