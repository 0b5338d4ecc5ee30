"""The family of work that a GPU kernel belongs to, and the time of each family in a profile, in ms a step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache

from .environment import ROOT

TRITON = ROOT / "vllm_deepseek_v4flash" / "ops" / "triton"
FAMILIES = ("attention", "indexer", "compressor", "MoE", "mHC", "linears", "other", "idle")
# By the kernel's file in ops/triton/. Other files have functions that kernels call, or are "other".
FILES = {
    "sparse_attention": "attention", "sparse_attention_keys": "attention", "sparse_attention_rows": "attention",
    "qnorm_rope_kv_insert": "attention",
    "indexer_topk": "indexer", "topk": "indexer", "hadamard": "indexer",
    "compress": "compressor",
    "experts": "MoE", "fused_experts": "MoE", "packed_experts": "MoE", "route": "MoE", "swiglu": "MoE",
    "mhc": "mHC", "mhc_pre": "mHC", "mhc_post": "mHC", "mhc_post_pre": "mHC", "mhc_head": "mHC",
    "packed_linear": "linears",
}  # fmt: skip
# Kernels of csrc/, vLLM and libraries, by the first pattern found anywhere in the name.
_PATTERNS = (
    ("MoE", r"gate_up|\bdown\b|down<|marlin_moe|moe|expert|topk_softplus|topk_hash|grouped_gemm|silu_and_mul"),
    ("indexer", r"indexer|mqa_logits|topk|top_k|radix"),
    ("compressor", r"compress|save_partial"),
    ("mHC", r"mhc|hc_(pre|post|head)|sinkhorn"),
    ("attention", r"flash|mla|attn|attention|rope|kv_insert|kv_cache|sparse"),
    ("linears", r"gemm|gemv|nvjet|cutlass|marlin|machete|cublas|splitk|matmul|xmma"),
)


@cache
def triton_kernels() -> dict[str, str]:
    """The family of every function that Triton compiles in our ops, by name."""
    found: dict[str, str] = {}
    for path in sorted(TRITON.glob("*.py")):
        for name in re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)\(", path.read_text(), re.MULTILINE):
            found[name] = FILES.get(path.stem, "other")
    return found


def family(kernel: str) -> str:
    """The family of a kernel by its name in the profiler."""
    ours = triton_kernels().get(kernel)
    if ours is not None:
        return ours
    return next((name for name, pattern in _PATTERNS if re.search(pattern, kernel, re.IGNORECASE)), "other")


Event = tuple[str, float, float]
"""A kernel's name, its start and its end, in µs."""


def milliseconds(events: Sequence[Event], steps: int) -> dict[str, float]:
    """The time of each family in a step. idle: between the first start and the last end, when no kernel runs."""
    found = dict.fromkeys(FAMILIES, 0.0)
    for name, start, end in events:
        found[family(name)] += end - start
    if events:
        span = max(end for *_, end in events) - min(start for _, start, _ in events)
        found["idle"] = max(0.0, span - covered((start, end) for _, start, end in events))
    return {name: time / 1000 / steps for name, time in found.items()}


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def unknown(events: Sequence[Event], most: int = 8) -> list[str]:
    """The slowest kernels of the family "other", with shortened names: new kernels show here."""
    times: dict[str, float] = {}
    for name, start, end in events:
        if family(name) == "other":
            times[name] = times.get(name, 0.0) + end - start
    return [f"{name[:80]} ({times[name] / 1000:.2f} ms)" for name in sorted(times, key=lambda n: -times[n])[:most]]
