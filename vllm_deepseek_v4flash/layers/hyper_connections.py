"""Manifold-constrained hyper-connections around a sublayer (docs/model.md, "Hyper-connections")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import DeepseekV4Config
from ..ops.mhc_head import mhc_head
from ..ops.mhc_post import mhc_post
from ..ops.mhc_post_pre import mhc_post_pre
from ..ops.mhc_pre import mhc_pre
from .norm import RMSNorm


@dataclass(frozen=True)
class Residual:
    """The residual streams, and the sublayer output that is still to be spread over them.

    An output is spread when the next sublayer mixes its input, because one kernel does both.
    """

    streams: torch.Tensor
    """[T, n, H]."""
    post: torch.Tensor | None = None
    """[T, n] fp32: how the sublayer's output goes to each stream."""
    comb: torch.Tensor | None = None
    """[T, n, n] fp32 [source, destination]: how the streams mix meanwhile."""
    output: torch.Tensor | None = None
    """[T, H]."""

    def leave(self, output: torch.Tensor) -> Residual:
        """With the output [T, H] of the sublayer that was entered last."""
        return Residual(self.streams, self.post, self.comb, output)

    def spread(self) -> torch.Tensor:
        """[T, n, H], with every output in the streams."""
        if self.output is None:
            return self.streams
        assert self.post is not None
        assert self.comb is not None
        return mhc_post(self.output, self.streams, self.post, self.comb)


class HyperConnection:
    """Mixes the streams into the input of one sublayer, and normalises it.

    Its parameters belong to `owner`, under the checkpoint's names.
    """

    def __init__(self, owner: nn.Module, name: str, norm: RMSNorm, config: DeepseekV4Config) -> None:
        self.owner, self.name, self.norm = owner, name, norm
        mixing_parameters(owner, name, config)
        self.options: dict[str, Any] = {
            "norm_eps": config.rms_norm_eps,
            "hc_eps": config.hc_eps,
            "sinkhorn_iters": config.hc_sinkhorn_iters,
        }

    def enter(self, residual: Residual) -> tuple[torch.Tensor, Residual]:
        """The sublayer's normed input [T, H], and the residual that awaits its output."""
        parameters = *_mixing(self.owner, self.name), self.norm.weight
        if residual.output is None:
            x, post, comb = mhc_pre(residual.streams, *parameters, **self.options)
            return x, Residual(residual.streams, post, comb)
        assert residual.post is not None
        assert residual.comb is not None
        streams, x, post, comb = mhc_post_pre(
            residual.output, residual.streams, residual.post, residual.comb, *parameters, **self.options
        )
        return x, Residual(streams, post, comb)


def merge_streams(owner: nn.Module, streams: torch.Tensor, config: DeepseekV4Config) -> torch.Tensor:
    """[T, n, H] to [T, H], by the mixing parameters `hc_head` of `owner`."""
    return mhc_head(streams, *_mixing(owner, "hc_head"), norm_eps=config.rms_norm_eps, hc_eps=config.hc_eps)


def mixing_parameters(owner: nn.Module, name: str, config: DeepseekV4Config, *, head: bool = False) -> None:
    """Register fp32 `<name>_fn`, `<name>_scale` and `<name>_base` on `owner`, under the checkpoint's names."""
    n = config.hc_mult
    outputs = n if head else (2 + n) * n
    for leaf, shape in (
        ("fn", (outputs, n * config.hidden_size)),
        ("scale", (1 if head else 3,)),
        ("base", (outputs,)),
    ):
        owner.register_parameter(
            f"{name}_{leaf}", nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
        )


def _mixing(owner: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return getattr(owner, f"{name}_fn"), getattr(owner, f"{name}_scale"), getattr(owner, f"{name}_base")
