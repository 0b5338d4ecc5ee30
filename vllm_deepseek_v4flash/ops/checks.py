"""Argument checks shared by the ops: a wrong shape is reported before any kernel sees it."""

from __future__ import annotations

import torch


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has shape `expected`; None stands for any size."""
    # A step on a CPU makes hundreds of these calls, nearly all without a None.
    if tensor.shape == expected:
        return
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(e is not None and e != s for s, e in zip(shape, expected, strict=True)):
        allowed = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape [{allowed}], got {list(shape)}")


def check_dtype(dtype: torch.dtype, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless all the tensors, given by name, have this dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype is not dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_cos_sin(cos_sin: torch.Tensor, num_tokens: int, dim: int) -> None:
    """Raise ValueError unless `cos_sin` is fp32 [num_tokens, R] and rotates an even number R of `dim` dimensions."""
    check_shape("cos_sin", cos_sin, (num_tokens, None))
    check_dtype(torch.float32, cos_sin=cos_sin)
    if cos_sin.shape[1] not in range(2, dim + 1, 2):
        raise ValueError(f"cannot rotate {cos_sin.shape[1]} of {dim} dimensions: need an even number of at least 2")
