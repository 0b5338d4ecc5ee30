"""What the serving side registers in vLLM, and how a model gets its tokenizer mode. Imports no vLLM at the top."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm_deepseek_v4flash.log import logger_name
from vllm_deepseek_v4flash.serving.generation import detect_generation
from vllm_deepseek_v4flash.serving.modes import Generation

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

MODES = {"deepseek_v4_april": Generation.APRIL, "deepseek_v4_0731": Generation.JULY}
# What vLLM turns `auto` into for this architecture, and the name under which its own encoding stays reachable.
VLLM_MODE = "deepseek_v4"
KEPT_MODE = "deepseek_v4_vllm"
PARSER = "deepseek_v4"

_PACKAGE = "vllm_deepseek_v4flash.serving"
_CLASSES = {Generation.APRIL: "AprilTokenizer", Generation.JULY: "JulyTokenizer"}

_registered = False

logger = logging.getLogger(logger_name(__name__))


def register() -> None:
    """Register the tokenizer modes, their renderer, and the parsers; may be called again."""
    global _registered
    from vllm.reasoning import ReasoningParserManager
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.tool_parsers import ToolParserManager

    tokenizers = {mode: (f"{_PACKAGE}.tokenizer", _CLASSES[generation]) for mode, generation in MODES.items()}
    tokenizers[KEPT_MODE] = TokenizerRegistry.tokenizers[VLLM_MODE]
    for mode, tokenizer in tokenizers.items():
        if mode not in TokenizerRegistry.tokenizers:
            TokenizerRegistry.register(mode, *tokenizer)
        if mode not in RENDERER_REGISTRY.renderers:
            # vLLM's renderer asks the tokenizer for the prompt.
            RENDERER_REGISTRY.register(mode, *RENDERER_REGISTRY.renderers[VLLM_MODE])
    for manager, name in ((ReasoningParserManager, "V4ReasoningParser"), (ToolParserManager, "V4ToolParser")):
        manager.register_lazy_module(PARSER, f"{_PACKAGE}.parsers", name)
    _registered = True


def select_tokenizer_mode(model_config: ModelConfig) -> None:
    """Give the model the encoding of its generation, unless its user chose a tokenizer mode; log which and why."""
    if model_config.skip_tokenizer_init or not _registered:
        return
    chosen = model_config.tokenizer_mode
    if chosen in MODES:
        logger.info("Chat encoding: DeepSeek-V4 %s, by --tokenizer-mode %s.", MODES[chosen].value, chosen)
        return
    if chosen != VLLM_MODE:
        logger.info("Chat encoding: that of --tokenizer-mode %s; reasoning modes are then its own affair.", chosen)
        return
    generation, reason = detect_generation(model_config.model, model_config.revision)
    mode = next(mode for mode, of in MODES.items() if of == (generation or Generation.APRIL))
    model_config.tokenizer_mode = mode
    if generation is None:
        logger.warning(
            "Chat encoding: DeepSeek-V4 april is assumed for %s, because %s. If the weights are of 0731, whose "
            "reasoning efforts have other texts, start with --tokenizer-mode deepseek_v4_0731.",
            model_config.model, reason,
        )  # fmt: skip
    else:
        logger.info(
            "Chat encoding: DeepSeek-V4 %s, because %s; --tokenizer-mode chooses another.", generation.value, reason
        )


def enable_thinking_budget(vllm_config: VllmConfig) -> None:
    """Let requests set `thinking_token_budget` without a flag: vLLM only needs to know the two tokens."""
    if vllm_config.reasoning_config is not None or vllm_config.model_config.tokenizer_mode not in MODES:
        return
    if vllm_config.model_config.skip_tokenizer_init:
        return
    from vllm.config.reasoning import ReasoningConfig

    from vllm_deepseek_v4flash.serving.encoding import END_THINK, THINK

    vllm_config.reasoning_config = ReasoningConfig(reasoning_start_str=THINK, reasoning_end_str=END_THINK)
