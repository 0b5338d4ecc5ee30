"""The checkpoint, and engines in this process that tests of one module share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testing.scheduler.engines import Engines, References
from testing.scheduler.prompts import SPEC
from testing.scheduler.runner import Result
from testing.tiny import write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("scheduler") / "model", SPEC)


@pytest.fixture(scope="module")
def engines(checkpoint: Path) -> Iterator[Engines]:
    engines = Engines(checkpoint)
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def known_results() -> dict[tuple[Any, ...], Result]:
    return {}


@pytest.fixture(scope="module")
def references(engines: Engines, known_results: dict[tuple[Any, ...], Result]) -> References:
    return References(engines, known_results)
