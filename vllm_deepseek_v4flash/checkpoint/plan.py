"""How one packed module is stored, found out from headers before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.packed_weight import Scheme
from ..ops.torch_or_dtypes import torch
from .formats import Format

# vLLM's vocabulary layers hold plain weights only, so these are dequantised at load.
HELD_UNPACKED = ("embed", "head")


@dataclass(frozen=True)
class PackedModule:
    """One packed weight: its format, what it becomes, the leaves that make it up, and the files that hold them.

    `transposed`: the scheme's [out, in] are an embedding's channels and tokens.
    """

    format: Format
    scheme: Scheme
    leaves: frozenset[str]
    files: tuple[str, ...]
    transposed: bool = False

    def repack(self, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored tensors by leaf name, all of `self.leaves`, as canonical ones (`ops/packed_weight.py`)."""
        return self.format.repack(leaves, self.scheme)
