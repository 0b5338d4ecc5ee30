"""Where vLLM's behavior has to be changed for this model, one function each.

Each says what vLLM does, in which versions, and when the function can go. `hf_config.py` is one more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from typing import TYPE_CHECKING, Any

from ..log import logger_name

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig, VllmConfig

MLA_DISABLE_ENV = "VLLM_MLA_DISABLE"
BREAKABLE_GRAPH_ENV = "VLLM_USE_BREAKABLE_CUDAGRAPH"
# On a function of vLLM that has been replaced.
_MARK = "vllm_deepseek_v4flash_replaced"

logger = logging.getLogger(logger_name(__name__))


def turn_cuda_graphs_off_by_default(vllm_config: VllmConfig) -> None:
    """Turn CUDA graphs off unless the user chose a mode, and log either.

    vLLM 0.32 and 0.33 capture CUDA graphs by default. This model's capture has been tested in an emulation on a CPU
    only. Can go once `make gpu-check` has compared the tokens of captured and eager steps on a GPU.
    """
    from vllm.platforms import current_platform

    model_config = vllm_config.model_config
    # vLLM fills in its default later, so a mode that is set by now is the user's.
    chosen = vllm_config.compilation_config.cudagraph_mode
    if current_platform.is_cpu() or model_config.enforce_eager:
        return
    if chosen is None:
        model_config.enforce_eager = True
        logger.info(
            "CUDA graphs are off by default: capture has not been tested on a GPU in this release. "
            "-cc.cudagraph_mode=FULL_AND_PIECEWISE turns them on; `make gpu-check` compares their tokens."
        )
    elif chosen:
        logger.info("CUDA graphs (%s) are on: capture has not been tested on a GPU in this release.", chosen.name)


def warm_up_pipeline_stages_on_cpu(vllm_config: VllmConfig) -> None:
    """Make vLLM's CPU worker do its warm-up run, in which a later stage allocates the buffer that it receives into.

    vLLM 0.32 skips that run when nothing is compiled and the cache's size is given, and then fails at the first step.
    Nothing is compiled because vLLM turns on breakable CUDA graphs for this architecture, on a CPU too. Can go once the
    buffer is allocated without a warm-up run, or a CPU keeps breakable graphs off.

    Raises:
        ValueError: with --enforce-eager, which turns the run off as well.
    """
    from vllm.platforms import current_platform

    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages == 1 or not current_platform.is_cpu():
        return
    if vllm_config.model_config.enforce_eager:
        raise ValueError(
            f"--pipeline-parallel-size={stages}: pipeline stages on a CPU need vLLM's warm-up run, which "
            f"--enforce-eager turns off. Start without --enforce-eager."
        )
    # Overwritten even where it is set: an earlier engine of this process has set it to 1.
    os.environ[BREAKABLE_GRAPH_ENV] = "0"


def keep_seeded_requests_on_cpu() -> None:
    """Let a request with a seed have its prompt cut into several steps on a CPU; called where the model runs.

    The model runner of vLLM 0.32 and 0.33 samples a token after each part of a prompt and discards it. It then sets
    the request's generator back by `set_offset`, which only GPU generators have: on a CPU that ends the engine. Here
    such requests have no generator while a discarded token is sampled, so that theirs draw for tokens that count and
    for no others. Can go once the runner sets CPU generators back.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original = CPUModelRunner.sample_tokens
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators, discarded = self.input_batch.generators, self.discard_request_mask.np
        held = {row: generators.pop(row) for row in list(generators) if discarded[row]}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(held)

    setattr(sample_tokens, _MARK, True)
    CPUModelRunner.sample_tokens = sample_tokens


def end_failed_reload(model: nn.Module) -> None:
    """Put every weight that a failed `reload_weights` was about to replace back where it was.

    vLLM 0.32 and 0.33 take the parameters off their device while weights are reloaded. After an error they stay there,
    so that no later request can be computed; and what had arrived of a layer is counted again at the next reload,
    which then takes the layer for complete too early. Can go once vLLM does this itself.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)
            info.reset()
    layerwise.LOADING_LAYERS.clear()


def keep_paged_cache_on_cpu(model_config: ModelConfig) -> None:
    """Keep chunked prefill and prefix caching on a CPU, for this model only.

    The CPU platform of vLLM 0.32 and 0.33 turns both off for every model with `use_mla`, because its own MLA kernel for
    CPUs supports neither. This model's kernels do. `VLLM_MLA_DISABLE` would keep them on as well, but for every model
    in the process. Can go once that rule depends on the attention backend.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    # A field that is gone or renamed raises, or leaves use_mla true: both end at the same fallback.
    with contextlib.suppress(AttributeError, TypeError):
        model_config.model_arch_config = dataclasses.replace(model_config.model_arch_config, is_deepseek_mla=False)
    if getattr(model_config, "use_mla", False):
        logger.warning("vLLM's ModelConfig.use_mla no longer follows model_arch_config.is_deepseek_mla.")
        disable_mla_on_cpu()


def accept_any_thinking_budget() -> None:
    """Treat a `thinking_token_budget` above 32 bits as no budget, which is what it means in any context. Idempotent.

    vLLM 0.32 and 0.33 accept any integer: above 64 bits the request gets an HTTP 500, and above 32 bits the V2 model
    runner cannot store it. Can go once SamplingParams refuses such a budget.
    """
    from vllm import sampling_params

    original = sampling_params.validate_thinking_token_budget
    if hasattr(original, "accepts_any_budget"):
        return

    @functools.wraps(original)
    def validate(value: int | float | bool | None) -> int | None:
        budget = original(value)
        return None if budget is None or budget >= 2**31 else budget

    validate.accepts_any_budget = True  # type: ignore[attr-defined]
    sampling_params.validate_thinking_token_budget = validate


def disable_mla_on_cpu() -> None:
    """The same through `VLLM_MLA_DISABLE`, where the config hook or the field above has changed."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and MLA_DISABLE_ENV not in os.environ:
        os.environ[MLA_DISABLE_ENV] = "1"
        logger.warning(
            "Set %s=1 to keep chunked prefill and prefix caching for DeepSeek-V4 on this CPU. It applies to every MLA "
            "model in this process; set it to 0 or 1 yourself to choose.",
            MLA_DISABLE_ENV,
        )
