"""Every test of an op runs once per device; a device is listed here as soon as an op has a twin for it."""

import pytest
import torch

DEVICES = ("cpu",)


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture
def rng():
    """A generator on the CPU, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(0)
