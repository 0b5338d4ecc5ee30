"""Calls of a function by key: computed once, recorded the second time, replayed from then on."""

import pytest
import torch

from vllm_deepseek_v4flash.ops.cpu import replay
from vllm_deepseek_v4flash.ops.cpu.replay import Replays


class Doubling:
    """Doubles a tensor through `Replays`, and counts how often Python ran."""

    def __init__(self):
        self.replays, self.ran = Replays(), {"compute": 0, "recordable": 0}

    def __call__(self, x, key="key", addresses=None):
        def run(kind):
            self.ran[kind] += 1
            return x + x

        where = (1, x.data_ptr()) if addresses is None else addresses
        return self.replays.call(key, where, x, lambda: run("compute"), lambda: run("recordable"))


def test_the_third_call_is_replayed():
    double, x = Doubling(), torch.ones(3)
    results = []
    for value in range(4):
        x.fill_(value)
        results.append(double(x))
    assert double.ran == {"compute": 1, "recordable": 1}
    assert [result.tolist() for result in results] == [[2.0 * value] * 3 for value in range(4)]


def test_tensors_that_moved_are_recorded_again():
    double, x, y = Doubling(), torch.ones(3), torch.full((3,), 5.0)
    for tensor in (x, x, y, y):
        assert torch.equal(double(tensor), 2 * tensor)
    assert double.ran == {"compute": 1, "recordable": 2}


def test_recordings_are_dropped_when_what_they_share_moves():
    double, x = Doubling(), torch.ones(3)
    for key in "aabb":
        double(x, key)
    assert all(double.replays.recorded.values())
    double(x, "a", addresses=(2, x.data_ptr()))
    assert list(double.replays.recorded) == ["a"]


def test_recordings_are_dropped_beyond_the_budget(monkeypatch):
    monkeypatch.setattr(replay, "MOST_BYTES", 0)
    double, x = Doubling(), torch.ones(3)
    for key in "aabb":
        double(x, key)
    assert list(double.replays.recorded) == ["b"]
    double.replays.clear()
    assert not double.replays.recorded


@pytest.mark.parametrize("calls", [2, 5])
def test_what_cannot_be_repeated_is_computed(calls):
    replays, x, ran = Replays(), torch.ones(3), []

    def compute():
        ran.append(x.sum().item())
        return x[x > 0]

    for _ in range(calls):
        assert replays.call("key", (1,), x, compute, compute).tolist() == [1.0] * 3
    assert len(ran) == calls
