"""Linear layers that vLLM does not have: fp32 results, block-diagonal by group, several of one input in one weight.

`methods.py` decides how their weights are stored and multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..compat import ColumnParallelLinear, MergedColumnParallelLinear, ReplicatedLinear


class Fp32Linear(ReplicatedLinear):
    """[T, K] to [T, N] fp32, the whole weight on every rank: router, compressors (docs/model.md, "Kept in fp32")."""

    def __init__(self, input_size: int, output_size: int, *, quant_config: Any, prefix: str) -> None:
        super().__init__(
            input_size, output_size, bias=False, quant_config=quant_config, prefix=prefix, return_bias=False
        )


class GroupedLinear(ColumnParallelLinear):
    """The first half of the output projection (docs/model.md, "Attention"): each group has its own rows of the weight.

    Sharded by group, so `groups` must divide by the tensor-parallel size.
    """

    quant_method: Any

    def __init__(self, groups: int, input_size: int, output_size: int, *, quant_config: Any, prefix: str) -> None:
        super().__init__(
            input_size, groups * output_size, bias=False, quant_config=quant_config, prefix=prefix, return_bias=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, local groups, input_size] to [T, local groups * output_size], same dtype."""
        return self.quant_method.apply(self, x, None).flatten(1)


class Projection(NamedTuple):
    """One of several linear layers of the same input."""

    name: str
    """The checkpoint's module name, relative to the module that owns the projections."""
    rows: int
    """N of the whole weight [N, K]."""
    label: str
    """What stands for it in a merged layer's name."""
    fp32: bool = False
    """Whether the result stays in fp32."""


class MergedLinear(MergedColumnParallelLinear):
    """Projections whose weights are the rows of one parameter, in their order.

    Each projection is sharded by rows over the ranks, or with `disable_tp` whole on every rank.
    """

    quant_method: Any

    def __init__(
        self, input_size: int, projections: Sequence[Projection], *, disable_tp: bool, quant_config: Any, prefix: str
    ) -> None:
        # Before vLLM's constructor, which asks `quant_config` for the method.
        self.projections = tuple(projections)
        super().__init__(
            input_size, [projection.rows for projection in projections], bias=False, quant_config=quant_config,
            prefix=prefix, return_bias=False, disable_tp=disable_tp,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[T, K] to [T, local rows] of each projection: fp32 where it says so, else the dtype of `x`."""
        return self.quant_method.apply(self, x, None)
