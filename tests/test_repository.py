"""The repository as a whole: the size of its binaries, the archive that keeps them small, its one version."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import vllm_deepseek_v4flash
from testing.fixtures import ARCHIVE

ROOT = Path(__file__).resolve().parent.parent
MOST_BINARY_BYTES = 20_000_000
_SNIFFED = 8000  # git's own rule: a NUL among the first 8000 bytes makes a file binary


def tracked_files() -> list[Path]:
    """The files that git tracks; symbolic links, which are a path's bytes, are not among them."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(_SNIFFED)


def test_tracked_binaries_stay_within_their_budget() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked_files() if is_binary(path)}
    assert {"testing/data/checkpoints.tar.xz", "examples/toy/model-00001-of-00002.safetensors"} <= sizes.keys()
    assert sum(sizes.values()) < MOST_BINARY_BYTES, sizes


def test_processes_that_unpack_at_once_share_one_copy(tmp_path: Path) -> None:
    code = "from testing.fixtures import unpacked; print(unpacked())"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = {process.communicate(timeout=1200)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    (target,) = (Path(line) for line in printed)
    # Nothing is left of the slower one.
    assert list((tmp_path / "vllm-deepseek-v4flash").iterdir()) == [target]
    with tarfile.open(ARCHIVE) as archive:
        sizes = {member.name: member.size for member in archive if member.isfile()}
    assert {
        path.relative_to(target).as_posix(): path.stat().st_size for path in target.rglob("*") if path.is_file()
    } == sizes


def test_versions_are_stated_once_or_agree() -> None:
    """The package's version is `__version__` alone; the supported vLLM is in the package and in its metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vllm_deepseek_v4flash.__version__"}
    assert project["project"]["optional-dependencies"]["cuda"] == [vllm_deepseek_v4flash.SUPPORTED_VLLM]
    assert f"## [{vllm_deepseek_v4flash.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
