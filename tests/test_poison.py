"""testing/poison.py and tests/conftest.py. Without them other tests could pass for the wrong reason."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from testing.poison import poison_integer, poisoning


def call_from(module, expression, **names):
    """The value of `expression` as code of `module` would get it."""
    return eval(expression, {"__name__": module, "torch": torch, **names})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "expression",
    [
        "torch.empty((3, 5), dtype=dtype)",
        "torch.empty_like(torch.zeros((3, 5), dtype=dtype))",
        "torch.empty_strided((3, 5), (5, 1), dtype=dtype)",
        "torch.zeros((3, 5)).new_empty((3, 5), dtype=dtype)",
        "torch.zeros((3, 5)).new_empty_strided((3, 5), (5, 1), dtype=dtype)",
    ],
)
def test_floating_memory_is_nan(expression, dtype):
    tensor = call_from("vllm_deepseek_v4flash.ops.anything", expression, dtype=dtype)
    assert tensor.shape == (3, 5)
    assert tensor.dtype == dtype
    assert tensor.float().isnan().all()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.int32, -(2**29)),
        (torch.int64, -(2**61)),
        (torch.uint8, 255),
        (torch.int8, -1),
        (torch.bool, True),
    ],
)
def test_integer_memory_is_out_of_range(dtype, value):
    tensor = call_from("vllm_deepseek_v4flash", "torch.empty(4, dtype=dtype)", dtype=dtype)
    assert tensor.tolist() == [value] * 4


def test_an_integer_poison_is_no_index():
    table = torch.zeros(8)
    with pytest.raises(IndexError):
        table[torch.tensor([poison_integer(torch.int64)])]


@pytest.mark.parametrize("module", ["testing.oracle", "vllm_deepseek_v4flash_other", "torch.nn"])
def test_others_get_what_they_asked_for(module):
    """Zeros stand for fresh memory, which may contain a NaN of an earlier test."""
    allocate = poisoning(torch.zeros)
    assert not call_from(module, "allocate(4)", allocate=allocate).isnan().any()
    assert call_from("vllm_deepseek_v4flash.model", "allocate(4)", allocate=allocate).isnan().all()


def test_parameters_of_our_layers_start_as_nan():
    from testing.tiny import CONFIGS
    from vllm_deepseek_v4flash.layers.hyper_connections import mixing_parameters

    module = nn.Module()
    mixing_parameters(module, "hc_attn", CONFIGS["mixed"].config)
    assert dict(module.named_parameters()).keys() == {"hc_attn_fn", "hc_attn_base", "hc_attn_scale"}
    assert all(parameter.isnan().all() for parameter in module.parameters())


@pytest.fixture
def conftest(request):
    """tests/conftest.py, as pytest has loaded it."""
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_numbers_depend_on_the_test_alone(conftest, request):
    drawn = draw()
    conftest.seed_all("another test")
    assert draw() != drawn
    conftest.seed_all(request.node.nodeid)
    assert draw() == drawn


def test_gpu_tests_are_skipped_with_a_reason(conftest, monkeypatch):
    item: Any = SimpleNamespace(get_closest_marker={"gpu": object()}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.skip.Exception, match="needs a CUDA device, and torch"):
        conftest.pytest_runtest_setup(item)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    conftest.pytest_runtest_setup(item)
    assert conftest.why_no_gpu() is None
