"""The choice of an implementation, and that every op has one."""

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

import vllm_deepseek_v4flash.ops as ops
from vllm_deepseek_v4flash.ops import dispatch

CPU = torch.device("cpu")
PACKAGE = Path(ops.__file__).parent
OPS = sorted(path.stem for path in (PACKAGE / "reference").glob("*.py") if path.stem != "__init__")


@pytest.fixture
def made_up_backend(monkeypatch, tmp_path):
    """A backend `made_up` for the CPU that implements rms_norm and nothing else."""
    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rms_norm.py").write_text("def rms_norm(x, weight, eps):\n    return 'made up'\n")
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", ("made_up",))
    dispatch._resolve.cache_clear()
    importlib.invalidate_caches()
    yield
    dispatch._resolve.cache_clear()
    for name in [name for name in sys.modules if name.startswith(f"{ops.__name__}.made_up")]:
        del sys.modules[name]
    vars(ops).pop("made_up", None)


def test_there_are_references():
    assert len(OPS) >= 12


@pytest.mark.parametrize("op", OPS)
def test_reference_has_the_parameters_of_the_public_op(op):
    public = getattr(importlib.import_module(f"{ops.__name__}.{op}"), op)
    reference = getattr(importlib.import_module(f"{ops.__name__}.reference.{op}"), op)
    assert list(inspect.signature(reference).parameters) == list(inspect.signature(public).parameters)
    assert inspect.getdoc(public)


def test_without_a_backend_the_reference_runs():
    for device_type in ("cpu", "meta"):
        function = dispatch.implementation("rms_norm", torch.device(device_type))
        assert function.__module__.endswith("ops.reference.rms_norm")


@pytest.mark.usefixtures("made_up_backend")
def test_a_backend_serves_the_ops_it_has_and_the_reference_the_others():
    from vllm_deepseek_v4flash.ops.rms_norm import rms_norm

    assert rms_norm(torch.zeros(1, 2), None, 1e-6) == "made up"
    assert dispatch.implementation("swiglu", CPU).__module__.endswith("ops.reference.swiglu")
    assert dispatch.implementation("rms_norm", torch.device("meta")).__module__.endswith("ops.reference.rms_norm")


@pytest.mark.usefixtures("made_up_backend")
def test_the_choice_is_logged_once(monkeypatch):
    # vLLM's loggers do not propagate, so the log is taken where it is written.
    messages = []
    monkeypatch.setattr(dispatch.logger, "debug", lambda message, *values: messages.append(message % values))
    for _ in range(3):
        dispatch.implementation("rms_norm", CPU)
    assert messages == ["rms_norm on cpu: made_up"]


def test_an_op_without_implementation_is_named():
    with pytest.raises(LookupError, match="no_such_op"):
        dispatch.implementation("no_such_op", CPU)
