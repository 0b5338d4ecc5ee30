"""A recorded function again: on what its tensors hold by then, at the addresses that they had."""

import pytest
import torch

from testing.ops.numeric import assert_exact, normal
from vllm_deepseek_v4flash.ops.cpu.recording import Recording
from vllm_deepseek_v4flash.ops.cpu.rms_norm import rms_norm


def record(function, *tensors):
    with Recording() as recording:
        result = function(*tensors)
    return recording, result


def test_kernels_and_torch_calls_are_repeated_in_order(rng):
    weight, table = normal(rng, 8), normal(rng, 9, 8)
    total = torch.zeros(3, 8)

    def function(x, rows):
        y = rms_norm(x, weight, 1e-6) + table[rows]  # a kernel, two calls that make tensors
        top, _ = y.view(6, 4).max(dim=1)  # of a view, with two results
        total.add_(y)  # in place
        return y, top.reshape(3, 2).to(torch.bfloat16)

    x, rows = normal(rng, 3, 8), torch.tensor([1, 0, 8])
    recording, results = record(function, x, rows)
    assert not recording.obstacle
    x.copy_(normal(rng, 3, 8))
    rows.copy_(torch.tensor([2, 2, 5]))
    for result in results:
        result.fill_(torch.nan)
    before = total.clone()
    recording.replay()
    after = total.clone()
    expected = function(x, rows)
    for result, right in zip(results, expected, strict=True):
        assert_exact(result, right)
    assert_exact(after, before + expected[0])
    names = {name for name, _, _ in recording.calls}
    assert "rms_norm" in names
    assert "aten.add_.Tensor" in names
    assert recording.bytes >= sum(result.nbytes for result in results)


@pytest.mark.parametrize(
    "function",
    [lambda x: x * x[0, 0].item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.unique(), torch.rand_like],
)
def test_what_depends_on_values_is_an_obstacle(rng, function):
    recording, _ = record(function, normal(rng, 3, 8))
    assert recording.obstacle


def test_nothing_is_recorded_after_the_block(rng):
    recording, _ = record(lambda x: rms_norm(x, None, 1e-6), normal(rng, 3, 8))
    names = [name for name, _, _ in recording.calls]
    rms_norm(normal(rng, 3, 8), None, 1e-6)
    assert [name for name, _, _ in recording.calls] == names
    assert names.count("rms_norm") == 1
