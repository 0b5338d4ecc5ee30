"""Put this directory on PYTHONPATH and vLLM takes its V2 model runner, the one that GPU users get, on a plain CPU.

vLLM chooses V2 where Triton has a driver. On a CPU Triton has none, but its interpreter runs any kernel on CPU tensors:
so the interpreter is switched on and a driver is announced. Python imports this module at the start of every
process, the engine core and the workers included. The interpreter is slow: use small models.
"""

import os
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

# Triton reads TRITON_INTERPRET when it is imported.
from triton.backends import backends

# vLLM looks for an active driver and never calls it: every kernel goes through the interpreter.
_driver = types.SimpleNamespace(is_active=lambda: True)
backends.setdefault("cpu", types.SimpleNamespace(driver=_driver, compiler=None))

from testing.interpreter import correct  # noqa: E402

correct()
