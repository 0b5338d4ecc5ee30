"""The one packed form that every source format is read into, and what its values mean.

A weight is `[N, K]` (out, in). By kind:

* int4: `qweight` uint8 [N, K/2], low nibble = even column, codes 0..15; `scales` [N, K/g] as stored;
  `zeros` uint8 [N, K/g] where `zero_points`, else the zero is 8; `perm` int32 [K] where `act_order`:
  canonical column j is column perm[j] of the original weight, so groups are contiguous and
  y = W @ x[perm]. value = (code - zero) * scale in fp32, and +0 where code = zero, whatever the scale's sign.
* fp4: `qweight` uint8 [N, K/2] of e2m1 codes, low nibble = even column; `scales` uint8 ue8m0 [N, K/32].
* fp8: `qweight` float8_e4m3fn [N, K]; `scales` fp32 [ceil(N/128), ceil(K/128)].
* plain: `weight` [N, K].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from .torch_or_dtypes import torch

Kind = Literal["int4", "fp4", "fp8", "plain"]

FP8_BLOCK = 128
FP4_GROUP = 32
SYMMETRIC_ZERO = 8

# e2m1: sign, two exponent bits (bias 1), one mantissa bit (OCP Microscaling Formats v1.0, 5.3.3).
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class QuantizationError(ValueError):
    """A quantised checkpoint, or its config, that cannot be served; the message names module and tensor."""


@dataclass(frozen=True)
class Scheme:
    """How one weight is quantised.

    Two schemes are equal when weights of the same shape have the same canonical tensors, so that they can
    share a parameter; where they came from (`source`, `module`, `shape`) does not count.

    Attributes:
        group_size: Input columns that share a scale: K for channel-wise int4, 32 for fp4, 128 for fp8
            (blocks of 128 x 128), 0 for plain.
        scale_dtype: dtype of the canonical `scales` (None for plain).
        dtype: dtype of a plain `weight`.
        source: The stored layout, known only to the format that described it.
        module: DeepSeek's name of the module, for messages.
        shape: (N, K); a plain vector has one entry.
    """

    kind: Kind
    group_size: int = 0
    zero_points: bool = False
    act_order: bool = False
    scale_dtype: torch.dtype | None = None
    dtype: torch.dtype | None = None
    source: str = field(default="", compare=False)
    module: str = field(default="", compare=False)
    shape: tuple[int, ...] = field(default=(), compare=False)


def canonical_shapes(scheme: Scheme, n: int, k: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each canonical tensor of a weight `[n, k]`.

    Raises:
        QuantizationError: `k` is not a whole number of groups.
    """
    if scheme.kind == "plain":
        return {"weight": ((n, k), scheme.dtype or torch.float32)}
    scale_dtype = scheme.scale_dtype or torch.float32
    if scheme.kind == "fp8":
        blocks = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
        return {"qweight": ((n, k), torch.float8_e4m3fn), "scales": (blocks, scale_dtype)}
    group = scheme.group_size
    if group <= 0 or k % group or k % 2:
        raise QuantizationError(
            f"{scheme.module or 'weight'}: {k} input columns are not a whole number of groups of {group} (or are odd)"
        )
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": ((n, k // 2), torch.uint8),
        "scales": ((n, k // group), torch.uint8 if scheme.kind == "fp4" else scale_dtype),
    }
    if scheme.zero_points:
        shapes["zeros"] = ((n, k // group), torch.uint8)
    if scheme.act_order:
        shapes["perm"] = ((k,), torch.int32)
    return shapes


def shard_problem(scheme: Scheme, shape: tuple[int, int], full: tuple[int, int]) -> str | None:
    """Why one rank cannot take `shape` of a packed weight whose whole is `full`, both [N, K]; None where it can."""
    (n, k), (full_n, full_k) = shape, full
    if scheme.kind == "plain" or shape == full:
        return None
    if k != full_k and scheme.act_order:
        return (
            f"is packed in activation order (g_idx), and its groups are scattered over the {full_k} columns that "
            f"tensor parallelism would divide. Use tensor-parallel size 1, pipeline or expert parallelism, or a "
            f"checkpoint without desc_act"
        )
    # A channel-wise scale serves every part of its row; of the others only fp8's stand for several rows.
    if k != full_k and scheme.group_size != full_k and k % scheme.group_size:
        return (
            f"has groups of {scheme.group_size} columns, which ranks with {k} of {full_k} columns each would cut. Use "
            f"a smaller tensor-parallel size, or expert parallelism for experts"
        )
    if n != full_n and scheme.kind == "fp8" and n % FP8_BLOCK:
        return (
            f"has groups of {FP8_BLOCK} rows, which ranks with {n} of {full_n} rows each would cut. Use a smaller "
            f"tensor-parallel size, or expert parallelism for experts"
        )
    return None


def shard_scheme(scheme: Scheme, shape: tuple[int, int], full: tuple[int, int]) -> Scheme:
    """The scheme of one rank's `shape` of a weight whose whole is `full`, both [N, K].

    Raises:
        QuantizationError: the cut would go through a group or block of scales, or through reordered columns.
    """
    problem = shard_problem(scheme, shape, full)
    if problem is not None:
        raise QuantizationError(f"{scheme.module or 'a packed weight'} {problem}")
    if scheme.kind == "int4" and scheme.group_size == full[1]:
        return replace(scheme, group_size=shape[1])
    return scheme


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Codes `[N, K]` uint8 of packed `[N, K/2]`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """2^(code - 127) in fp32; code 255 is NaN (OCP Microscaling Formats v1.0, 5.4.1)."""
    table = [2.0 ** (code - 127) for code in range(255)] + [float("nan")]
    return torch.tensor(table, dtype=torch.float32, device=scales.device)[scales.long()]


def dequantise(canonical: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight `[N, K]` in fp32, its columns in the original order (`perm` is undone)."""
    if scheme.kind == "plain":
        return canonical["weight"].float().contiguous()
    qweight, scales = canonical["qweight"], canonical["scales"]
    if scheme.kind == "fp8":
        n, k = qweight.shape
        rows = torch.arange(n, device=qweight.device) // FP8_BLOCK
        columns = torch.arange(k, device=qweight.device) // FP8_BLOCK
        return qweight.float() * scales.float()[rows][:, columns]
    codes = _nibbles(qweight)
    if scheme.kind == "fp4":
        values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=qweight.device)[codes.long()]
        return values * _ue8m0(scales).repeat_interleave(scheme.group_size, dim=1)
    grouped = codes.to(torch.float32).unflatten(1, (-1, scheme.group_size))
    zeros = canonical["zeros"].float().unsqueeze(-1) if scheme.zero_points else float(SYMMETRIC_ZERO)
    # Adding 0 makes +0 of the -0 that a negative scale (AutoRound has them) gives.
    weight = ((grouped - zeros) * scales.float().unsqueeze(-1)).flatten(1).add_(0.0)
    if not scheme.act_order:
        return weight
    original = torch.empty_like(weight)
    original[:, canonical["perm"].long()] = weight
    return original
