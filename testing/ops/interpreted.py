"""Whether Triton's interpreter runs the kernels of this session."""

from __future__ import annotations

import os

import pytest


def need_interpreter() -> None:
    """Skip on a machine with a GPU, for which Triton compiles: there the tests marked `gpu` take its place."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: pytest -m gpu runs them, TRITON_INTERPRET=1 interprets them")
