"""Random layers of experts for csrc/'s kernels, and their result in fp64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from vllm_deepseek_v4flash.ops.cuda import packed_experts as cuda
from vllm_deepseek_v4flash.ops.packed_weight import Scheme, canonical_shapes, dequantise

from .numeric import FUNCTION, U32, U, assert_exact, assert_within, f64

BF16 = U[torch.bfloat16]
SCHEMES = {
    "int4, groups of 32, fp16": Scheme("int4", 32, scale_dtype=torch.float16),
    "int4, groups of 64, zeros, bf16": Scheme("int4", 64, zero_points=True, scale_dtype=torch.bfloat16),
    "int4, groups of 128, zeros, fp32": Scheme("int4", 128, zero_points=True, scale_dtype=torch.float32),
    "int4, groups of 256": Scheme("int4", 256, scale_dtype=torch.float16),
    "fp4": Scheme("fp4", 32),
}
INT4 = SCHEMES["int4, groups of 32, fp16"]


def packed(rng: torch.Generator, scheme: Scheme, *shape: int) -> dict[str, torch.Tensor]:
    """Random canonical tensors [*shape[:-2], ...] of weights [..., N, K]; rows and scales of every size and sign."""
    *stack, n, k = shape
    tensors = {}
    for name, (size, dtype) in canonical_shapes(scheme, n, k).items():
        size = (*stack, *size)
        if name != "scales":
            tensors[name] = torch.randint(0, 16 if name == "zeros" else 256, size, generator=rng).to(dtype)
        elif scheme.kind == "fp4":
            tensors[name] = torch.randint(118, 126, size, generator=rng).to(dtype)
        else:
            tensors[name] = ((torch.rand(size, generator=rng) - 0.3) / 16).to(dtype)
    return tensors


class Problem:
    def __init__(
        self,
        rng: torch.Generator,
        device: torch.device | str,
        scheme: Scheme = INT4,
        *,
        tokens: int = 3,
        topk: int = 2,
        experts: int = 4,
        inner: int = 64,
        hidden: int = 288,
        ids: Sequence[Sequence[int]] | None = None,
        first: int = 0,
    ) -> None:
        # A group as wide as the weight is channel-wise: its width differs between the two.
        def fitted(columns: int) -> Scheme:
            return dataclasses.replace(scheme, group_size=columns) if columns % scheme.group_size else scheme

        self.rng, self.device = rng, device
        self.scheme13, self.scheme2, self.first = fitted(hidden), fitted(inner), first
        self.w13 = packed(rng, self.scheme13, experts, 2, inner, hidden)
        self.w2 = packed(rng, self.scheme2, experts, hidden, inner)
        self.ids = torch.randint(0, experts, (tokens, topk), generator=rng) if ids is None else torch.tensor(ids)
        self.weights = torch.rand(self.ids.shape, generator=rng)
        self.x = torch.randn(len(self.ids), hidden, generator=rng).bfloat16()

    def run(self, limit: float = 10.0) -> torch.Tensor:
        x, weights, ids = (tensor.to(self.device) for tensor in (self.x, self.weights, self.ids))
        w13, w2 = ({n: t.to(self.device) for n, t in weight.items()} for weight in (self.w13, self.w2))
        return cuda.packed_experts(
            x, w13, w2, self.scheme13, self.scheme2, weights, ids, swiglu_limit=limit, first_expert=self.first
        )

    def dequantised(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up = (dequantise({n: t[expert, i] for n, t in self.w13.items()}, self.scheme13).double() for i in (0, 1))
        return gate, up, dequantise({n: t[expert] for n, t in self.w2.items()}, self.scheme2).double()

    def expected(self, limit: float = 10.0) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums in fp64, and how far fp32 sums and one rounding of the activations may be from them."""
        out, bound = torch.zeros(self.x.shape, dtype=torch.float64), torch.zeros(self.x.shape, dtype=torch.float64)
        columns, inner, topk = self.x.shape[1], self.w2["qweight"].shape[-1] * 2, self.ids.shape[1]
        for token, k in itertools.product(range(len(self.x)), range(topk)):
            expert = int(self.ids[token, k]) - self.first
            if not 0 <= expert < len(self.w2["qweight"]):
                continue
            gate_weight, up_weight, down_weight = self.dequantised(expert)
            x = f64(self.x[token])
            gate, up = gate_weight @ x, up_weight @ x
            # Sums of `columns` products; a group's factor is one more of each.
            gate_error, up_error = (2 * columns * U32 * (w.abs() @ x.abs()) for w in (gate_weight, up_weight))
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            weight = float(self.weights[token, k])
            activation = torch.nn.functional.silu(gate) * up * weight
            # silu's slope is below 1.1, and |silu(gate)| <= |gate|.
            error = weight * (1.1 * gate_error * up.abs() + (gate.abs() + gate_error) * up_error)
            error = error + (BF16 + 4 * FUNCTION) * (activation.abs() + error) + 2.0**-133
            out[token] += down_weight @ activation
            sums = (inner + topk) * 2 * U32
            bound[token] += down_weight.abs() @ (error + sums * (activation.abs() + error))
        return out, bound

    def check(self, limit: float = 10.0) -> None:
        actual = self.run(limit)
        assert actual.dtype == torch.float32
        assert_within(actual, *self.expected(limit))
        # The counters are left as they were found.
        assert_exact(self.run(limit), actual)
