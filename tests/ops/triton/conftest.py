"""The parts of the kernels, each called by a kernel of the test's own: in the interpreter and on a GPU."""

import pytest
import torch

from testing.ops.interpreted import need_interpreter


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "interpreted":
        need_interpreter()
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(params=[False, True], ids=["bits", "native"])
def native(request, device):
    """Whether e4m3 is converted by instructions instead of bit arithmetic."""
    if request.param and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no e4m3 instructions")
    return request.param
