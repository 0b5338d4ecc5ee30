"""What every test gets: a fixed environment, its own seed, and poison in place of uninitialised memory."""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# torch, vLLM and Triton read these when they are imported; every process that a test starts inherits them.
DEFAULTS = {
    # Threads of two engines that spin on the same cores take ten times as long (testing/engine.py).
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Every checkpoint here is a local directory. Asking the hub could only hang.
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Without a GPU, Triton's interpreter runs the kernels.
    **({} if any(Path("/dev").glob("nvidia[0-9]*")) else {"TRITON_INTERPRET": "1"}),
}
for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
# tests/test_v2_runner.py runs these with the variables that they need.
collect_ignore = [] if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else ["v2_on_cpu"]

import pytest  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    from testing.interpreter import correct

    correct()


# The tests of these files share nothing: each starts its own pytest.
OWN_PYTEST = ("test_v2_runner.py", "test_compiled_kernels.py")
# Tests that take minutes start first, so that no worker is left with one when the others have finished.
LONGEST = (*OWN_PYTEST, "checks", "serving", "scheduler", "examples", "test_demo.py", "test_parity.py", "test_traps.py")
# The tests of each of these folders share a server, or the results of an engine.
SHARING = ("serving", "scheduler")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(_top(item.nodeid)) if _top(item.nodeid) in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers take whole files, or the folders of SHARING, whose fixtures start engines, in the order of LONGEST."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if _top(nodeid) in OWN_PYTEST:
                return nodeid
            return _top(nodeid) if _top(nodeid) in SHARING else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


def _top(nodeid: str) -> str:
    """The file or the folder directly below tests/ that a test belongs to."""
    return nodeid.partition("::")[0].removeprefix("tests/").partition("/")[0]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        reason = why_no_gpu()
        if reason is not None:
            pytest.skip(reason)


def why_no_gpu() -> str | None:
    """Why a test marked `gpu` cannot run here; None if it can."""
    import torch

    if torch.cuda.is_available():
        return None
    return f"needs a CUDA device, and torch {torch.__version__} sees none"


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Random numbers depend on the test only, not on the tests that ran before it."""
    seed_all(request.node.nodeid)


def seed_all(name: str) -> None:
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture(scope="session", autouse=True)
def _poison() -> Iterator[None]:
    """For the whole session: engines of module-scoped fixtures outlive a test. See testing/poison.py."""
    from testing.poison import poisoned_allocations

    with poisoned_allocations():
        yield
