"""Kernels that break one bound each, and one that breaks none; run as the compile table is."""

import sys

import torch
import triton
import triton.language as tl

from benchmarks.flash_cases import Case
from checks import compile_table
from vllm_deepseek_v4flash.ops.triton.launch import launch


@triton.jit
def _modest(x, out, count):
    n = tl.arange(0, 128)
    if count is None:
        tl.store(out + n, tl.load(x + n))
    else:
        tl.store(out + n, tl.load(x + n, mask=n < count, other=0.0), mask=n < count)


@triton.jit
def _spilling(x, out, N: tl.constexpr):
    n = tl.arange(0, N)
    values = tl.load(x + n)
    # All values wait for the sum: far more than one warp has registers for.
    tl.store(out + n, values / tl.sum(values))


@triton.jit
def _sprawling(x, out, count, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.zeros((N, N), tl.float32)
    for step in range(count):
        at = x + step * N * K
        total = tl.dot(tl.load(at + m * K + k[None, :]), tl.load(at + k[:, None] * N + n), total)
    tl.store(out + m * N + n, total)


@triton.jit
def _modern(x, out):
    n = tl.arange(0, 128)
    tl.store(out + n, tl.load(x + n).to(tl.float8e4nv).to(tl.uint8, bitcast=True))


def floats(count):
    return torch.empty(count, device="meta")


def halves(count):
    return torch.empty(count, device="meta", dtype=torch.bfloat16)


def modest(count):
    launch(_modest, (1,), floats(128), floats(128), count)


CASES = [
    *(Case("modest", {"count": count}, lambda count=count: modest(count)) for count in (1, 5, 7, 16, 32)),
    Case("modest", {"count": "5, misaligned"}, lambda: launch(_modest, (1,), floats(129)[1:], floats(128), 5)),
    Case("wide", {}, lambda: launch(_modest, (1, 65536), floats(128), floats(128), None)),
    Case("spilling", {}, lambda: launch(_spilling, (1,), floats(1 << 14), floats(1 << 14), N=1 << 14, num_warps=1)),
    Case(
        "sprawling", {},
        lambda: launch(_sprawling, (1,), halves(1 << 20), floats(1 << 14), 8, N=128, K=256, num_warps=8, num_stages=4),
    ),
    Case("modern", {}, lambda: launch(_modern, (1,), floats(128), torch.empty(128, device="meta", dtype=torch.uint8))),
]  # fmt: skip

if __name__ == "__main__":
    sys.exit(compile_table.main(sys.argv[1:], CASES))
