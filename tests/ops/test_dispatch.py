"""The choice of an implementation, and that every op has one."""

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

import vllm_deepseek_v4flash.ops as ops
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.cuda import library

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


def test_without_a_backend_the_reference_runs(monkeypatch):
    assert dispatch.implementation("rms_norm", torch.device("meta")).__module__.endswith("ops.reference.rms_norm")
    monkeypatch.delitem(dispatch.BACKENDS, "cpu")  # as where numba is missing
    dispatch._resolve.cache_clear()
    assert dispatch.implementation("rms_norm", CPU).__module__.endswith("ops.reference.rms_norm")
    dispatch._resolve.cache_clear()


def test_a_cpu_takes_the_numba_twins():
    assert dispatch.implementation("rms_norm", CPU).__module__.endswith("ops.cpu.rms_norm")
    assert "cpu (compress, " in dispatch.describe(CPU)


def test_prepare_imports_every_implementation():
    dispatch._resolve.cache_clear()
    dispatch.prepare(CPU)
    assert dispatch._resolve.cache_info().currsize == len(OPS)


@pytest.mark.usefixtures("made_up_backend")
def test_a_backend_serves_the_ops_it_has_and_the_reference_the_others():
    from vllm_deepseek_v4flash.ops.rms_norm import rms_norm

    assert rms_norm(torch.zeros(1, 2), None, 1e-6) == "made up"
    assert dispatch.implementation("swiglu", CPU).__module__.endswith("ops.reference.swiglu")
    assert dispatch.implementation("rms_norm", torch.device("meta")).__module__.endswith("ops.reference.rms_norm")


@pytest.mark.usefixtures("made_up_backend")
def test_the_choice_is_described():
    line = dispatch.describe(CPU)
    assert line.startswith("ops on cpu: reference (apply_rope, ")
    assert line.endswith("; made_up (rms_norm)")


def test_a_gpu_takes_the_triton_twins():
    function = dispatch.implementation("qnorm_rope_kv_insert", torch.device("cuda"))
    assert function.__module__.endswith("ops.triton.qnorm_rope_kv_insert")


def choose(monkeypatch, choice, interpret="1"):
    monkeypatch.setenv(dispatch.OPS_ENV, choice)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)


def test_numba_can_be_chosen_for_a_cpu_only(monkeypatch):
    choose(monkeypatch, "cpu")
    assert dispatch.backends("cpu") == ("cpu", "reference")
    with pytest.raises(ValueError, match="needs a CPU and the package numba, which vLLM installs; this is cuda"):
        dispatch.backends("cuda")
    monkeypatch.delitem(dispatch.BACKENDS, "cpu")
    with pytest.raises(ValueError, match="this is cpu without numba"):
        dispatch.backends("cpu")


@pytest.mark.parametrize("built", [True, False])
def test_the_kernels_of_csrc_are_taken_where_they_are(monkeypatch, built):
    monkeypatch.setattr(dispatch, "built", lambda: built)
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", ("cuda", "triton") if built else ("triton",))
    dispatch._resolve.cache_clear()
    line = dispatch.describe(torch.device("cuda"))
    assert ("cuda (packed_experts)" in line) == built
    assert line.endswith("csrc/ was not compiled for want of nvcc") != built
    choose(monkeypatch, "cuda")
    if built:
        assert dispatch.backends("cuda") == ("cuda", "triton", "reference")
    else:
        with pytest.raises(ValueError, match="this is cuda without them"):
            dispatch.backends("cuda")
    with pytest.raises(ValueError, match=r"OPS=cuda needs a GPU and the kernels of csrc/.*; this is cpu"):
        dispatch.backends("cpu")
    dispatch._resolve.cache_clear()


def test_an_installation_with_nvcc_has_the_kernels_of_csrc():
    """They load on a machine without a GPU, whatever its PyTorch."""
    if not library.built():
        pytest.skip("installed without nvcc")
    assert library.library().deepseek_v4flash_abi() == library.ABI


def test_kernels_of_other_sources_are_refused(monkeypatch):
    if not library.built():
        pytest.skip("installed without nvcc")
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(RuntimeError, match=r"compiled from other sources .*install the package again"):
        library.load(library.LIBRARY)


def test_reference_can_be_chosen_for_a_gpu(monkeypatch):
    choose(monkeypatch, "reference")
    assert dispatch.backends("cuda") == ("reference",)


def test_triton_can_be_chosen_for_a_cpu_with_its_interpreter(monkeypatch):
    choose(monkeypatch, "triton")
    assert dispatch.backends("cpu") == ("triton", "reference")
    choose(monkeypatch, "triton", interpret="0")
    with pytest.raises(ValueError, match="needs TRITON_INTERPRET=1 on a CPU"):
        dispatch.backends("cpu")


def test_an_unknown_choice_is_named(monkeypatch):
    choose(monkeypatch, "cutlass")
    with pytest.raises(ValueError, match="'cutlass' is not known; allowed: auto, reference, cpu, triton, cuda"):
        dispatch.backends("cuda")


def test_an_op_without_implementation_is_named():
    with pytest.raises(LookupError, match="no_such_op"):
        dispatch.implementation("no_such_op", CPU)
