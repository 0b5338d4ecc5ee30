"""Packed weights to multiply with, and the routed experts' sum in fp64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_deepseek_v4flash.ops.packed_weight import Scheme, canonical_shapes, dequantise

from .numeric import FUNCTION, U32, U, assert_within, f64

SCHEMES = {
    "int4-g32": Scheme("int4", 32, scale_dtype=torch.float16),
    "int4-g32-zeros-fp32": Scheme("int4", 32, zero_points=True, scale_dtype=torch.float32),
    "int4-g64-zeros": Scheme("int4", 64, zero_points=True, scale_dtype=torch.bfloat16),
    "int4-g128": Scheme("int4", 128, scale_dtype=torch.bfloat16),
    "int4-act-order": Scheme("int4", 32, act_order=True, scale_dtype=torch.float16),
    "int4-channel": Scheme("int4", 0, scale_dtype=torch.bfloat16),
    "fp4": Scheme("fp4", 32),
    "fp8": Scheme("fp8", 128, scale_dtype=torch.float32),
}


def scheme_of(name: str, k: int) -> Scheme:
    """A scheme for rows of `k` columns, all of which share a scale where it is channel-wise."""
    scheme = SCHEMES[name]
    return scheme if scheme.group_size else Scheme("int4", k, scale_dtype=scheme.scale_dtype)


def random_weight(scheme: Scheme, n: int, k: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Canonical tensors of any codes, zeros and, but for fp4, signs of scales."""
    weight = {}
    for name, (shape, dtype) in canonical_shapes(scheme, n, k).items():
        if name == "perm":
            weight[name] = torch.randperm(k).to(dtype)
        elif name == "scales" and scheme.kind == "fp4":
            weight[name] = torch.randint(118, 128, shape).to(dtype)
        elif name == "scales":
            weight[name] = (torch.randn(shape) / 4).to(dtype)
        elif scheme.kind == "fp8":
            weight[name] = torch.randn(shape).to(dtype)
        else:
            weight[name] = torch.randint(0, 16 if name == "zeros" else 256, shape).to(dtype)
    return {name: tensor.to(device) for name, tensor in weight.items()}


def stacked(weights: Sequence[Mapping[str, torch.Tensor]], *shape: int) -> dict[str, torch.Tensor]:
    """Equal weights as one stack of this shape."""
    return {name: torch.stack([w[name] for w in weights]).unflatten(0, shape) for name in weights[0]}


def dense(stack: Mapping[str, torch.Tensor], scheme: Scheme, dtype: torch.dtype) -> torch.Tensor:
    """The values of a stack [..., N, K], rounded to `dtype` as the ops promise, on the CPU."""
    lead = stack["qweight"].ndim - 2
    flat = {name: tensor.cpu().flatten(0, lead - 1) for name, tensor in stack.items()}
    each = [dequantise({n: t[i] for n, t in flat.items()}, scheme) for i in range(flat["qweight"].shape[0])]
    return torch.stack(each).to(dtype).unflatten(0, stack["qweight"].shape[:lead])


def experts_in_fp64(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    limit: float | None,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum [T, H] over experts [E, 2I, H] and [E, H, I], and what the roundings on the way may move it."""
    x, w13, w2, weights = (f64(v) for v in (x, w13, w2, weights))
    out, size = torch.zeros_like(x), torch.zeros_like(x)
    for t in range(x.shape[0]):
        for weight, expert in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            e = expert - first
            if not 0 <= e < w13.shape[0]:
                continue
            gate, up = (w13[e] @ x[t]).chunk(2)
            # What an error of the two projections may do: silu changes by at most 1.1 times its argument's error.
            gate_size, up_size = (w13[e].abs() @ x[t].abs()).chunk(2)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            silu = gate * torch.sigmoid(gate)
            spread = abs(weight) * (1.1 * gate_size * up.abs() + up_size * silu.abs() + (silu * up).abs())
            out[t] += w2[e] @ (silu * up * weight)
            size[t] += w2[e].abs() @ spread
    return out, size


def check_experts(actual: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> None:
    """`actual` is within the roundings of `expected`, what `experts_in_fp64` returned."""
    out, size = expected
    # Three roundings to the dtype of x (projections, activation, w2's result) and fp32 sums over H and I.
    steps = 3 * U[x.dtype] + (2 * x.shape[1] + 128) * U32 + 2 * FUNCTION
    assert actual.dtype == torch.float32
    assert_within(actual, out, steps * size)
