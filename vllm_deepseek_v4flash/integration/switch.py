"""The environment variable that leaves vLLM as it is."""

from __future__ import annotations

import logging
import os

from ..log import logger_name

DISABLE_ENV = "VLLM_DEEPSEEK_V4FLASH_DISABLE"

logger = logging.getLogger(logger_name(__name__))


def is_disabled() -> bool:
    """Whether the variable asks for vLLM's own DeepSeek-V4; a value that is neither yes nor no counts as yes."""
    value = os.environ.get(DISABLE_ENV, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value not in ("1", "true", "yes", "on"):
        logger.warning("%s=%r: neither 0 nor 1, so the plugin is disabled. Set it to 0 or 1.", DISABLE_ENV, value)
    return True
