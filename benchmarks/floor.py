"""The minimum for DeepSeek-V4-Flash with 4-bit weights on a GPU: a step's bytes and operations, by layer kind.

From the shapes (docs/model.md, "Tensors" and "Caches"): each weight and each cached row that a step needs is read once,
and as many experts as that number of tokens chooses on average. Rows are fp8, a compressor's weights bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("window", "CSA", "HCA")
FLASH_LAYERS: dict[str, int] = {"window": 2, "CSA": 21, "HCA": 20}

EXPERTS, CHOSEN, WINDOW, TOPK = 256, 6, 128, 512
PACKED = 0.5 + 2 / 128
"""Bytes of a 4-bit value with its share of a 16-bit scale for 128 values."""
_BF16, _FP32 = 2, 4
# Parameters of one layer.
ATTENTION, EXPERT, GATE, MIXING = 106.95e6, 3 * 4096 * 2048, 256 * 4096, 2 * 24 * 4 * 4096
INDEX_QUERIES, INDEX_WEIGHTS = 64 * 128 * 1024, 64 * 4096
COMPRESSOR = {"window": 0, "CSA": 2 * 1024 * 4096, "HCA": 2 * 512 * 4096}
INDEX_COMPRESSOR = 2 * 256 * 4096
HEAD = 129280 * 4096
# Bytes of a cached row, and operations of all heads of a query with one row: a product and a sum, twice.
ROW, KEY = 584, 132
CORE, SCORE = 2 * 2 * 64 * 512, 2 * 64 * 128


@dataclass(frozen=True)
class Cost:
    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.bytes * times, self.flops * times)

    def seconds(self, gb_per_s: float, tflop_per_s: float) -> float:
        return max(self.bytes / gb_per_s / 1e9, self.flops / tflop_per_s / 1e12)


def distinct_experts(tokens: int) -> float:
    """How many of the 256 experts that many tokens choose on average."""
    return EXPERTS * (1 - (1 - CHOSEN / EXPERTS) ** tokens)


def dense_bytes(kind: str) -> float:
    """The weights that a layer reads, without the routed experts'."""
    plain = COMPRESSOR[kind] * _BF16
    packed = ATTENTION + EXPERT
    if kind == "CSA":
        plain += (INDEX_COMPRESSOR + INDEX_WEIGHTS) * _BF16
        packed += INDEX_QUERIES
    return packed * PACKED + plain + GATE * _BF16 + MIXING * _FP32


def linear_flops(kind: str) -> float:
    """Operations of one token's products with a layer's weights."""
    index = INDEX_COMPRESSOR + INDEX_QUERIES + INDEX_WEIGHTS if kind == "CSA" else 0
    return 2 * (ATTENTION + (1 + CHOSEN) * EXPERT + GATE + MIXING + COMPRESSOR[kind] + index)


def keys(kind: str, context: int) -> float:
    """Rows that one query attends to."""
    entries = {"window": 0, "CSA": min(context / 4, TOPK), "HCA": context / 128}[kind]
    return min(context, WINDOW) + entries


def decode_layer(kind: str, batch: int, context: int) -> Cost:
    """One layer's step of `batch` requests, each with `context` tokens."""
    rows, scored = keys(kind, context), context / 4 if kind == "CSA" else 0
    routed = distinct_experts(batch) * EXPERT * PACKED
    return Cost(
        dense_bytes(kind) + routed + batch * (rows * ROW + scored * KEY),
        batch * (linear_flops(kind) + rows * CORE + scored * SCORE),
    )


def decode(layers: Mapping[str, int], batch: int, context: int) -> Cost:
    """A whole step, the head included. layers: how many of each kind."""
    head = Cost(HEAD * _BF16, batch * 2 * HEAD)
    return sum((decode_layer(kind, batch, context) * count for kind, count in layers.items()), head)


def weight_bytes(layers: Mapping[str, int]) -> float:
    """All weights, with embedding and head."""
    experts = EXPERTS * EXPERT * PACKED
    return 2 * HEAD * _BF16 + sum(count * (dense_bytes(kind) + experts) for kind, count in layers.items())


def cache_bytes(layers: Mapping[str, int], context: int) -> float:
    """The entries of one sequence; windows and states, which do not grow, are left out."""
    per_token = {"window": 0.0, "CSA": (ROW + KEY) / 4, "HCA": ROW / 128}
    return context * sum(count * per_token[kind] for kind, count in layers.items())


def prefill(layers: Mapping[str, int], tokens: int, chunk: int) -> Cost:
    """One causal sequence, in chunks that each read all weights."""
    steps = -(-tokens // chunk)
    total = Cost(HEAD * _BF16 * steps, 2 * HEAD * steps)
    for kind, count in layers.items():
        weights = dense_bytes(kind) + distinct_experts(min(tokens, chunk)) * EXPERT * PACKED
        flops = tokens * linear_flops(kind)
        if kind == "CSA":
            flops += SCORE * tokens**2 / 8 + CORE * (WINDOW + TOPK) * tokens
        elif kind == "HCA":
            flops += CORE * (WINDOW * tokens + tokens**2 / 256)
        else:
            flops += CORE * WINDOW * tokens
        total += Cost(weights * steps, flops) * count
    return total
