"""Hyper-connections, and the router."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from .. import roofline, vllm_kernels
from ..flash_cases import EPS
from ..inputs import Sizes
from ..roofline import Aim, Bench, Case, Work, WrongResultError, compare, sampled
from .common import BF16, BF16_ROUNDING, HC_EPS, known


def mhc_inputs(s: Sizes, bench: Bench, tokens: int, outputs: int) -> tuple[torch.Tensor, ...]:
    """streams, fn, base. With this fn the mixes are about normally distributed."""
    width = s.streams * s.hidden
    return (
        torch.randn((tokens, s.streams, s.hidden), device=bench.device, dtype=BF16),
        torch.randn((outputs, width), device=bench.device) * width**-0.5,
        torch.randn(outputs, device=bench.device),
    )


def mhc_post_pre_case(s: Sizes, tokens: int) -> Case:
    n, outputs, width = s.streams, (2 + s.streams) * s.streams, s.streams * s.hidden
    moved = 4 * outputs * width + tokens * (2 * 2 * (width + s.hidden) + 2 * 4 * (n + n * n)) + 2 * s.hidden
    options = {"norm_eps": EPS, "hc_eps": HC_EPS, "sinkhorn_iters": s.sinkhorn}

    def build(bench: Bench) -> Work:
        kernel, reference = roofline.kernel_and_reference("mhc_post_pre")

        def make() -> tuple[torch.Tensor, ...]:
            streams, fn, base = mhc_inputs(s, bench, tokens, outputs)
            x = torch.randn((tokens, s.hidden), device=bench.device, dtype=BF16)
            post, comb = (torch.rand((tokens, *shape), device=bench.device) for shape in ((n,), (n, n)))
            weight = torch.ones(s.hidden, device=bench.device, dtype=BF16)
            return x, streams, post, comb, fn, torch.ones(3, device=bench.device), base, weight

        inputs = [make() for _ in range(bench.copies(moved))]
        pick = sampled(tokens)

        def expected() -> tuple[torch.Tensor, ...]:
            return reference(*(x[pick] for x in inputs[0][:4]), *inputs[0][4:], **options)

        def near(found: Sequence[torch.Tensor]) -> str:
            return check_mhc([out[pick] for out in found], expected(), width)

        calls = [partial(kernel, *x, **options) for x in inputs]
        return Work(calls, lambda: near(calls[0]()), vllm_kernels.mhc_post_pre(bench, inputs, options, near))

    aims = [Aim("under 10 µs", lambda row: known(row.us, lambda us: us < 10))] if tokens == 8 else []
    return Case("mhc_post_pre", f"{tokens} tokens", moved, 2 * tokens * outputs * width, build, aims)


def check_mhc(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], width: int) -> str:
    """Compare streams, x, post and comb."""
    told = []
    for name, actual, reference in zip(("streams", "x", "post", "comb"), found, expected, strict=True):
        # x is rounded before and after its norm. A sum of `width` products may lose one rounding at each. A value of a
        # stream that is rounded to the other neighbour moves the mixes by more than a short sum loses.
        bound = 4 * BF16_ROUNDING if name in ("streams", "x") else max(width, 1 << 13) * 2.0**-24
        told.append(f"{name} {compare(name, actual.flatten(1), reference.flatten(1), bound):.1e} of {bound:.1e}")
    return ", ".join(told)


def mhc_head_case(s: Sizes, tokens: int) -> Case:
    width = s.streams * s.hidden
    moved = 4 * s.streams * width + tokens * 2 * (width + s.hidden)
    options = {"norm_eps": EPS, "hc_eps": HC_EPS}

    def build(bench: Bench) -> Work:
        kernel, reference = roofline.kernel_and_reference("mhc_head")
        inputs = []
        for _ in range(bench.copies(moved)):
            streams, fn, base = mhc_inputs(s, bench, tokens, s.streams)
            inputs.append((streams, fn, torch.ones(1, device=bench.device), base))
        pick, bound = sampled(tokens), 2 * BF16_ROUNDING

        def near(found: torch.Tensor) -> str:
            expected = reference(inputs[0][0][pick], *inputs[0][1:], **options)
            return f"{compare('the result', found[pick], expected, bound):.1e} of {bound:.1e}"

        calls = [partial(kernel, *x, **options) for x in inputs]
        return Work(calls, lambda: near(calls[0]()), vllm_kernels.mhc_head(bench, inputs, options, near))

    return Case("mhc_head", f"{tokens} tokens", moved, 2 * tokens * s.streams * width, build)


def route_case(s: Sizes, tokens: int) -> Case:
    moved = tokens * (4 * s.experts + (4 + 8) * s.chosen) + 4 * s.experts

    def build(bench: Bench) -> Work:
        kernel, reference = roofline.kernel_and_reference("route")
        bias = torch.rand(s.experts, device=bench.device)
        inputs = [torch.randn((tokens, s.experts), device=bench.device) for _ in range(bench.copies(moved))]
        options = {"bias": bias, "expert_ids": None, "scaling": 1.5, "renormalize": True}
        pick = sampled(tokens, 64)

        def near(found: tuple[torch.Tensor, torch.Tensor]) -> str:
            (weights, ids), (expected, chosen) = found, reference(inputs[0][pick], s.chosen, **options)
            if not torch.equal(ids[pick].long(), chosen):
                raise WrongResultError("the chosen experts are not the reference's")
            # A softplus, a square root, a sum of `chosen` and a division: each within a few units of 2^-23.
            bound = 32 * 2.0**-23
            return f"same experts, weights {compare('a weight', weights[pick], expected, bound):.1e} of {bound:.1e}"

        calls = [partial(kernel, x, s.chosen, **options) for x in inputs]
        return Work(calls, lambda: near(calls[0]()), [vllm_kernels.route(bench, inputs, bias, s.chosen, near)])

    return Case("route", f"{tokens} tokens, {s.chosen} of {s.experts}", moved, 0, build)
