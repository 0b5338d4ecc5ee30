"""How a parameter takes its share of a checkpoint tensor under tensor parallelism."""

from __future__ import annotations

import torch
from torch import nn

from ..compat import get_tensor_model_parallel_rank, set_weight_attrs


def shard_rows(param: nn.Parameter) -> None:
    """Give `param` [n, ...] a loader that takes this rank's n rows of the full tensor [n * tp, ...]."""

    def weight_loader(param: nn.Parameter, loaded: torch.Tensor) -> None:
        rows = param.shape[0]
        param.data.copy_(loaded.narrow(0, get_tensor_model_parallel_rank() * rows, rows))

    set_weight_attrs(param, {"weight_loader": weight_loader})
