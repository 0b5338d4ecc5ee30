"""Counts of launches that are kept on disk: found for the same launch, and for no other."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from benchmarks.kernel_report.store import Store, key_of
from testing.ptxrun.executable import Memory, Schedule
from testing.ptxrun.profile import Profile, Traffic

PROFILE = Profile("k", 4, 2, 8, 32, 1024, {"alu": 5.0}, Traffic(1.0, 2.0, 3.0, 4.0), 1.0, 1.0, 0.0, 0.0, ["a line"])


def launch(base=0x1000, size=64, **changes):
    """A key's arguments: one tensor, a pointer to its second word, and a number."""
    kernel = SimpleNamespace(ptx="ptx", shared=0, executable=SimpleNamespace(threads=(32, 1, 1)))
    given = {
        "compiled": kernel, "parameters": (base + 8).to_bytes(8, "little") + (7).to_bytes(8, "little"),
        "memory": [Memory(base, size, "x")], "values": b"", "grid": (4, 1, 1), "schedule": Schedule(),
    }  # fmt: skip
    return given | changes


def test_a_profile_survives_on_disk(tmp_path):
    Store(tmp_path).put("key", PROFILE)
    found = Store(tmp_path)
    assert found.get("key") == PROFILE
    assert found.executed == 0
    assert found.get("another") is None


def test_an_address_does_not_matter():
    assert key_of(**launch()) == key_of(**launch(base=0x2000))


@pytest.mark.parametrize(
    "change",
    [
        {"grid": (5, 1, 1)},
        {"schedule": Schedule(block_step=2)},
        {"values": b"1"},
        {"size": 128},
        {"parameters": (0x1000).to_bytes(8, "little") + (7).to_bytes(8, "little")},
        {"parameters": (0x1008).to_bytes(8, "little") + (8).to_bytes(8, "little")},
        {"compiled": SimpleNamespace(ptx="changed", shared=0, executable=SimpleNamespace(threads=(32, 1, 1)))},
        {"compiled": SimpleNamespace(ptx="ptx", shared=16, executable=SimpleNamespace(threads=(32, 1, 1)))},
        {"compiled": SimpleNamespace(ptx="ptx", shared=0, executable=SimpleNamespace(threads=(64, 1, 1)))},
    ],
)
def test_what_determines_counts_changes_the_key(change):
    assert key_of(**launch()) != key_of(**launch(**change))


def test_every_count_is_kept():
    """A field that is added to a profile is written, too."""
    assert set(dataclasses.asdict(PROFILE)) == {field.name for field in dataclasses.fields(Profile)}
