"""What fits is worked out as the layers shard and as vLLM's planner lays out its pool."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from testing.flash import FLASH
from vllm_deepseek_v4flash.compat import SlidingWindowMLASpec
from vllm_deepseek_v4flash.config import DeepseekV4Config
from vllm_deepseek_v4flash.inspect.capacity import (
    CacheGroup,
    Capacity,
    Limits,
    ResidentTensor,
    cache_pool,
    cut_of,
    division_problems,
    plan_capacity,
    rank_bytes,
)
from vllm_deepseek_v4flash.kv_cache.formats import CacheFormats
from vllm_deepseek_v4flash.kv_cache.page_sizes import layer_pages
from vllm_deepseek_v4flash.kv_cache.paged_cache import layer_specs
from vllm_deepseek_v4flash.ops.packed_weight import QuantizationError, Scheme, shard_scheme

GIB = 1 << 30
CONFIG = DeepseekV4Config.from_dict(FLASH)
TWO = Limits(gpus=2, memory=80 * GIB, utilization=0.92)
ONE = dataclasses.replace(TWO, gpus=1)
PLAIN = Scheme("plain")
INT4 = Scheme("int4", group_size=128, scale_dtype=torch.float16)
WITH_ZEROS = dataclasses.replace(INT4, zero_points=True)


# Without CSA, windows only, CSA only, and a schedule like V4-Pro's.
POOLS = [
    ((0, 0, *[128] * 8), [*[(64, 37312)] * 10, (256, 9344), *[(8, 32768)] * 8]),
    ((0,) * 5, [(64, 186560)]),
    ((4,) * 6, [(64, 223872), (256, 273792), (4, 245760)]),
    ((128, 128, *[4, 128] * 29, 4), [(64, 1156672), (64, 1119360), (256, 1405168), (8, 1015808), (4, 1228800)]),
]


def formats(rows: str = "fp8", index: str = "auto") -> CacheFormats:
    return CacheFormats.select(CONFIG, rows, index, torch.bfloat16)


def with_ratios(*ratios: int) -> DeepseekV4Config:
    values = {**FLASH, "num_hidden_layers": len(ratios), "compress_ratios": list(ratios), "num_hash_layers": 0}
    return DeepseekV4Config.from_dict(values)


@pytest.mark.parametrize(
    ("rows", "index", "block"), [("fp8", "auto", 981632), ("fp8", "fp4", 898304), ("bfloat16", "auto", 1761280)]
)
def test_the_pool_is_laid_out_as_vllm_plans_it(rows: str, index: str, block: int) -> None:
    """The figures are those of vLLM 0.32's planner for these specs; 128k tokens, 8k of them in flight."""
    pool = cache_pool(CONFIG, formats(rows, index))
    assert pool.block_bytes == block
    assert [(g.block_tokens, g.window) for g in pool.groups] == [(64, 128), (64, 128), (256, None), (4, 8), (8, 128)]
    assert pool.blocks(131072, 4096) == 3866


@pytest.mark.parametrize(("ratios", "groups"), POOLS)
def test_pools_of_other_schedules(ratios: tuple[int, ...], groups: list[tuple[int, int]]) -> None:
    """Tokens a block and bytes of its pages for each group, as vLLM 0.32's own planner groups these specs."""
    pool = cache_pool(with_ratios(*ratios), formats())
    assert [(group.block_tokens, group.page_bytes) for group in pool.groups] == groups


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("index", ["fp8", "fp4"])
def test_pages_and_held_blocks_are_those_of_vllms_specs(layer: int, index: str) -> None:
    pages, specs = layer_pages(CONFIG, layer, formats(index=index)), layer_specs(CONFIG, layer, formats(index=index))
    assert set(pages) == set(specs)
    for name, page in pages.items():
        spec = specs[name][0]
        assert spec.page_size_bytes == page.page_bytes
        group = CacheGroup(page.block_tokens, page.window, page.page_bytes)
        for tokens, in_flight in ((1, 512), (100, 512), (5000, 4096), (100000, 4096)):
            if isinstance(spec, SlidingWindowMLASpec):
                expected = spec.max_admission_blocks_per_request(in_flight, tokens)
            else:
                expected = -(-tokens // spec.block_size)
            assert group.blocks(tokens, in_flight) == expected


@pytest.mark.parametrize(
    ("module", "cut"),
    [
        ("embed", "vocabulary"),
        ("head", "vocabulary"),
        ("norm", "none"),
        ("hc_head_fn", "none"),
        ("layers.*.attn.wq_a", "none"),
        ("layers.7.attn.wq_b", "rows"),
        ("layers.*.attn.indexer.wq_b", "none"),
        ("layers.*.attn.attn_sink", "rows"),
        ("layers.*.attn.wkv", "none"),
        ("layers.*.attn.compressor.wkv", "none"),
        ("layers.*.attn.wo_a", "rows"),
        ("layers.*.attn.wo_b", "columns"),
        ("layers.*.ffn.gate", "none"),
        ("layers.*.ffn.experts.*.w1", "rows"),
        ("layers.3.ffn.experts.12.w2", "columns"),
        ("layers.*.ffn.shared_experts.w3", "rows"),
        ("layers.*.ffn.shared_experts.w2", "columns"),
    ],
)
def test_cuts_are_those_of_the_layers(module: str, cut: str) -> None:
    assert cut_of(module) == cut
    assert cut_of(module, expert_parallel=True) == ("experts" if ".ffn.experts." in module else cut)


def tensor(module: str, shape: tuple[int, ...], scheme: Scheme = PLAIN, count: int = 1) -> ResidentTensor:
    return ResidentTensor(module, shape, scheme, 2, count)


@pytest.mark.parametrize(
    ("module", "shape", "scheme", "one", "two"),
    [
        ("layers.*.attn.wq_a", (1024, 4096), PLAIN, 2 * 1024 * 4096, 2 * 1024 * 4096),
        ("layers.*.attn.wo_b", (4096, 8192), PLAIN, 2 * 4096 * 8192, 4096 * 8192),
        ("embed", (129281, 64), PLAIN, 2 * 129344 * 64, 129344 * 64),  # padded to a multiple of 64
        ("layers.*.attn.wo_b", (4096, 8192), INT4, 4096 * 8192 * 33 // 64, 4096 * 4096 * 33 // 64),
        # Zero points are a byte a group, whatever the file packs them into.
        ("layers.*.attn.wo_b", (4096, 8192), WITH_ZEROS, 4096 * (4096 + 64 * 3), 4096 * (2048 + 32 * 3)),
        # One scale a row, on both ranks.
        ("layers.*.attn.wo_b", (64, 256), dataclasses.replace(INT4, group_size=256), 64 * 130, 64 * 66),
        ("layers.*.ffn.experts.*.w1", (2048, 4096), Scheme("fp4", 32), 2048 * 2176, 1024 * 2176),
        ("layers.*.attn.wq_b", (32768, 1024), Scheme("fp8", 128), 32768 * 1024 + 8192, 16384 * 1024 + 4096),
    ],
)
def test_bytes_of_one_weight(module: str, shape: tuple[int, ...], scheme: Scheme, one: int, two: int) -> None:
    assert rank_bytes(tensor(module, shape, scheme), ONE) == one
    assert rank_bytes(tensor(module, shape, scheme), TWO) == two


def test_expert_parallelism_keeps_experts_whole() -> None:
    w2 = tensor("layers.*.ffn.experts.*.w2", (64, 192), dataclasses.replace(INT4, group_size=64))
    assert division_problems(CONFIG, [w2], TWO)
    parallel = dataclasses.replace(TWO, expert_parallel=True)
    assert division_problems(CONFIG, [w2], parallel) == []
    assert rank_bytes(w2, parallel) == rank_bytes(w2, ONE) // 2


SCHEMES = [
    *(
        Scheme("int4", group, act_order=order, scale_dtype=torch.float16)
        for group in (32, 128)
        for order in (False, True)
    ),
    Scheme("fp4", 32),
    Scheme("fp8", 128),
]


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize(("module", "cut"), [("layers.*.attn.wo_b", 1), ("layers.*.attn.wq_b", 0)])
@pytest.mark.parametrize("size", [128, 384, 1024])
def test_refuses_what_the_layers_refuse(module: str, cut: int, size: int, scheme: Scheme, gpus: int) -> None:
    shape = (1024, size) if cut else (size, 1024)
    part = (1024, size // gpus) if cut else (size // gpus, 1024)
    try:
        shard_scheme(scheme, part, shape)
        refused = False
    except QuantizationError:
        refused = True
    problems = division_problems(CONFIG, [tensor(module, shape, scheme)], dataclasses.replace(TWO, gpus=gpus))
    assert bool(problems) == refused
    assert all(name == module for name, _ in problems)


@pytest.mark.parametrize(("gpus", "field"), [(3, "num_attention_heads"), (16, "o_groups")])
def test_gpus_that_do_not_divide_the_model(gpus: int, field: str) -> None:
    problems = dict(division_problems(CONFIG, [], dataclasses.replace(TWO, gpus=gpus)))
    assert f"{gpus} GPUs do not divide" in problems[field]


def plan(gib: int) -> Capacity:
    """One GPU of 80 GiB with weights of `gib` GiB."""
    weights = [tensor("layers.*.ffn.experts.*.w1", (1 << 10, 1 << 19), count=gib)]
    return plan_capacity(CONFIG, weights, formats(), Limits(1, 80 * GIB, 1.0))


def test_the_recommendation_takes_the_whole_context_with_the_largest_step_that_allows_it() -> None:
    capacity = plan(40)
    assert capacity.best is not None
    assert capacity.weights == 40 * GIB
    assert capacity.best.max_model_len == 1048576
    assert capacity.best.batch_tokens == max(f.batch_tokens for f in capacity.fits if f.max_model_len == 1048576)


def test_short_memory_trades_step_size_for_context() -> None:
    capacity = plan(77)
    lengths = [fit.max_model_len for fit in capacity.fits]
    assert 0 < max(lengths) < 1048576
    assert lengths == sorted(lengths)  # steps are listed largest first
    assert capacity.best is not None
    assert capacity.best.max_model_len >= max(lengths) / 2
    larger = [fit for fit in capacity.fits if fit.batch_tokens > capacity.best.batch_tokens]
    assert larger
    assert all(fit.max_model_len < max(lengths) / 2 for fit in larger)


def test_max_model_len_is_the_last_that_vllm_accepts() -> None:
    """vLLM asks for one request of that length, both steps in flight, and keeps a block for itself."""
    capacity = plan(77)
    for fit in capacity.fits:
        if not 0 < fit.max_model_len < 1048576:
            continue

        def takes(tokens: int, batch: int = fit.batch_tokens) -> int:
            blocks = capacity.pool.blocks(tokens, batch) + 1
            return blocks * capacity.pool.block_bytes + capacity.pool.table_bytes(tokens, 256)

        assert takes(fit.max_model_len) <= fit.cache < takes(fit.max_model_len + 1)
        assert fit.context >= fit.max_model_len


@pytest.mark.parametrize("gib", [79, 200])
def test_too_large_weights_start_nothing(gib: int) -> None:
    capacity = plan(gib)
    assert capacity.best is None
    assert all(fit.max_model_len == fit.context == 0 for fit in capacity.fits)
