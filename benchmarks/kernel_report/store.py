"""Profiles of launches on disk: a launch that is determined by the same things is executed once.

What determines a launch's counts is its key: the PTX, the grid and which of its blocks run, the arguments (addresses as
offsets into the tensors that they point to), the tensors' sizes, the values of integer tensors (positions, tables,
ids), and the sources of the executor. Values of other tensors do not matter, or are random.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import triton

from testing import ptxrun
from testing.ptxrun.executable import Memory, Schedule
from testing.ptxrun.profile import Profile, Traffic
from testing.ptxrun.triton_kernels import Compiled

_COUNTING = (
    "encode.py", "executable.py", "flow.py", "layout.py", "library.py", "machine_code.py", "opcodes.py", "parse.py",
    "profile.py", "native/*",
)  # fmt: skip
"""The executor's sources on which counts depend."""
_WORD = 8


def default_folder() -> Path:
    """In the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "vllm-deepseek-v4flash" / "kernel-report"


class Store:
    """Profiles by key, in memory and in a folder.

    Args:
        folder: None keeps them in memory alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.profiles: dict[str, Profile] = {}
        self.executed = 0
        """Profiles that were not found."""

    def get(self, key: str) -> Profile | None:
        if key not in self.profiles and self.folder is not None and (file := self._file(key)).exists():
            fields = json.loads(file.read_text())
            self.profiles[key] = Profile(**fields | {"traffic": Traffic(**fields["traffic"])})
        return self.profiles.get(key)

    def put(self, key: str, profile: Profile) -> None:
        self.executed += 1
        self.profiles[key] = profile
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / f"{key}.{os.getpid()}"
            part.write_text(json.dumps(dataclasses.asdict(profile)))
            os.replace(part, self._file(key))

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.json"


def key_of(
    compiled: Compiled, parameters: bytes, memory: Sequence[Memory], values: bytes, grid: tuple[int, int, int],
    schedule: Schedule,
) -> str:  # fmt: skip
    """What determines the counts of a launch, hashed.

    Args:
        values: of the integer tensors.
    """
    parts = (
        _executor(), compiled.ptx, compiled.shared, compiled.executable.threads, grid, schedule,
        _relative(parameters, memory), [(m.name, m.size) for m in memory], hashlib.sha256(values).hexdigest(),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _executor() -> str:
    folder = Path(ptxrun.__file__).parent
    digest = hashlib.sha256(triton.__version__.encode())
    for file in sorted(file for pattern in _COUNTING for file in folder.glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _relative(parameters: bytes, memory: Sequence[Memory]) -> list[bytes | tuple[int, int]]:
    """The parameters' words; those that point into `memory` as its number and an offset."""
    found: list[bytes | tuple[int, int]] = []
    for at in range(0, len(parameters), _WORD):
        word = parameters[at : at + _WORD]
        value = int.from_bytes(word, "little")
        inside = ((n, value - m.base) for n, m in enumerate(memory) if m.base <= value < m.base + max(m.size, 1))
        found.append(next(inside, word))
    return found
