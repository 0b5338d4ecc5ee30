"""Arithmetic whose rounding does not depend on the size of a step: a token's numbers are then the same in any."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from vllm_deepseek_v4flash.ops import dispatch

# What fp32 rounds differently with the number of tokens: sums, by their order, and functions that vectors compute by
# other code than the remainder of a vector.
_FUNCTIONS = (
    (F, ("linear", "softplus", "silu")),
    (torch, ("einsum", "bmm", "sigmoid", "rsqrt")),
    (torch.Tensor, ("sum", "mean", "softmax", "exp", "cos", "sin")),
)


@contextlib.contextmanager
def rounding_once() -> Iterator[None]:
    """Compute these functions in fp64 and round their results to fp32, in PyTorch's ops.

    The difference between two ways to compute them is then 1e-16, which the rounding hides except once in 1e8.
    Engines must be made within the `with` block too: vLLM packs weights for its own fp32 GEMM when it loads them.
    """
    from vllm.model_executor.layers import utils

    def keep_plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    with contextlib.ExitStack() as patches:
        patches.enter_context(dispatch.use("reference"))
        for owner, names in _FUNCTIONS:
            for name in names:
                patches.enter_context(mock.patch.object(owner, name, _in_double(getattr(owner, name))))
        patches.enter_context(mock.patch.object(utils, "dispatch_cpu_unquantized_gemm", keep_plain))
        yield


def _in_double(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = function(*map(wide, args), **kwargs)
        return out.float() if out.dtype == torch.float64 else out

    return call
