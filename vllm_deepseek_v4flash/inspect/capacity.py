"""What a checkpoint takes on each GPU, and how much context the rest of the memory holds: arithmetic only, no vLLM.

Weights and cache pages are exact: the shards are those of `layers/`, the pages those of `kv_cache/page_sizes.py`, the
pool is laid out as vLLM's planner does it. What a step needs on top of these is an estimate (`activation_bytes`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..config import BLOCK_TOKENS, DeepseekV4Config
from ..kv_cache.formats import CacheFormats
from ..kv_cache.page_sizes import kv_bytes_per_token, layer_pages
from ..ops.packed_weight import Scheme, canonical_shapes, shard_problem, shard_scheme

Cut = Literal["rows", "columns", "experts", "vocabulary", "none"]

# vLLM pads the vocabulary to this before it splits it.
_VOCABULARY_PADDING = 64
# With asynchronous scheduling, vLLM's default, two steps are in flight and neither's blocks are free yet.
_STEPS_IN_FLIGHT = 2
_BATCH_SIZES = (16384, 8192, 4096, 2048, 1024, 512, 256)
# Where no step size reaches the model's own context, the largest one that keeps this share of the longest is advised:
# every step reads nearly all experts, so halving it about doubles the time of a long prompt.
_CONTEXT_KEPT = 0.5
# Estimates: CUDA context, allocator and Triton; NCCL's buffers; the ops' chunk buffers of 2^24 fp32 values, four live.
_CONTEXT_RESERVE, _NCCL_RESERVE, _WORKSPACE = 512 << 20, 512 << 20, 4 * 4 << 24

# By native module name; `*` may stand for the layer's and the expert's number.
_CUTS: tuple[tuple[str, Cut], ...] = (
    (r"embed|head", "vocabulary"),
    (r"layers\.[^.]+\.attn\.(wq_b|wo_a|attn_sink)", "rows"),
    (r"layers\.[^.]+\.attn\.wo_b", "columns"),
    (r"layers\.[^.]+\.ffn\.experts\.[^.]+\.w[13]", "rows"),
    (r"layers\.[^.]+\.ffn\.experts\.[^.]+\.w2", "columns"),
    (r"layers\.[^.]+\.ffn\.shared_experts\.w[13]", "rows"),
    (r"layers\.[^.]+\.ffn\.shared_experts\.w2", "columns"),
)


@dataclass(frozen=True)
class ResidentTensor:
    """One native weight as the model holds it; `count` of them are alike."""

    module: str
    shape: tuple[int, ...]
    scheme: Scheme
    value_bytes: int
    """Bytes of one value where the scheme is plain."""
    count: int = 1


@dataclass(frozen=True)
class Limits:
    """The memory of one GPU and how it is used; `gpus` of them share the model by tensor parallelism."""

    gpus: int
    memory: int
    utilization: float
    expert_parallel: bool = False
    max_num_seqs: int = 256


def cut_of(module: str, expert_parallel: bool = False) -> Cut:
    """Along which dimension the ranks of a tensor-parallel group divide a native module (see `layers/`)."""
    for pattern, cut in _CUTS:
        if re.fullmatch(pattern, module):
            return "experts" if expert_parallel and ".ffn.experts." in module else cut
    return "none"


def division_problems(
    config: DeepseekV4Config, tensors: Iterable[ResidentTensor], limits: Limits
) -> list[tuple[str, str]]:
    """(native module or config field, why it cannot be divided over the GPUs): as the layers refuse it at start-up."""
    tp = limits.gpus
    experts = "n_routed_experts" if limits.expert_parallel else "moe_intermediate_size"
    fields = [
        (field, f"is {getattr(config, field)}, which {tp} GPUs do not divide")
        for field in ("num_attention_heads", "o_groups", experts)
        if getattr(config, field) % tp
    ]
    if fields:
        return fields
    found = ((tensor.module, _cut_problem(tensor, limits)) for tensor in tensors)
    return [(module, problem) for module, problem in found if problem is not None]


def _cut_problem(tensor: ResidentTensor, limits: Limits) -> str | None:
    cut, tp, scheme = cut_of(tensor.module, limits.expert_parallel), limits.gpus, tensor.scheme
    if tp == 1 or cut in ("none", "experts"):
        return None
    size = tensor.shape[1 if cut == "columns" else 0]
    if cut == "vocabulary":
        size = _padded_vocabulary(size)
    if size % tp:
        return f"has {size} {'rows' if cut == 'vocabulary' else cut}, which {tp} GPUs do not divide"
    part = [*tensor.shape]
    part[1 if cut == "columns" else 0] = size // tp
    return shard_problem(scheme, (part[0], part[1]), (tensor.shape[0], tensor.shape[1])) if len(part) == 2 else None


def _padded_vocabulary(rows: int) -> int:
    return -(-rows // _VOCABULARY_PADDING) * _VOCABULARY_PADDING


def rank_bytes(tensor: ResidentTensor, limits: Limits) -> int:
    """Bytes of one such weight on each GPU; only for what `division_problems` lets pass.

    Under expert parallelism the average: a GPU holds a block of experts whole.
    """
    cut, tp = cut_of(tensor.module, limits.expert_parallel), limits.gpus
    shape = list(tensor.shape)
    if cut == "vocabulary":
        shape[0] = _padded_vocabulary(shape[0]) // tp
    elif cut in ("rows", "columns"):
        shape[0 if cut == "rows" else 1] //= tp
    if tensor.scheme.kind == "plain":
        total = math.prod(shape) * tensor.value_bytes
    else:
        scheme = shard_scheme(tensor.scheme, (shape[0], shape[1]), (tensor.shape[0], tensor.shape[1]))
        tensors = canonical_shapes(scheme, shape[0], shape[1]).values()
        total = sum(math.prod(size) * dtype.itemsize for size, dtype in tensors)
    return total // tp if cut == "experts" else total


@dataclass(frozen=True)
class CacheGroup:
    """Caches that share a block table: one block holds a page of each."""

    block_tokens: int
    window: int | None
    page_bytes: int

    def blocks(self, tokens: int, in_flight: int) -> int:
        """Blocks that vLLM sets aside for one request of `tokens` tokens, `in_flight` of them not yet settled."""
        if self.window is None:
            return -(-tokens // self.block_tokens)
        held = min(self.window - 1 + in_flight, tokens)
        return -(-held // self.block_tokens) + 1


@dataclass(frozen=True)
class CachePool:
    """vLLM's one pool: every group takes whole blocks of it, so a block is as wide as the widest group."""

    groups: tuple[CacheGroup, ...]

    @property
    def block_bytes(self) -> int:
        return max(group.page_bytes for group in self.groups)

    def blocks(self, tokens: int, batch_tokens: int) -> int:
        """Blocks that one request of `tokens` tokens needs when steps process up to `batch_tokens`."""
        return sum(group.blocks(tokens, _STEPS_IN_FLIGHT * batch_tokens) for group in self.groups)

    def table_bytes(self, tokens: int, requests: int) -> int:
        """The int32 block tables of `requests` requests."""
        return 4 * requests * sum(-(-tokens // group.block_tokens) for group in self.groups)


def cache_pool(config: DeepseekV4Config, formats: CacheFormats) -> CachePool:
    """Group the caches as vLLM 0.32 and 0.33 pack mixed page sizes (block-outermost layout).

    Caches of one kind and block size form a bucket. A bucket that holds as many pages of each size repeats a pattern;
    such buckets are split into groups of about the same number of repeats, so that no group widens the block.
    """
    buckets: dict[tuple[int, int | None], dict[int, int]] = {}
    for layer in range(config.num_hidden_layers):
        for page in layer_pages(config, layer, formats).values():
            counts = buckets.setdefault((page.block_tokens, page.window), {})
            counts[page.page_bytes] = counts.get(page.page_bytes, 0) + 1
    balanced = {key: len(set(counts.values())) == 1 for key, counts in buckets.items()}
    repeats = {key: max(counts.values()) for key, counts in buckets.items()}
    patterns = [repeats[key] for key, counts in buckets.items() if balanced[key] and len(counts) > 1]
    size = _group_size([repeats[key] for key in buckets if balanced[key]], max(patterns)) if patterns else None
    parts = {key: -(-repeats[key] // size) if size and balanced[key] else 1 for key in buckets}
    if size is None and len(buckets) > 1:
        # Without a pattern, windows and states are split until they fit the block that the entries need.
        widest = max(
            sum(
                -(-count // (sum(counts.values()) if key[1] is not None else 1)) * page
                for page, count in counts.items()
            )
            for key, counts in buckets.items()
        )
        for key, counts in buckets.items():
            if key[1] is not None:
                per_block = max(widest // next(iter(counts)), 1)
                parts[key] = max(parts[key], -(-sum(counts.values()) // per_block))
    groups = [
        CacheGroup(*key, sum(len(range(part, count, parts[key])) * page for page, count in counts.items()))
        for key, counts in buckets.items()
        for part in range(parts[key])
    ]
    return CachePool(tuple(groups))


def _group_size(repeats: list[int], smallest: int) -> int:
    """The number of repeats per group that pads the buckets least; of equals, the largest."""
    sizes = range(smallest, max(repeats) + 1)
    return min(sizes, key=lambda size: (sum(-count % size for count in repeats), -size), default=smallest)


def activation_bytes(config: DeepseekV4Config, limits: Limits, batch_tokens: int) -> int:
    """An estimate of what a step of `batch_tokens` needs in addition to weights and cache, on one GPU.

    Per token: the residual streams in and out in 16 bits, and the widest of four fp32 copies of them (hyper-
    connections), q and the attention output with their fp32 copies, the routed experts' rows. Then the fp32 logits
    of `max_num_seqs` requests, gathered and copied by the sampler; the ops' chunk buffers; CUDA's and NCCL's own.
    """
    tp, streams = limits.gpus, config.hc_mult * config.hidden_size
    q = config.num_attention_heads * config.head_dim // tp
    inner = config.moe_intermediate_size // (1 if limits.expert_parallel else tp)
    experts = config.num_experts_per_tok * 2 * (3 * inner + config.hidden_size)
    per_token = 2 * 2 * streams + max(4 * 4 * streams, (3 * 2 + 2 * 4) * q, experts)
    logits = 4 * 4 * min(limits.max_num_seqs, batch_tokens) * config.vocab_size
    reserve = _CONTEXT_RESERVE + (_NCCL_RESERVE if tp > 1 else 0)
    return batch_tokens * per_token + logits + _WORKSPACE + reserve


@dataclass(frozen=True)
class Fit:
    """What one choice of --max-num-batched-tokens leaves. Bytes are those of one GPU."""

    batch_tokens: int
    activations: int
    cache: int
    """Bytes left for the cache pool; negative where the weights do not fit."""
    context: int
    """Tokens of entries that the pool holds next to one request's windows and states; 0 if it cannot start."""
    max_model_len: int
    """Largest --max-model-len that vLLM accepts, at most the model's own; 0 if it cannot start."""


@dataclass(frozen=True)
class Capacity:
    """What fits on `limits`; `best` is the recommended choice among `fits`, None if none can start."""

    limits: Limits
    weights: int
    by_part: dict[str, int]
    pool: CachePool
    kv_bytes_per_token: float
    request_bytes: int
    """Pool memory of one decoding request without its entries: windows and states, rounded up to blocks."""
    fits: tuple[Fit, ...]
    best: Fit | None

    @property
    def budget(self) -> int:
        return int(self.limits.memory * self.limits.utilization)


def plan_capacity(
    config: DeepseekV4Config, tensors: Iterable[ResidentTensor], formats: CacheFormats, limits: Limits
) -> Capacity:
    """Divide the memory of one GPU between weights, a step and the cache pool."""
    by_part = {"routed experts": 0, "other divided weights": 0, "weights copied to every GPU": 0}
    for tensor in tensors:
        cut = cut_of(tensor.module, limits.expert_parallel)
        parts = list(by_part)
        part = parts[0] if ".ffn.experts." in tensor.module else parts[2] if cut == "none" else parts[1]
        by_part[part] += rank_bytes(tensor, limits) * tensor.count
    weights, pool = sum(by_part.values()), cache_pool(config, formats)
    left = int(limits.memory * limits.utilization) - weights
    sizes = [size for size in _BATCH_SIZES if size <= max(_BATCH_SIZES[-1], config.max_position_embeddings)]
    fits = tuple(_fit(config, limits, pool, left, size) for size in sizes)
    longest = max(fit.max_model_len for fit in fits)
    enough = longest
    if longest < config.max_position_embeddings:
        enough = max(1, int(longest * _CONTEXT_KEPT))
    best = next((fit for fit in fits if longest and fit.max_model_len >= enough), None)
    windows = sum(group.blocks(1 << 62, _STEPS_IN_FLIGHT) for group in pool.groups if group.window is not None)
    per_token, per_request = kv_bytes_per_token(config, formats), windows * pool.block_bytes
    return Capacity(limits, weights, by_part, pool, per_token, per_request, fits, best)


def _fit(config: DeepseekV4Config, limits: Limits, pool: CachePool, left: int, batch_tokens: int) -> Fit:
    activations = activation_bytes(config, limits, batch_tokens)
    cache = left - activations

    def starts(tokens: int) -> bool:
        # vLLM keeps one block of the pool for itself.
        needed = (pool.blocks(tokens, batch_tokens) + 1) * pool.block_bytes
        return needed + pool.table_bytes(tokens, limits.max_num_seqs) <= cache

    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if starts(middle) else (low, middle - 1)
    if low == 0:
        return Fit(batch_tokens, activations, cache, 0, 0)
    tables = pool.table_bytes(low, limits.max_num_seqs)
    entries_free = (cache - tables) // pool.block_bytes - 1
    entries_free -= sum(
        group.blocks(low, _STEPS_IN_FLIGHT * batch_tokens) for group in pool.groups if group.window is not None
    )
    return Fit(batch_tokens, activations, cache, entries_free * BLOCK_TOKENS, low)
