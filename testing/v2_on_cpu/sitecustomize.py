"""With this directory on PYTHONPATH, vLLM uses its V2 model runner, which GPU users get, on a plain CPU.

vLLM chooses V2 if Triton has a driver. On a CPU Triton has none, but its interpreter runs any kernel on CPU tensors, so
this module switches the interpreter on and registers a driver. Python imports it at the start of every process,
including the engine core and the workers. The interpreter is slow: use small models.
"""

import os
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

# Triton reads TRITON_INTERPRET when it is imported.
from triton.backends import backends

# vLLM asks for an active driver and never calls it: the interpreter runs every kernel.
_driver = types.SimpleNamespace(is_active=lambda: True)
backends.setdefault("cpu", types.SimpleNamespace(driver=_driver, compiler=None))

from testing.interpreter import correct  # noqa: E402

correct()
