"""The environment of the parts: where Python finds the repository and the plugin, and vLLM's settings.

A GPU machine may have a copy of the repository that is not installed. vLLM, in each of its processes, finds plugins by
the metadata of installed packages only, so PYTHONPATH of the parts has a directory with such metadata.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from vllm_deepseek_v4flash import __version__

ROOT = Path(__file__).resolve().parents[2]
V2_ON_CPU = ROOT / "testing" / "v2_on_cpu"


def write_metadata(directory: Path) -> Path:
    """Write the metadata of an installation of this repository; returns `directory`, for PYTHONPATH."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = directory / f"{project['name'].replace('-', '_')}-{__version__}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {__version__}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return directory


def part_environment(metadata: Path, dry: bool) -> dict[str, str]:
    """The variables of a part's process. metadata: the directory of `write_metadata`."""
    path = [str(metadata), str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    settings = {
        # Engines run in the part's own process, which reads their memory, kernels and scheduler.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if not dry:
        # tests/conftest.py would not see a GPU that is not the machine's first.
        settings |= {"TRITON_INTERPRET": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    else:
        path.insert(0, str(V2_ON_CPU))
        settings |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(path)}
