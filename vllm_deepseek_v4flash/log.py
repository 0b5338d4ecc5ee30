"""How the package logs: logger names that vLLM prints, lines that appear once, lines from before vLLM logs."""

from __future__ import annotations

import functools
import logging
import os
import sys


def logger_name(module: str) -> str:
    """The logger's name for a module of this package: below `vllm.`, the only names vLLM's configuration prints."""
    return "vllm." + module.removeprefix("vllm_")


@functools.cache
def info_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Log at INFO the first time this process passes this message with these (hashable) arguments."""
    logger.info(message, *args, stacklevel=2)


@functools.cache
def warning_once(logger: logging.Logger, message: str, *args: object) -> None:
    """Log at WARNING the first time this process passes this message with these (hashable) arguments."""
    logger.warning(message, *args, stacklevel=2)


def info_at_startup(logger: logging.Logger, message: str) -> None:
    """Log at INFO, even where vLLM loads its plugins before it configures logging.

    The API server and `LLM()` do; without a handler of its own the line would be dropped there. It goes to stderr,
    and is suppressed where the user's settings suppress vLLM's own INFO lines.
    """
    level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    if logger.hasHandlers() or level not in ("DEBUG", "INFO") or os.environ.get("VLLM_CONFIGURE_LOGGING") == "0":
        logger.info(message, stacklevel=2)
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(filename)s] %(message)s", "%m-%d %H:%M:%S"))
    old_level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        logger.info(message, stacklevel=2)
    finally:
        logger.setLevel(old_level)
        logger.removeHandler(handler)
