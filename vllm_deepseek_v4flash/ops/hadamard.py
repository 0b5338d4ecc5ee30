"""The orthonormal Hadamard transform of the indexer's 4-bit queries and keys (docs/model.md, "Indexer")."""

from __future__ import annotations

import torch


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Multiply the last dimension by the Sylvester-Hadamard matrix and by D^-0.5.

    Args:
        x: [..., D], floating; D a power of two.

    Returns:
        [..., D], the dtype of `x`.
    """
    dim = x.shape[-1]
    if dim & (dim - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, got {dim}")
    y, step = x, 1
    while step < dim:
        pairs = y.unflatten(-1, (-1, 2, step))
        a, b = pairs.unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        step *= 2
    return y * dim**-0.5
