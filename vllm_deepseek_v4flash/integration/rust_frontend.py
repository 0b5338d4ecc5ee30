"""vLLM's Rust front end, which encodes chats and parses replies without Python, and so without this plugin.

`VLLM_USE_RUST_FRONTEND=1 vllm serve` starts it in place of the API server. It encodes every DeepSeek-V4 chat as 0731's
weights were trained, and knows neither our tokenizer modes nor our parsers and middlewares.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..log import logger_name
from ..serving.generation import ENCODER, detect_generation
from ..serving.modes import Generation
from .serving import KEPT_MODE, MODES, VLLM_MODE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ENV = "VLLM_USE_RUST_FRONTEND"
# `vllm serve` gives this rank to the configuration of a process that starts front ends and is none itself.
STARTS_FRONT_ENDS = -1

logger = logging.getLogger(logger_name(__name__))


def check_rust_frontend(vllm_config: VllmConfig) -> None:
    """Refuse the Rust front end where its chat encoding is not the checkpoint's; elsewhere warn about what it lacks.

    Raises:
        ValueError: for weights that are not 0731's, or a tokenizer mode that only this plugin knows.
    """
    from vllm import envs

    if not envs.VLLM_USE_RUST_FRONTEND or vllm_config.parallel_config._api_process_rank != STARTS_FRONT_ENDS:
        return
    model_config = vllm_config.model_config
    mode = model_config.tokenizer_mode
    generation, reason = detect_generation(model_config.model, model_config.revision)
    if mode == KEPT_MODE or (mode in MODES and MODES[mode] is not (generation or Generation.APRIL)):
        raise ValueError(
            f"--tokenizer-mode={mode}: vLLM's Rust front end ({ENV}=1) does not know this mode. Set {ENV}=0, or start "
            f"without --tokenizer-mode on a checkpoint whose {ENCODER} is 0731's."
        )
    if mode not in MODES and mode != VLLM_MODE:
        return  # the user's choice, which the Rust front end follows
    if generation is not Generation.JULY:
        assumed = "" if generation else " assumed to be"
        raise ValueError(
            f"{ENV}=1: vLLM's Rust front end encodes every DeepSeek-V4 chat with the reasoning efforts of 0731, and "
            f"the weights of {model_config.model!r} are{assumed} April's, because {reason}: they would think as in "
            f"their max mode by default, and max would be a text that they have never seen. Set {ENV}=0."
        )
    logger.warning(
        "%s=1: vLLM's Rust front end encodes chats and parses replies without this plugin. The reasoning efforts are "
        "the same for these weights. Different are: replies that vLLM's parsers misread, the role developer, content "
        "in several text parts, and messages that end with an answer; --middleware is refused (docs/serving.md, "
        "\"vLLM's Rust front end\"). %s=0 starts the Python server.",
        ENV, ENV,
    )  # fmt: skip
