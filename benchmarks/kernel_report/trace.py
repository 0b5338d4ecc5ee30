"""What one layer starts on a GPU in a step: every launch of our kernels, executed and counted, and PyTorch's.

The layer runs on a CPU with Triton's and nvcc's code on the executor (`testing/ptxrun`). Of a large grid some blocks
run; memory that the others would write holds random numbers. What later kernels do depends on the tokens' experts and
on the index's choice: both are drawn at random instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from testing.flash import FLASH_CONFIG
from testing.ptxrun import cuda_kernels
from testing.ptxrun.executable import Memory, Schedule
from testing.ptxrun.profile import Profile, profile
from testing.ptxrun.triton_kernels import (
    Compiled,
    Compiler,
    compiler,
    device,
    dimensions,
    launch,
    pack,
    spans,
)
from testing.ptxrun.verify import unexpected
from vllm_deepseek_v4flash.kv_cache.layer_step import LayerStep
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.cuda import packed_experts as cuda_experts
from vllm_deepseek_v4flash.ops.packed_weight import Scheme
from vllm_deepseek_v4flash.ops.torch import linear_fp32, merged_linear
from vllm_deepseek_v4flash.ops.triton.launch import Recorder, recorded

from . import layer as layers
from .layer import LayerKind, Point
from .store import Store, key_of

MOST_BLOCKS, MOST_PREFILL_BLOCKS = 256, 24
"""Of one launch that are executed; a prompt's do far more work each."""
COMPLETE = ("_prepare", "_sort", "prepare")
"""Kernels that run whole, and each time: they write what later kernels do."""
WHOLE = (*COMPLETE, "gate_up", "down")
"""Kernels of which no sample runs: csrc/'s blocks count each other."""
REPLACED = ("_route", "_select")
"""Kernels whose choices are drawn at random instead."""
# What PyTorch computes on a GPU by a launch; the other functions that it dispatches make views or allocate.
_PRODUCTS = ("aten.mm", "aten.bmm", "aten.addmm")
_LAUNCHES = (
    *_PRODUCTS, "aten._to_copy", "aten.copy_", "aten.add", "aten.mul", "aten.cat", "aten.index", "aten.zero_",
    "aten.zeros", "aten.fill_", "aten.arange", "aten.clone",
)  # fmt: skip


@dataclass(frozen=True)
class TorchLaunch:
    """A kernel of PyTorch's."""

    kernel: str
    bytes: int
    """Read and written."""
    flops: int


@dataclass(frozen=True)
class AllReduce:
    bytes: int
    """Of the tensor."""

    kernel = "all-reduce"


Launch = Profile | TorchLaunch | AllReduce


@dataclass
class Call:
    """An op of `ops/`, or what a layer does between them ("between ops")."""

    op: str
    units: float = 0.0
    """4-bit weights, pairs of a head and a key, or index entries that the op works on; 0 for other ops."""
    launches: list[Launch] = field(default_factory=list)


BETWEEN = "between ops"


class Tracer:
    """Traces steps of one rank of a machine; kernels that differ in nothing are executed once.

    Args:
        arch: the GPU's, 80 for sm_80.
        ranks: of tensor parallelism.
        scheme: how the weights are packed.
        store: profiles of launches that need not run again; None for an empty one in memory.
        check_every: every so many blocks one's accesses to shared memory are checked; 0 for none.
    """

    def __init__(self, arch: int, ranks: int, scheme: Scheme, store: Store | None = None, check_every: int = 0) -> None:
        self.arch, self.ranks, self.scheme, self.check_every = arch, ranks, scheme, check_every
        self.device = device(arch)
        self.compiler: Compiler = compiler(arch)
        self.store = Store() if store is None else store
        self.layers: dict[LayerKind, Any] = {}
        self.weights: set[int] = set()
        """Addresses of the layers' parameters."""
        self.calls: list[Call] = []
        self.depth = 0
        self.most_blocks = MOST_BLOCKS
        self.findings: list[str] = []
        """Faults of the launches that were executed."""

    def trace(self, kind: LayerKind, point: Point) -> list[Call]:
        """What a layer of this kind starts."""
        self.calls = []
        self.most_blocks = MOST_PREFILL_BLOCKS if point.prefill else MOST_BLOCKS
        with self._on_gpu(("cuda", "triton"), self._all_reduce, self._multiply):
            layer = self.layer(kind)
            torch.manual_seed(0)
            step = layers.step_through(layer, point)
            # A process allocates these once.
            for topk in (FLASH_CONFIG.num_experts_per_tok, FLASH_CONFIG.num_experts_per_tok + 1):
                inner = FLASH_CONFIG.moe_intermediate_size // self.ranks
                cuda_experts._counters(
                    torch.device("cpu"), cuda_experts.counters(FLASH_CONFIG.hidden_size, inner, topk)
                )
            with (
                dispatch.wrap(self._wrap), recorded(self.device, self._launch),
                cuda_kernels.launched(self.arch, self._launch_cuda), _Dispatched(self),
            ):  # fmt: skip
                step()
        return self.calls

    @contextlib.contextmanager
    def launching(
        self, kind: LayerKind, point: Point, recorder: Recorder, steps: list[LayerStep] | None = None
    ) -> Iterator[Callable[[], None]]:
        """A call that takes a layer one step further by Triton's kernels, whose launches go to `recorder` instead."""
        with self._on_gpu(("triton",), lambda x: x, _product), recorded(self.device, recorder):
            yield layers.step_through(self.layer(kind), point, steps)

    def layer(self, kind: LayerKind) -> Any:
        if kind not in self.layers:
            self.layers[kind] = layers.build(kind, self.scheme)
            self.weights |= {weight.untyped_storage().data_ptr() for weight in self.layers[kind].parameters()}
        return self.layers[kind]

    @contextlib.contextmanager
    def _on_gpu(
        self,
        kernels: tuple[str, ...],
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
        multiply: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor],
    ) -> Iterator[None]:
        """Layers run on a CPU as on a GPU: by these backends of our own, and by `multiply` for PyTorch's products."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(layers.rank_of(self.ranks, all_reduce))
            stack.enter_context(mock.patch.dict(dispatch.KERNELS, {"cpu": kernels}))
            stack.enter_context(dispatch.use("auto"))
            for module in (merged_linear, linear_fp32):
                stack.enter_context(mock.patch.object(module, "multiply", multiply))
            yield

    def add(self, launch: Launch) -> None:
        if not self.depth and (not self.calls or self.calls[-1].op != BETWEEN):
            self.calls.append(Call(BETWEEN))
        self.calls[-1].launches.append(launch)

    def schedule(self, grid: tuple[int, int, int]) -> Schedule:
        """Of a large grid, some blocks: evenly over its rows, which may differ in work, in another column each."""
        columns, rows = grid[0], grid[1] * grid[2]
        if columns * rows <= self.most_blocks:
            return Schedule(check_every=self.check_every)
        step = math.ceil(columns * rows / self.most_blocks) | 1
        if 2 * rows >= self.most_blocks:
            step = (columns + 1) * math.ceil(rows / self.most_blocks)
        return Schedule(block_step=step, check_every=self.check_every)

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(Call(name, self._units(name, kwargs, args)))
            self.depth += 1
            try:
                result = function(*args, **kwargs)
            finally:
                self.depth -= 1
            with torch.utils._python_dispatch._disable_current_modes():
                if name == "route":
                    return _random_experts(*result)
                if name == "indexer_topk":
                    return _random_choice(result, kwargs["max_entries"])
            return result

        return call

    def _units(self, name: str, options: dict[str, Any], arguments: tuple[Any, ...]) -> float:
        """Ops are called with the arguments of their references in order, keywords by name."""
        if name == "packed_experts":
            _, w13, w2, *_, ids = arguments
            per_expert = sum(2 * w["qweight"][0].numel() for w in (w13, w2))
            return float(per_expert * ids.unique().numel())
        if name == "packed_linear":
            return float(2 * arguments[1]["qweight"].numel())
        if name == "indexer_topk":
            return float(len(arguments[0]) * options["max_entries"])
        if name == "sparse_attention":
            tokens, heads, _ = arguments[0].shape
            keys = min(options["window_size"], int(arguments[2][-1]) + 1)
            chosen = options["indices"]
            return float(tokens * heads * (keys + (options["max_entries"] if chosen is None else chosen.shape[1])))
        return 0.0

    def _launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not all(grid):
            return
        with torch.utils._python_dispatch._disable_current_modes():
            compiled, given = self.compiler.compile(kernel, args, options)
            parameters = pack(compiled.executable, given)
            self._count(
                kernel.fn.__name__, compiled, parameters, spans(given), dimensions(grid), lambda: self._integers(given)
            )

    def _launch_cuda(
        self, name: str, compiled: Compiled, parameters: bytes, memory: list[Memory], grid: tuple[int, int, int]
    ) -> None:
        values = b"".join(ctypes.string_at(m.base, m.size) for m in memory if m.name == "ids")
        self._count(name, compiled, parameters, memory, grid, lambda: values)

    def _count(
        self, name: str, compiled: Compiled, parameters: bytes, memory: list[Memory], grid: tuple[int, int, int],
        values: Callable[[], bytes],
    ) -> None:  # fmt: skip
        """Adds the profile of a launch, which runs unless it is known.

        Args:
            values: of the integer tensors that the kernel reads.
        """
        schedule = Schedule(check_every=self.check_every) if name in WHOLE else self.schedule(grid)
        before = values()
        key = key_of(compiled, parameters, memory, before, grid, schedule)
        known = self.store.get(key)
        if known is None or name in COMPLETE:
            run = launch(name, compiled, parameters, memory, grid, schedule)
            self.findings += [f"{name}: {finding}" for finding in unexpected(run)]
            if name not in (*COMPLETE, *REPLACED) and values() != before:
                raise RuntimeError(f"{name} writes integers, which later kernels may read. Add it to COMPLETE.")
            if known is None:
                known = profile(run)
                self.store.put(key, known)
        self.add(known)

    def _integers(self, given: list[Any]) -> bytes:
        """The values of tensors that say where a kernel reads: all integers but the weights' codes."""
        return b"".join(
            value.contiguous().numpy().tobytes()
            for value in given
            if isinstance(value, torch.Tensor)
            and value.dtype in (torch.int32, torch.int64)
            and value.untyped_storage().data_ptr() not in self.weights
        )

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.ranks > 1:
            self.add(AllReduce(x.nbytes))
        return x

    def _multiply(self, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`ops/torch/merged_linear.multiply` as on a GPU: one product, whose values are not needed."""
        rows, (n, k) = x.numel() // x.shape[-1], weight.shape
        moved = x.nbytes + weight.nbytes + rows * n * dtype.itemsize
        self.add(TorchLaunch("product", moved, 2 * rows * n * k))
        return _product(x, weight, dtype)


class _Dispatched(TorchDispatchMode):
    """Records what PyTorch would launch, and fills new memory with random numbers."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).rpartition(".")[0]
        if name in ("aten.empty", "aten.new_empty", "aten.empty_like"):
            if result.numel():
                _fill(result)
        elif name in _LAUNCHES and isinstance(result, torch.Tensor):
            tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
            flops = 2 * args[-2].numel() * args[-1].shape[-1] if name in _PRODUCTS else 0
            self.tracer.add(TorchLaunch(name.removeprefix("aten."), sum(t.nbytes for t in tensors), flops))
        return result


def _product(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for `x @ weight.T`."""
    return torch.empty(*x.shape[:-1], len(weight), dtype=dtype)


def _fill(tensor: torch.Tensor) -> None:
    """Zeros for integers; random numbers for others, repeated where there are many."""
    if not tensor.is_floating_point():
        tensor.zero_()
        return
    flat = tensor.view(-1)
    some = torch.randn(min(len(flat), 1 << 16), dtype=torch.float32).to(tensor.dtype)
    for start in range(0, len(flat), len(some)):
        part = flat[start : start + len(some)]
        part.copy_(some[: len(part)])


def drawn_experts(tokens: int) -> torch.Tensor:
    """Distinct experts of each token, the same in every layer."""
    drawn = torch.rand(tokens, FLASH_CONFIG.n_routed_experts, generator=torch.Generator().manual_seed(tokens))
    return drawn.topk(FLASH_CONFIG.num_experts_per_tok).indices


def _random_experts(weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`drawn_experts`, the shared one last where the router appends it."""
    routed = FLASH_CONFIG.num_experts_per_tok
    ids = torch.full_like(ids, FLASH_CONFIG.n_routed_experts)
    ids[:, :routed] = drawn_experts(len(ids))
    return torch.rand_like(weights), ids


def _random_choice(indices: torch.Tensor, entries: int) -> torch.Tensor:
    """Ascending entries, spread over all that the last token sees."""
    topk = indices.shape[1]
    spread = torch.arange(topk) * (entries // topk)
    return spread.to(torch.int32).expand_as(indices).contiguous()
