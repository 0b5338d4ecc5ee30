"""Argument checks shared by the ops: a wrong shape is named before any kernel sees it."""

from __future__ import annotations

import torch


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has shape `expected`; None stands for any size."""
    # A CPU's step makes hundreds of these calls, nearly all without a None.
    if tensor.shape == expected:
        return
    shape = tuple(tensor.shape)
    if len(shape) != len(expected) or any(e is not None and e != s for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(shape)}")


def check_dtype(name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """Raise ValueError unless `tensor.dtype` is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(d) for d in allowed)
        raise ValueError(f"{name} must be {names}, got {tensor.dtype}")


def check_cos_sin(cos_sin: torch.Tensor, num_tokens: int, dim: int) -> None:
    """Raise ValueError unless `cos_sin` is fp32 [num_tokens, R] and rotates an even number R of `dim` dimensions."""
    check_shape("cos_sin", cos_sin, (num_tokens, None))
    check_dtype("cos_sin", cos_sin, torch.float32)
    if cos_sin.shape[1] not in range(2, dim + 1, 2):
        raise ValueError(f"cannot rotate {cos_sin.shape[1]} of {dim} dimensions: need an even number from 2 up")
