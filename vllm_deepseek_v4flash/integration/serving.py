"""Registers the chat encoding in vLLM, and chooses a model's tokenizer mode."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..log import logger_name
from ..serving.generation import detect_generation
from ..serving.modes import Generation
from .workarounds import accept_any_thinking_budget

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

MODES = {"deepseek_v4_april": Generation.APRIL, "deepseek_v4_0731": Generation.JULY}
# The mode that vLLM makes of `auto` for this architecture, and the name under which its own encoding stays available.
VLLM_MODE = "deepseek_v4"
KEPT_MODE = "deepseek_v4_vllm"
PARSER = "deepseek_v4"

_PACKAGE = "vllm_deepseek_v4flash.serving"
_CLASSES = {Generation.APRIL: "AprilTokenizer", Generation.JULY: "JulyTokenizer"}

_registered = False

logger = logging.getLogger(logger_name(__name__))


def register() -> None:
    """Register the tokenizer modes, their renderer and the parsers. Idempotent."""
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
            renderer = (
                (f"{_PACKAGE}.renderer", "V4Renderer") if mode in MODES else RENDERER_REGISTRY.renderers[VLLM_MODE]
            )
            RENDERER_REGISTRY.register(mode, *renderer)
    # These modules also install what belongs to the parser, in the processes that load it.
    ReasoningParserManager.register_lazy_module(PARSER, f"{__package__}.reasoning", "V4ReasoningParser")
    ToolParserManager.register_lazy_module(PARSER, f"{__package__}.tool_calls", "V4ToolParser")
    _registered = True


def select_tokenizer_mode(model_config: ModelConfig) -> None:
    """Select the chat encoding of the checkpoint's generation, unless the user chose one, and log the reason."""
    if model_config.skip_tokenizer_init or not _registered:
        return
    chosen = model_config.tokenizer_mode
    if chosen in MODES:
        logger.info("Chat encoding: DeepSeek-V4 %s, by --tokenizer-mode %s.", MODES[chosen].value, chosen)
        return
    if chosen != VLLM_MODE:
        logger.info("Chat encoding: that of --tokenizer-mode %s, which also defines the reasoning modes.", chosen)
        return
    generation, reason = detect_generation(model_config.model, model_config.revision)
    mode = next(mode for mode, of in MODES.items() if of == (generation or Generation.APRIL))
    model_config.tokenizer_mode = mode
    if generation is None:
        logger.warning(
            "Chat encoding: DeepSeek-V4 april, assumed for %s because %s. If its weights are 0731's, whose reasoning "
            "efforts use different texts, start with --tokenizer-mode deepseek_v4_0731.",
            model_config.model, reason,
        )  # fmt: skip
    else:
        logger.info(
            "Chat encoding: DeepSeek-V4 %s, because %s. --tokenizer-mode selects another.", generation.value, reason
        )


def enable_thinking_budget(vllm_config: VllmConfig) -> None:
    """Let requests set `thinking_token_budget` without a flag, by telling vLLM which tokens open and close thinking."""
    accept_any_thinking_budget()
    if vllm_config.reasoning_config is not None or vllm_config.model_config.tokenizer_mode not in MODES:
        return
    if vllm_config.model_config.skip_tokenizer_init:
        return
    from vllm.config.reasoning import ReasoningConfig

    from ..serving.encoding import END_THINK, THINK

    vllm_config.reasoning_config = ReasoningConfig(reasoning_start_str=THINK, reasoning_end_str=END_THINK)
