"""The offline batch as a module, for the tests of both its files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from testing.batch import SCRIPT
from testing.scripts import imported


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    with imported(SCRIPT) as module:
        yield module
