"""What an op is, and which of its implementations runs."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

import vllm_deepseek_v4flash.ops as ops
from testing.logs import recorded
from vllm_deepseek_v4flash.log import warning_once
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.cuda import library
from vllm_deepseek_v4flash.ops.dispatch import OPS_ENV, backend_of, backends, describe, implementation, op, use, wrap
from vllm_deepseek_v4flash.ops.mhc_post_pre import mhc_post_pre
from vllm_deepseek_v4flash.ops.packed_experts import packed_experts
from vllm_deepseek_v4flash.ops.rms_norm import rms_norm
from vllm_deepseek_v4flash.ops.route import route
from vllm_deepseek_v4flash.ops.swiglu import swiglu

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
PACKAGE = Path(ops.__file__).parent
OPS = {each.__name__: each for each in dispatch.ops()}
BACKENDS = ("cpu", "cuda", "torch", "triton")


@pytest.fixture(autouse=True)
def _automatic_choice(monkeypatch):
    """Nothing found before the test, nor found by it, is kept."""
    monkeypatch.delenv(OPS_ENV, raising=False)
    with use("auto"):
        yield


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.delitem(dispatch.KERNELS, "cpu")


@pytest.fixture(params=[True, False], ids=["built", "not-built"])
def built(request, monkeypatch):
    """Whether the kernels of csrc/ were compiled when the package was installed."""
    monkeypatch.setitem(dispatch.KERNELS, "cuda", ("cuda", "triton") if request.param else ("triton",))
    monkeypatch.setattr(dispatch, "failure", lambda: None)
    return request.param


def test_every_op_is_the_only_one_of_its_file():
    assert len(OPS) >= 17
    for name, each in OPS.items():
        assert each.__module__ == f"{ops.__name__}.{name}"
        assert each.reference.__module__ == each.__module__
        assert inspect.getdoc(each)


@pytest.mark.parametrize("backend", BACKENDS)
def test_implementations_have_the_parameters_of_the_op(backend):
    """Read from their source, because a backend's modules cannot be imported everywhere."""
    found = 0
    for name, each in OPS.items():
        path = PACKAGE / backend / f"{name}.py"
        if not path.is_file():
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                found += 1
                parameters = inspect.signature(each).parameters.values()
                assert [a.arg for a in node.args.args + node.args.kwonlyargs] == [p.name for p in parameters]
                defaults = [ast.literal_eval(d) for d in node.args.kw_defaults if d is not None]
                assert defaults == [p.default for p in parameters if p.default is not p.empty]
    assert found >= (1 if backend == "cuda" else 5)


@pytest.mark.parametrize("name", OPS)
def test_references_call_references_only(name):
    """On a GPU an op within a reference would be one of the kernels that it is the oracle of."""
    tree = ast.parse(Path(inspect.getfile(OPS[name].reference)).read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & OPS.keys()


def test_an_op_is_its_reference_with_checks():
    with use("reference"):
        x = torch.randn(2, 8)
        assert torch.equal(rms_norm(x, None, 1e-6), rms_norm.reference(x, None, 1e-6))
        with pytest.raises(ValueError, match="weight must have shape"):
            rms_norm(x, torch.ones(7), 1e-6)
    assert inspect.signature(route) == inspect.signature(route.reference)
    with pytest.raises(TypeError, match=r"rms_norm\(\) missing 1 required positional argument: 'eps'"):
        rms_norm(x, None)  # type: ignore[call-arg]


def test_a_check_has_parameters_of_its_op():
    with pytest.raises(TypeError, match="the check of swiglu has parameters that the op does not have: gate, weight"):
        op(lambda gate, weight: None)(swiglu.reference)


def test_defaults_are_those_of_the_reference():
    given = []
    with wrap(lambda name, function: lambda *arguments, **options: given.append(options)):
        route(torch.zeros(1, 4), 2, bias=None, expert_ids=None, scaling=1.0)
        route(torch.zeros(1, 4), 2, bias=None, expert_ids=None, scaling=1.0, shared=True)
    assert [options["renormalize"] for options in given] == [True, True]
    assert [options["shared"] for options in given] == [False, True]


def test_a_cpu_runs_numba_and_pytorch():
    assert backends("cpu") == ("cpu", "torch", "reference")
    assert implementation(rms_norm, CPU).__module__.endswith("ops.cpu.rms_norm")
    assert implementation(packed_experts, CPU).__module__.endswith("ops.torch.packed_experts")
    line = describe(CPU)
    assert line.startswith("ops on cpu: cpu (compress, ")
    assert line.endswith("; torch (packed_experts, packed_linear, rope_table)")


@pytest.mark.usefixtures("without_numba")
def test_a_cpu_without_numba_runs_references_and_the_log_says_why():
    assert implementation(rms_norm, CPU) is rms_norm.reference
    assert backend_of(packed_experts, CPU) == "torch"
    line = describe(CPU)
    assert line.startswith("ops on cpu: torch (grouped_linear, ")
    assert "; reference (compress, " in line
    assert line.endswith("; no cpu kernels: Numba is not installed")


def test_a_gpu_runs_no_reference(built):
    line = describe(CUDA)
    assert "reference" not in line
    assert "; torch (grouped_linear, linear_fp32, " in line
    assert "triton (compress, " in line
    assert ("cuda (packed_experts)" in line) == built
    assert line.endswith("; no cuda kernels: csrc/ was not compiled, because the installation found no nvcc") != built


def test_any_other_device_runs_pytorch():
    assert backends("meta") == ("torch", "reference")
    assert implementation(rms_norm, META) is rms_norm.reference


def test_prepare_imports_every_implementation():
    seen = []

    def see(name, function):
        seen.append(name)
        return function

    with wrap(see):
        dispatch.prepare(CPU)
        assert sorted(seen) == sorted(OPS)
        rms_norm(torch.zeros(1, 8), None, 1e-6)
    assert len(seen) == len(OPS)


@pytest.fixture
def made_up_backend(monkeypatch, tmp_path):
    """A backend `made_up` for the CPU that implements rms_norm and nothing else."""
    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rms_norm.py").write_text("def rms_norm(x, weight, eps):\n    return 'made up'\n")
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    monkeypatch.setitem(dispatch.KERNELS, "cpu", ("made_up",))
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.startswith(f"{ops.__name__}.made_up")]:
        del sys.modules[name]
    vars(ops).pop("made_up", None)


@pytest.mark.usefixtures("made_up_backend")
def test_a_backend_runs_the_ops_that_it_has():
    assert rms_norm(torch.zeros(1, 2), None, 1e-6) == "made up"
    assert implementation(swiglu, CPU) is swiglu.reference
    assert implementation(rms_norm, META) is rms_norm.reference
    line = describe(CPU)
    assert line.startswith("ops on cpu: made_up (rms_norm); torch (")
    assert "; reference (compress, " in line


def test_use_chooses_while_its_block_runs():
    with use("reference"):
        assert implementation(rms_norm, CPU) is rms_norm.reference
        with use("cpu"):
            assert backend_of(rms_norm, CPU) == "cpu"
        assert implementation(rms_norm, CPU) is rms_norm.reference
        with pytest.raises(ZeroDivisionError), use("cpu"):
            _ = 1 / 0
        assert implementation(rms_norm, CPU) is rms_norm.reference
    assert backend_of(rms_norm, CPU) == "cpu"


def test_some_ops_can_run_their_references():
    with use("auto", reference=(swiglu,)):
        assert implementation(swiglu, CPU) is swiglu.reference
        assert backend_of(swiglu, CUDA) == "reference"
        assert backend_of(rms_norm, CPU) == "cpu"
        with use("auto"):
            assert backend_of(swiglu, CPU) == "cpu"


def test_wrappers_replace_implementations_from_the_outside_in():
    x = torch.zeros(1, 8)
    with use("reference"), wrap(lambda name, function: lambda *arguments: name):
        assert rms_norm(x, None, 1e-6) == "rms_norm"
        with wrap(lambda name, function: lambda *arguments: f"{function(*arguments)}!"):
            assert rms_norm(x, None, 1e-6) == "rms_norm!"
        with use("cpu"):
            assert rms_norm(x, None, 1e-6) == "rms_norm"
    assert isinstance(rms_norm(x, None, 1e-6), torch.Tensor)


def test_the_environment_chooses_for_the_process(monkeypatch):
    monkeypatch.setattr(dispatch, "_selection", dispatch._Selection())
    assert backends("cpu") == ("cpu", "torch", "reference")
    monkeypatch.setenv(OPS_ENV, "reference")
    assert backends("cuda") == backends("cpu") == ("reference",)
    with use("torch"):
        assert backends("cuda") == ("torch", "reference")
    monkeypatch.setenv(OPS_ENV, "cutlass")
    with pytest.raises(ValueError, match=f"{OPS_ENV}='cutlass': unknown. Use one of auto, reference, cpu, triton, "):
        backends("cuda")


def test_an_unknown_choice_is_refused_at_once():
    with pytest.raises(ValueError, match="'cutlass': unknown"), use("cutlass"):
        pytest.fail("the block runs")


def test_numba_can_be_chosen_for_a_cpu_only(monkeypatch):
    with use("cpu"):
        assert backends("cpu") == ("cpu", "torch", "reference")
        with pytest.raises(ValueError, match="OPS=cpu: the kernels need a CPU and Numba; this device is cuda"):
            backends("cuda")
        monkeypatch.delitem(dispatch.KERNELS, "cpu")
        with pytest.raises(ValueError, match="OPS=cpu: the kernels need a CPU and Numba; Numba is not installed"):
            backends("cpu")


def test_the_kernels_of_csrc_can_be_chosen_where_they_were_compiled(built):
    with use("cuda"):
        if built:
            assert backends("cuda") == ("cuda", "triton", "torch", "reference")
        else:
            with pytest.raises(ValueError, match="the kernels need a GPU and csrc/, compiled; csrc/ was not compiled"):
                backends("cuda")
        with pytest.raises(ValueError, match=r"OPS=cuda: the kernels need .*; this device is cpu"):
            backends("cpu")


def test_kernels_of_csrc_that_cannot_run_here_are_replaced_and_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(dispatch.KERNELS, "cuda", ("cuda", "triton"))
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "kernels.so")
    (tmp_path / "kernels.so").write_text("no library")
    library.library.cache_clear()
    library.failure.cache_clear()
    warning_once.cache_clear()
    with recorded(dispatch.logger.name) as said:
        assert backends("cuda") == ("triton", "torch", "reference")
    (line,) = said.lines
    assert "cannot run here, and Triton's run instead" in line
    with use("cuda"), pytest.raises(ValueError, match=r"OPS=cuda: the kernels need .*; they cannot run here"):
        backends("cuda")
    library.library.cache_clear()
    library.failure.cache_clear()


def test_triton_can_be_chosen_for_a_cpu_with_its_interpreter(monkeypatch):
    with use("triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert backends("cpu") == backends("cuda") == ("triton", "torch", "reference")
        assert backend_of(mhc_post_pre, CPU) == "triton"
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match="or set TRITON_INTERPRET=1 before Python starts"):
            backends("cpu")


def test_an_installation_with_nvcc_has_the_kernels_of_csrc():
    """They load on a machine without a GPU, with any PyTorch."""
    if not library.built():
        pytest.skip("installed without nvcc")
    assert library.library().deepseek_v4flash_abi() == library.ABI


def test_kernels_of_other_sources_are_refused(monkeypatch):
    if not library.built():
        pytest.skip("installed without nvcc")
    monkeypatch.setattr(library, "ABI", library.ABI + 1)
    with pytest.raises(RuntimeError, match=r"compiled from other sources .*install the package again"):
        library.load(library.LIBRARY)
