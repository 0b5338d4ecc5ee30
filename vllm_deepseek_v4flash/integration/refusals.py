"""Options and checkpoints that this model does not support: a ValueError before anything is loaded.

Every message reads `<option>=<value>: <why>. <what to do>.`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import BLOCK_TOKENS, MODEL_TYPE, DeepseekV4Config, LayerKind
from .speculation import check_speculation
from .switch import DISABLE_ENV

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig


OPS_ENV = "VLLM_DEEPSEEK_V4FLASH_OPS"
# Of those in vLLM 0.32 that implement `SupportsHMA` for other models than one's own.
HYBRID_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector", "NixlConnector", "MooncakeConnector")


def check_model_config(model_config: ModelConfig) -> None:
    """Refuse hyper-parameters and quantization methods that are not supported.

    Raises:
        ValueError: naming the config field or the method, its value and the fix.
    """
    from ..checkpoint.formats import is_supported, quant_methods
    from .quantization import NAME

    DeepseekV4Config.from_hf(model_config.hf_config)
    if model_config.runner_type != "generate" or model_config.convert_type != "none":
        raise ValueError(
            f"--runner={model_config.runner_type}: with --convert={model_config.convert_type} this would be a pooling "
            f"model, and DeepSeek-V4 generates text only. Start without --runner and --convert."
        )
    method = model_config.quantization or _quant_method(model_config.hf_config)
    if method is not None and method != NAME and not is_supported(method):
        raise ValueError(
            f"quantization={method!r}: vllm-deepseek-v4flash cannot read {model_config.model!r}; it supports "
            f"{', '.join(quant_methods())}, and unquantized bfloat16, float16 and float32. Use such a checkpoint, or "
            f"set {DISABLE_ENV}=1 for vLLM's in-tree model."
        )


def check_model_impl(model_config: ModelConfig) -> None:
    """Refuse transformers' implementation of this architecture.

    Raises:
        ValueError: naming the option, its value and the fix.
    """
    if getattr(model_config.hf_config, "model_type", None) == MODEL_TYPE:
        raise ValueError(
            f"--model-impl={model_config.model_impl}: vLLM's attention does not compute DeepSeek-V4's. Start without "
            f"it, or with --model-impl=vllm."
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


def check_engine_config(vllm_config: VllmConfig) -> None:
    """Refuse options that this model does not implement.

    Raises:
        ValueError: naming the option, its value and the fix; the tensors of an unquantised checkpoint that do not fit.
    """
    from .quantization import NAME, check_unquantised

    check_speculation(vllm_config)
    method = vllm_config.model_config.quantization
    if method not in (None, NAME):
        raise ValueError(
            f"--quantization={method!r}: vLLM's own classes would read {vllm_config.model_config.model!r}, and they "
            f"do not fit vllm-deepseek-v4flash's model. Start without --quantization, or set {DISABLE_ENV}=1 for "
            f"vLLM's in-tree model."
        )
    if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        raise ValueError(
            "--enable-prompt-embeds=True: DeepSeek-V4's hash-routed layers select experts by token id, which "
            "embeddings do not have. Start without it, and send text or token ids."
        )
    config = DeepseekV4Config.from_hf(vllm_config.model_config.hf_config)
    check_ineffective_options(config, vllm_config)
    check_hybrid_cache(vllm_config)
    check_load_format(str(vllm_config.load_config.load_format), packed=method is not None)
    check_cache_options(config, vllm_config)
    check_parallelism(config, vllm_config.parallel_config)
    if method is None:
        check_unquantised(config, vllm_config.model_config.model, str(vllm_config.load_config.load_format))


def check_ineffective_options(config: DeepseekV4Config, vllm_config: VllmConfig) -> None:
    """Refuse options that choose between implementations of vLLM's, which this model does not use.

    Raises:
        ValueError: naming the option, its value and the fix.
    """
    from ..kv_cache import BACKEND_NAME

    attention, kernels, cache = vllm_config.attention_config, vllm_config.kernel_config, vllm_config.cache_config
    backend = getattr(attention.backend, "name", attention.backend)
    for option, value, default, instead in (
        ("attention-backend", backend, (None, BACKEND_NAME), f"{OPS_ENV} chooses the kernels"),
        ("attention-config.backend_per_kind", attention.backend_per_kind, ({},), f"{OPS_ENV} chooses the kernels"),
        ("moe-backend", kernels.moe_backend, ("auto",), f"{OPS_ENV} chooses the kernels"),
        ("kv-cache-dtype-skip-layers", cache.kv_cache_dtype_skip_layers, ([],), "--kv-cache-dtype is for all layers"),
    ):
        if value not in default:
            raise ValueError(
                f"--{option}={value}: has no effect on vllm-deepseek-v4flash's model. Start without it; {instead}."
            )
    # vLLM uses blocks of 256 tokens on a CPU whatever is asked for.
    size, on_cpu = cache.block_size, vllm_config.device_config.device_type == "cpu"
    if cache.user_specified_block_size and (size % BLOCK_TOKENS if not on_cpu else size != BLOCK_TOKENS):
        raise ValueError(
            f"--block-size={size}: entries of {max(config.compress_ratios)} tokens and vLLM's prefix cache take blocks "
            f"of {BLOCK_TOKENS}. Start without --block-size."
        )


def check_hybrid_cache(vllm_config: VllmConfig) -> None:
    """Refuse what makes vLLM treat all caches alike; this model's have windows of several sizes.

    Raises:
        ValueError: naming the option, its value and the fix.
    """
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "--disable-hybrid-kv-cache-manager=True: DeepSeek-V4 has caches of several kinds, which only the hybrid "
            "manager keeps apart. Start without it."
        )
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if not KVConnectorFactory.supports_hma_config(transfer):
        raise ValueError(
            f"--kv-transfer-config.kv_connector={transfer.kv_connector!r}: it transfers one kind of cache, and "
            f"DeepSeek-V4 has several. Use a connector that supports vLLM's hybrid KV-cache manager (in vLLM 0.32 "
            f"{', '.join(HYBRID_CONNECTORS)}, and MultiConnector of these), or start without --kv-transfer-config."
        )


def check_load_format(load_format: str, *, packed: bool) -> None:
    """Refuse load formats that do not go through this model's loader, where the weights are packed.

    Raises:
        ValueError: naming the option, its value and the fix.
    """
    if packed and "sharded" in load_format:
        raise ValueError(
            f"--load-format={load_format}: not supported for packed weights, whose layout is found out from the "
            f"original files. Serve the checkpoint itself, without --load-format."
        )


def check_cache_options(config: DeepseekV4Config, vllm_config: VllmConfig) -> None:
    """Refuse row formats that do not exist, and unknown keys of `--additional-config`.

    Raises:
        ValueError: naming the option, its value and the fix.
    """
    from ..kv_cache.formats import CacheFormats

    options = dict(vllm_config.additional_config or {})
    index_dtype = options.pop("index_cache_dtype", "auto")
    if options:
        raise ValueError(
            f"--additional-config={options}: unknown keys; only 'index_cache_dtype' is supported. Remove them, or "
            f"correct their spelling."
        )
    CacheFormats.select(config, vllm_config.cache_config.cache_dtype, index_dtype, vllm_config.model_config.dtype)


def check_parallelism(config: DeepseekV4Config, parallel: ParallelConfig) -> None:
    """Refuse what cannot be divided over the ranks.

    Raises:
        ValueError: naming the option, its value and the fix.
    """
    for option, why in (
        ("decode_context_parallel_size", "compressed entries cannot be sharded over tokens"),
        ("prefill_context_parallel_size", "compressors read across chunk boundaries"),
    ):
        size = getattr(parallel, option, 1) or 1
        if size > 1:
            raise ValueError(
                f"--{option.replace('_', '-')}={size}: not supported for DeepSeek-V4 by vllm-deepseek-v4flash, whose "
                f"{why}. Use 1; tensor and pipeline parallelism are supported."
            )
    size = parallel.tensor_parallel_size
    experts = "n_routed_experts" if parallel.enable_expert_parallel else "moe_intermediate_size"
    for field in ("num_attention_heads", "o_groups", experts):
        if getattr(config, field) % size:
            raise ValueError(
                f"--tensor-parallel-size={size}: does not divide {field}={getattr(config, field)}. Use a size that "
                f"divides it."
            )
    check_pipeline_stages(config, parallel.pipeline_parallel_size)
    if parallel.data_parallel_size > 1 and parallel.enable_expert_parallel:
        raise ValueError(
            f"--data-parallel-size={parallel.data_parallel_size}: not supported together with "
            f"--enable-expert-parallel, because experts are sharded inside the tensor-parallel group only. Drop one of "
            f"the two options."
        )


def check_pipeline_stages(config: DeepseekV4Config, stages: int) -> None:
    """Refuse a pipeline in which a stage has no layer of some kind.

    vLLM plans the caches of all stages together, and its plan contains caches that such a stage does not have.

    Raises:
        ValueError: naming the stage, its layers and the fix.
    """
    from vllm.distributed.utils import get_pp_indices

    kinds = set(config.layer_kinds) - {LayerKind.WINDOW}
    for stage in range(stages):
        start, end = get_pp_indices(config.num_hidden_layers, stage, stages)
        missing = sorted(kind.value.upper() for kind in kinds - set(config.layer_kinds[start:end]))
        if missing:
            raise ValueError(
                f"--pipeline-parallel-size={stages}: stage {stage}, layers {start} to {end - 1}, has no "
                f"{' or '.join(missing)} layer, and vLLM cannot lay out the cache of such a stage. Use fewer stages, "
                f"or set VLLM_PP_LAYER_PARTITION so that each has every kind of compressed layer."
            )
