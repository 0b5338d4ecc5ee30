"""The routed experts over packed weights at DeepSeek-V4-Flash's shapes, compared with vLLM's Marlin kernels.

    python -m benchmarks.moe [--only int4 fp4] [--budget SECONDS] [--out DIR] [--dry-run]

Every case is compared with the PyTorch reference on sampled tokens and then timed; `roofline.py` describes how. Tokens
choose experts at random. Bytes are those of the experts that so many tokens choose on average, read once, and of the
tokens. All calls use one layer's weights: while there are enough experts, a call chooses others than the previous call,
and with more tokens the weights are many times as large as an L2.

The exit status is 1 if a result differs from its reference by more than its bound, or if a kernel does not run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from vllm_deepseek_v4flash.ops.cuda.library import built
from vllm_deepseek_v4flash.ops.packed_weight import Scheme, canonical_shapes

from . import roofline, vllm_kernels
from .flash_cases import CHOSEN, EXPERTS, HIDDEN, INNER, WEIGHTS
from .report import Row
from .roofline import Aim, Bench, Case, Peer, UnavailableError, Work, compare, kernel_and_reference, sampled

BF16 = torch.bfloat16
MOST_TOKENS = 32  # of csrc/'s kernels
# Gate and up, the activation and an expert's output are rounded to bf16; each may go to a neighbour of the reference's.
OURS = 4 * 2.0**-8
# Marlin rounds each weighted output of an expert again, and may sum in bf16.
MARLIN = 8 * 2.0**-8
LIMIT = 10.0


@dataclass(frozen=True)
class Sizes:
    hidden: int = HIDDEN
    experts: int = EXPERTS
    chosen: int = CHOSEN
    inners: tuple[int, ...] = (INNER, INNER // 2)
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)


FLASH = Sizes()
TINY = Sizes(hidden=128, experts=8, chosen=2, inners=(128,), tokens=(1, 6))


@dataclass(frozen=True)
class Layer:
    """The experts of one layer."""

    w13: dict[str, torch.Tensor]
    w2: dict[str, torch.Tensor]
    scheme: Scheme


def layer_of(bench: Bench, s: Sizes, weight: str, inner: int) -> Layer:
    """One layer's random weights, which all cases of this format and width share."""
    key = ("experts", weight, inner)
    if key not in bench.store:
        for other in [k for k in bench.store if k[0] in ("experts", "marlin")]:
            del bench.store[other]
        scheme = WEIGHTS[weight]
        w13, w2 = (
            {
                name: _random(scheme, name, (*stack, *shape), dtype, bench.device)
                for name, (shape, dtype) in canonical_shapes(scheme, n, k).items()
            }
            for stack, n, k in (((s.experts, 2), inner, s.hidden), ((s.experts,), s.hidden, inner))
        )
        bench.store[key] = Layer(w13, w2, scheme)
    return bench.store[key]


def _random(
    scheme: Scheme, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """All codes, and scales such that a row's products with unit values sum to about one."""
    if name == "qweight":
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    if scheme.kind == "fp4":
        return torch.randint(118, 122, shape, dtype=torch.uint8, device=device)
    return (torch.rand(shape, device=device) * 0.005 + 0.001).to(dtype)


def routing(bench: Bench, s: Sizes, tokens: int, copies: int) -> list[torch.Tensor]:
    """Random distinct experts [tokens, chosen] for each of `copies` calls."""
    found: list[torch.Tensor] = []
    for _ in range(copies):
        rank = torch.rand((tokens, s.experts), device=bench.device)
        if found and 2 * tokens * s.chosen <= s.experts // 2:
            rank[:, found[-1].flatten()] = -1.0
        found.append(rank.topk(s.chosen).indices)
    return found


def distinct(s: Sizes, tokens: int) -> float:
    """How many experts so many tokens choose on average."""
    return s.experts * (1 - (1 - s.chosen / s.experts) ** tokens)


def expert_bytes(weight: str, s: Sizes, inner: int) -> float:
    scheme = WEIGHTS[weight]
    scale = 1 if scheme.kind == "fp4" else 2
    return 3 * s.hidden * inner * (0.5 + scale / scheme.group_size)


def aims_of(tokens: int) -> list[Aim]:
    """The goals of the kernels on an H100."""

    def beats(times: float) -> Aim:
        return Aim(f"{times} times Marlin's speed", lambda row: None if row.ratio is None else row.ratio >= times)

    def streams(percent: int) -> Aim:
        def met(row: Row) -> bool | None:
            return None if row.bandwidth_percent is None else row.bandwidth_percent >= percent

        return Aim(f"{percent} % of the copy bandwidth", met)

    if tokens <= 8:
        return [streams(85), beats(1.5)]
    if tokens == 32:
        return [streams(80), beats(1.0)]
    return [beats(1.2)] if tokens >= 2048 else [beats(1.0)]


def ours(bench: Bench, kernels: str) -> Any:
    """`packed_experts` in Triton's kernels, or in those of csrc/."""
    if kernels == "triton":
        return kernel_and_reference("packed_experts")[0]
    if bench.device.type != "cuda":
        raise UnavailableError("csrc/'s kernels need a GPU")
    if not built():
        raise UnavailableError("csrc/ was not compiled: install the package on a machine with nvcc")
    return importlib.import_module("vllm_deepseek_v4flash.ops.cuda.packed_experts").packed_experts


def experts_case(s: Sizes, weight: str, inner: int, tokens: int, kernels: str) -> Case:
    moved = distinct(s, tokens) * expert_bytes(weight, s, inner) + tokens * s.hidden * (2 + 4)

    def build(bench: Bench) -> Work:
        call, (_, reference) = ours(bench, kernels), kernel_and_reference("packed_experts")
        layer = layer_of(bench, s, weight, inner)
        inputs = [
            (
                torch.randn((tokens, s.hidden), device=bench.device, dtype=BF16),
                torch.rand((tokens, s.chosen), device=bench.device),
                ids,
            )
            for ids in routing(bench, s, tokens, bench.copies(int(moved)))
        ]
        weights = layer.w13, layer.w2, layer.scheme, layer.scheme
        calls = [partial(call, x, *weights, *chosen, swiglu_limit=LIMIT) for x, *chosen in inputs]
        pick = sampled(tokens)

        def near(found: torch.Tensor, bound: float) -> str:
            x, *chosen = (value[pick] for value in inputs[0])
            expected = reference(x, *weights, *chosen, swiglu_limit=LIMIT)
            return f"{compare('the result', found[pick].float(), expected, bound):.1e} of {bound:.1e}"

        marlin = Peer("Marlin", lambda: marlin_work(bench, layer, (weight, inner), inputs, near))
        return Work(calls, lambda: near(calls[0](), OURS), [marlin])

    label = f"{weight}, {tokens} tokens, intermediate {inner}, {kernels}"
    return Case(weight, label, int(moved), 6 * tokens * s.chosen * s.hidden * inner, build, aims_of(tokens))


def marlin_work(bench: Bench, layer: Layer, key: tuple[str, int], inputs: Sequence[Any], near: Any) -> Work:
    """vLLM's Marlin experts on the same weights, repacked as by its loader."""
    experts = vllm_kernels.load(bench, "vllm.model_executor.layers.fused_moe.experts.marlin_moe")
    activation = vllm_kernels.load(bench, "vllm.model_executor.layers.fused_moe.activation")
    types = vllm_kernels.load(bench, "vllm.scalar_type").scalar_types
    if ("marlin", *key) not in bench.store:
        repacked = marlin_int4 if layer.scheme.kind == "int4" else marlin_fp4
        bench.store["marlin", *key] = repacked(bench, layer)
    (q13, s13), (q2, s2) = bench.store["marlin", *key]
    weight_type = types.uint4b8 if layer.scheme.kind == "int4" else types.float4_e2m1f

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return experts.fused_marlin_moe(
            x, q13, q2, None, None, s13, s2, weights, ids, weight_type.id,
            activation_config=activation.ApplyMoEActivationConfig(clamp_limit=LIMIT),
        )  # fmt: skip

    calls = [partial(call, x, weights, ids.int()) for x, weights, ids in inputs]
    return Work(calls, lambda: near(calls[0](), MARLIN))


def marlin_int4(bench: Bench, layer: Layer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scales of w1 and w3 as one matrix, and of w2, in Marlin's layouts."""
    ops = vllm_kernels.load(bench, "vllm._custom_ops")
    utils = vllm_kernels.load(bench, "vllm.model_executor.layers.quantization.utils.marlin_utils")
    found = []
    for weight in ({n: t.flatten(1, 2) for n, t in layer.w13.items()}, layer.w2):
        # As in GPTQ, which stores them transposed, a word has eight columns of a row, the first in its lowest bits.
        codes = weight["qweight"].view(torch.int32).transpose(1, 2).contiguous()
        scales = weight["scales"].transpose(1, 2).contiguous()
        k, n = 8 * codes.shape[1], codes.shape[2]
        codes = ops.gptq_marlin_moe_repack(codes, k, n, 4)
        found.append((codes, utils.marlin_moe_permute_scales(scales, k, n, layer.scheme.group_size)))
    return found


def marlin_fp4(bench: Bench, layer: Layer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Like `marlin_int4`, with vLLM's function for weights in DeepSeek's format."""
    utils = vllm_kernels.load(bench, "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4")
    w13 = {name: tensor.flatten(1, 2) for name, tensor in layer.w13.items()}
    q13, q2, s13, s2, *_ = utils.prepare_moe_mxfp4_layer_for_marlin(
        SimpleNamespace(params_dtype=BF16), w13["qweight"], layer.w2["qweight"], w13["scales"], layer.w2["scales"],
        None, None,
    )  # fmt: skip
    return [(q13, s13), (q2, s2)]


def all_cases(dry: bool) -> list[Case]:
    s = TINY if dry else FLASH
    return [
        experts_case(s, weight, inner, tokens, kernels)
        for weight in ("int4", "fp4")
        for inner in s.inners
        for tokens in s.tokens
        for kernels in (("triton", "cuda") if tokens <= MOST_TOKENS else ("triton",))
    ]


def main(arguments: Sequence[str]) -> int:
    return roofline.main(arguments, name="moe", title="Routed experts over packed weights", cases=all_cases)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
