"""One decoder layer at DeepSeek-V4-Flash's real widths, on a CPU, as it runs on one rank of a GPU machine.

The weights are zeros that take no memory until they are read: what a kernel executes does not depend on them. Experts,
attention projections and the shared expert are packed, as in the published 4-bit checkpoints; compressors, the
indexer's weights projection and the router are bf16.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from testing.flash import FLASH_CONFIG
from vllm_deepseek_v4flash import model
from vllm_deepseek_v4flash.config import LayerKind
from vllm_deepseek_v4flash.kv_cache.layer_step import EntryCaches, LayerStep
from vllm_deepseek_v4flash.kv_cache.page_sizes import PageSize, entry_page, state_format, state_page, window_page
from vllm_deepseek_v4flash.layers.hyper_connections import Residual
from vllm_deepseek_v4flash.layers.methods import Unpacked
from vllm_deepseek_v4flash.ops.packed_weight import Scheme
from vllm_deepseek_v4flash.ops.rows import PagedRows, RowFormat

LAYERS = {LayerKind.WINDOW: 0, LayerKind.CSA: 4, LayerKind.HCA: 5}
"""A layer of each kind, whose router chooses by score where there is one that does; all window layers use token ids."""
PACKED = (
    "attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "attn.indexer.wq_b", ".w1", ".w2", ".w3",
)  # fmt: skip
SMALL = 1 << 20
"""Parameters of up to so many elements are filled with random numbers."""
_PARALLEL = ("vllm.model_executor.layers.linear", "vllm.model_executor.parameter") + tuple(
    f"vllm_deepseek_v4flash.layers.{name}" for name in ("attention", "moe", "projections")
)


@dataclass(frozen=True)
class Point:
    """What a step computes: one token each for `requests` with `context` tokens before it, or a prompt's `new` tokens.

    A decoding step completes no entry, as three of four steps of a CSA layer and 127 of 128 of an HCA layer.
    """

    requests: int = 1
    context: int = 0
    new: int = 1

    @property
    def tokens(self) -> int:
        return self.requests * self.new

    @property
    def prefill(self) -> bool:
        return self.new > 1

    def __str__(self) -> str:
        if self.prefill:
            return f"prefill of {self.new}"
        return f"batch {self.requests}, {self.context >> 10}k"


class _Schemes(dict[str, Scheme]):
    """One scheme for every module that is packed."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def __contains__(self, module: object) -> bool:
        return str(module).endswith(PACKED)

    def __getitem__(self, module: str) -> Scheme:
        return self.scheme

    def get(self, module: str, default: Any = None) -> Any:
        return self.scheme if module in self else default


class _Quantised(Unpacked):
    def __init__(self, scheme: Scheme) -> None:
        self.schemes = _Schemes(scheme)  # type: ignore[misc]


@contextlib.contextmanager
def rank_of(size: int, all_reduce: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Layers built and run inside belong to one of `size` tensor-parallel ranks, which sum by `all_reduce`."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with contextlib.ExitStack() as stack:
        for module in map(importlib.import_module, _PARALLEL):
            for name, value in (
                ("get_tensor_model_parallel_world_size", lambda: size),
                ("get_tensor_model_parallel_rank", lambda: 0),
                ("tensor_model_parallel_all_reduce", all_reduce),
            ):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(set_current_vllm_config(VllmConfig()))
        yield


def build(kind: LayerKind, scheme: Scheme) -> model.DeepseekV4DecoderLayer:
    """A layer of the rank of `rank_of`, in bf16."""
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}),
        model_config=SimpleNamespace(max_model_len=FLASH_CONFIG.max_position_embeddings),
        quant_config=_Quantised(scheme),
        parallel_config=SimpleNamespace(enable_expert_parallel=False),
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with (
            mock.patch.object(model, "LayerCaches", return_value=SimpleNamespace()),
            mock.patch.object(model, "eager_break_during_capture", lambda function: function),
        ):
            layer = model.DeepseekV4DecoderLayer(FLASH_CONFIG, vllm_config, None, f"model.layers.{LAYERS[kind]}")  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(default)
    for parameter in layer.parameters():
        if parameter.numel() <= SMALL and parameter.is_floating_point():
            parameter.data.normal_(std=0.1)
    return layer


def step_through(layer: Any, point: Point, steps: list[LayerStep] | None = None) -> Callable[[], None]:
    """A call that takes the layer one step further; may be called more than once.

    Args:
        steps: what the attention computes instead, in vLLM's profiling run.
    """
    tokens, hidden, streams = point.tokens, FLASH_CONFIG.hidden_size, FLASH_CONFIG.hc_mult
    steps = [step_of(layer.kind, point)] if steps is None else steps
    half = FLASH_CONFIG.qk_rope_head_dim // 2
    residual = Residual(
        torch.randn(tokens, streams, hidden, dtype=torch.bfloat16), torch.rand(tokens, streams),
        torch.rand(tokens, streams, streams), torch.randn(tokens, hidden, dtype=torch.bfloat16),
    )  # fmt: skip
    ids = torch.zeros(tokens, dtype=torch.int64)
    cos_sin, inv_freq = torch.rand(tokens, 2 * half), torch.rand(half)

    def call() -> None:
        layer.caches.steps = lambda positions: steps
        layer(residual, steps[-1].positions, ids, cos_sin, inv_freq)

    return call


def step_of(kind: LayerKind, point: Point) -> LayerStep:
    """The caches of a layer, filled with zeros, and the tokens of the step."""
    config = FLASH_CONFIG
    first, end = point.context, point.context + point.new
    positions = torch.arange(first, end).repeat(point.requests)
    request = torch.arange(point.requests, dtype=torch.int32).repeat_interleave(point.new)

    def cache(page: PageSize) -> PagedRows:
        return _paged(page, point.requests, 0 if page.window is None else max(0, first - page.window), end)

    def slots(rows: PagedRows) -> torch.Tensor:
        page, row = rows.locate(request, positions)
        return page * rows.rows_per_page + row

    def entries(dim: int, rope: int, ratio: int) -> EntryCaches:
        overlap = kind is LayerKind.CSA
        states = cache(state_page(state_format(dim, overlap), ratio, overlap))
        return EntryCaches(cache(entry_page(RowFormat.fp8(dim, rope), ratio)), states, slots(states))

    ratio = {LayerKind.WINDOW: 0, LayerKind.CSA: 4, LayerKind.HCA: 128}[kind]
    window = cache(window_page(RowFormat.fp8(config.head_dim, config.qk_rope_head_dim), config.sliding_window))
    return LayerStep(
        positions, request, window, slots(window),
        main=entries(config.head_dim, config.qk_rope_head_dim, ratio) if ratio else None,
        index=entries(config.index_head_dim, 0, ratio) if kind is LayerKind.CSA else None,
        max_entries=end // ratio if ratio else 0,
    )  # fmt: skip


def _paged(page: PageSize, requests: int, first: int, end: int) -> PagedRows:
    """Each request has the pages of its tokens from `first` to `end`, one after another."""
    low, high = first // page.block_tokens, -(-end // page.block_tokens)
    count, size = requests * (high - low), page.rows * page.row_size
    # NumPy's zeros, unlike PyTorch's, take no memory until they are written.
    zeros = np.zeros(count * size * page.format.dtype.itemsize, np.uint8)
    pages = torch.from_numpy(zeros).view(page.format.dtype).view(count, size)
    table = torch.zeros((requests, high), dtype=torch.int32)
    table[:, low:] = torch.arange(count, dtype=torch.int32).view(requests, high - low)
    return PagedRows(pages, page.rows, page.format, table)
