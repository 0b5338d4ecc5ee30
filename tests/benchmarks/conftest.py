"""The benchmarks on a CPU: a dry run's bench."""

import pytest
import torch

from benchmarks.roofline import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench(torch.device("cpu"), dry=True)
