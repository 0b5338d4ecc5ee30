"""The one way to start a kernel, and its recording for ahead-of-time compilation."""

import pytest
import torch
import triton
import triton.language as tl

from vllm_deepseek_v4flash.ops.triton.launch import Device, block, device_of, launch, recorded


@triton.jit
def _count(out):
    tl.store(out + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), 1)


def test_runs_every_program(device):
    out = torch.zeros(6, dtype=torch.int32, device=device)
    launch(_count, (2, 3), out)
    assert out.tolist() == [1] * 6


class Unlaunchable:
    """CUDA refuses a grid without programs, Triton's interpreter does not."""

    def __getitem__(self, grid):
        raise AssertionError(f"started with {grid}")


@pytest.mark.parametrize("grid", [(0,), (0, 3), (2, 0)])
def test_an_empty_grid_starts_nothing(grid):
    launch(Unlaunchable(), grid)
    with pytest.raises(AssertionError, match="started"):
        launch(Unlaunchable(), (1, 2))


def test_recorded_launches_do_not_run_and_need_no_memory(device):
    seen = []
    out, nothing = torch.zeros(2, dtype=torch.int32, device=device), torch.empty(2, device="meta")
    with recorded(Device(132, True, 228), lambda *launched: seen.append(launched)):
        assert device_of(nothing) == Device(132, True, 228)
        launch(_count, (2,), out)
        launch(_count, (0, 7), nothing, num_warps=2)
    assert [(kernel, grid, options) for kernel, grid, _, options in seen] == [
        (_count, (2,), {"enable_fp_fusion": True}),
        (_count, (0, 7), {"num_warps": 2, "enable_fp_fusion": True}),
    ]
    assert seen[0][2][0] is out
    assert seen[1][2][0] is nothing
    assert out.tolist() == [0, 0]


def test_recording_ends_with_its_block_even_by_an_error(device):
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(KeyError), recorded(Device(1, True, 100), lambda *_: None):
        raise KeyError
    launch(_count, (1,), out)
    assert out.tolist() == [1]
    if device.type == "cpu":
        assert not device_of(out).native_fp8


@pytest.mark.gpu
def test_a_gpu_says_what_it_is():
    x = torch.empty(1, device="cuda")
    properties = torch.cuda.get_device_properties(x.device)
    assert device_of(x).multiprocessors == properties.multi_processor_count
    assert device_of(x).native_fp8 == ((properties.major, properties.minor) >= (8, 9))


@pytest.mark.parametrize(("size", "smallest", "expected"), [(1, 1, 1), (5, 1, 8), (8, 1, 8), (5, 16, 16), (0, 4, 4)])
def test_blocks_are_powers_of_two(size, smallest, expected):
    assert block(size, smallest) == expected
