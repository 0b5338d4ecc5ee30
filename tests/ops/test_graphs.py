"""Ops inside a CUDA graph: what a step's buffers hold when it is replayed decides, not what they held at capture.

Where there is no GPU a replay is a second call, which proves the tests, not the kernels.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from testing.ops.numeric import assert_exact, normal
from testing.ops.paging import make_cache
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.compress import compress
from vllm_deepseek_v4flash.ops.fused_experts import fused_experts
from vllm_deepseek_v4flash.ops.indexer_topk import indexer_topk
from vllm_deepseek_v4flash.ops.mhc_post_pre import mhc_post_pre
from vllm_deepseek_v4flash.ops.qnorm_rope_kv_insert import qnorm_rope_kv_insert
from vllm_deepseek_v4flash.ops.rope_table import rope_table
from vllm_deepseek_v4flash.ops.route import route
from vllm_deepseek_v4flash.ops.rows import RowFormat
from vllm_deepseek_v4flash.ops.sparse_attention import sparse_attention

DIM, INDEX_DIM, ROPE, HEADS = 48, 64, 8, 3
LENGTHS = [40, 9, 23]
MAX_ENTRIES = 12  # at capture, as in vLLM: that of the longest possible request
DTYPES = {"reference": torch.float32, "interpreted": torch.float32, "cuda": torch.bfloat16}


@pytest.fixture(params=["reference", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    if request.param == "interpreted" and torch.cuda.is_available():
        pytest.skip("Triton is compiled in this process")
    with dispatch.use("reference" if request.param == "reference" else "triton"):
        yield request.param


@pytest.fixture
def device(backend):
    return torch.device("cuda" if backend == "cuda" else "cpu")


@pytest.fixture
def dtype(backend):
    return DTYPES[backend]


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(3)


class Captured:
    """A step's call, captured on a GPU; `replay` computes it again from what its arguments hold by then."""

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.call, self.graph = call, None
        if device.type == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):
                call()  # compiles, which a capture forbids
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = call()
        else:
            call()

    def replay(self) -> Any:
        if self.graph is None:
            return self.call()
        self.graph.replay()
        torch.cuda.synchronize()
        return self.result


def check(call, device, change):
    """A replay after `change` returns what a new call returns, not what the captured one did."""
    captured = Captured(call, device)
    before = [tensor.clone() for tensor in tensors(captured.replay())]
    change()
    after = [tensor.clone() for tensor in tensors(captured.replay())]
    for actual, expected in zip(after, tensors(call()), strict=True):
        assert_exact(actual, expected)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]


class Step:
    """A decoding step of three requests in buffers that stay where they are."""

    def __init__(self, rng, device, dtype):
        self.rng, self.device, self.dtype = rng, device, dtype
        self.positions = torch.tensor([n - 2 for n in LENGTHS], device=device)
        self.request = torch.arange(3, dtype=torch.int32, device=device)
        self.cos_sin = normal(rng, 3, ROPE, device=device)

    def cache(self, fmt, rows_per_page, lengths):
        cache = make_cache(fmt, rows_per_page, lengths, self.rng, self.device)
        for request, length in enumerate(lengths):
            cache.put(request, normal(self.rng, length, fmt.dim))
        return cache

    def format(self, dim, rope=ROPE):
        return RowFormat.fp8(dim, rope) if self.dtype == torch.bfloat16 else RowFormat.plain(dim, self.dtype)

    def normal(self, *shape):
        return normal(self.rng, *shape, device=self.device, dtype=self.dtype)

    def advance(self):
        """Every request is one token further, and elsewhere in the same pages."""
        self.positions += 1

    def swap_requests(self, *caches):
        for cache in caches:
            table = cache.rows.block_table
            table.copy_(table[[0, 2, 1]].clone())
        self.positions.copy_(self.positions[[0, 2, 1]].clone())


@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_sparse_attention(backend, device, dtype, rng, kind):
    step = Step(rng, device, dtype)
    window, entries = (
        step.cache(step.format(DIM), 4, LENGTHS),
        step.cache(step.format(DIM), 3, [n // 4 for n in LENGTHS]),
    )
    q, sinks = step.normal(3, HEADS, DIM), normal(rng, HEADS, device=device)
    options = {}
    if kind != "window":
        options = {"entries": entries.rows, "ratio": 4, "max_entries": MAX_ENTRIES}
    if kind == "csa":
        options["indices"] = torch.tensor(
            [[0, 3, 9, -1], [1, -1, -1, -1], [0, 2, 3, 4]], dtype=torch.int32, device=device
        )

    def call():
        return sparse_attention(
            q, sinks, step.positions, step.request, window.rows, window_size=16, scale=0.2, cos_sin=step.cos_sin,
            **options,
        )  # fmt: skip

    def change():
        step.swap_requests(window, entries)
        if kind == "csa":
            options["indices"].copy_(options["indices"][[0, 2, 1]].clone())
        step.advance()

    check(call, device, change)


def test_indexer_topk(backend, device, dtype, rng):
    step = Step(rng, device, dtype)
    entries = step.cache(step.format(INDEX_DIM, 0), 3, [n // 4 for n in LENGTHS])
    q, weights = step.normal(3, HEADS, INDEX_DIM), step.normal(3, HEADS)

    def call():
        return indexer_topk(
            q, step.cos_sin, weights, entries.rows, step.positions, step.request,
            ratio=4, topk=3, max_entries=MAX_ENTRIES, scale=0.1,
        )  # fmt: skip

    check(call, device, lambda: (step.swap_requests(entries), step.advance()))


def test_compress(backend, device, dtype, rng):
    step = Step(rng, device, dtype)
    step.positions.copy_(torch.tensor([38, 6, 22]))
    states = step.cache(RowFormat.plain(4 * DIM, torch.float32), 4, LENGTHS)
    entries = make_cache(step.format(DIM), 3, [n // 4 for n in LENGTHS], rng, device)
    slots = torch.zeros(3, dtype=torch.int64, device=device)
    kv, gate, ape = (normal(rng, n, 2 * DIM, device=device) for n in (3, 3, 4))
    norm_weight, inv_freq = step.normal(DIM), torch.full((ROPE // 2,), 0.1, device=device)

    def place():
        slots.copy_(torch.tensor([states.slot(r, int(step.positions[r])) for r in range(3)]))

    def call():
        compress(
            kv, gate, ape, norm_weight, inv_freq, step.positions, step.request, states.rows, slots, entries.rows,
            ratio=4, eps=1e-6, dtype=dtype,
        )  # fmt: skip
        return entries.storage.view(torch.uint8)

    def change():
        step.advance()
        place()
        # Only the second request's window ends here; the first one's did not before.
        kv.neg_()

    place()
    check(call, device, change)


def test_qnorm_rope_kv_insert(backend, device, dtype, rng):
    step = Step(rng, device, dtype)
    window = make_cache(step.format(DIM), 4, LENGTHS, rng, device)
    q, kv = step.normal(3, HEADS, DIM), step.normal(3, DIM)
    slots = torch.tensor([window.slot(0, 3), -1, window.slot(2, 0)], device=device)

    def call():
        return qnorm_rope_kv_insert(q, kv, step.cos_sin, window.rows, slots, eps=1e-6), window.storage.view(torch.uint8)

    check(call, device, lambda: slots.copy_(torch.tensor([-1, window.slot(1, 5), window.slot(2, 1)])))


def test_mhc_post_pre(backend, device, dtype, rng):
    step = Step(rng, device, dtype)
    x, streams, weight = step.normal(3, 24), step.normal(3, 4, 24), step.normal(24)
    post, comb = normal(rng, 3, 4, device=device), normal(rng, 3, 4, 4, device=device)
    fn, scale, base = normal(rng, 24, 96, device=device), normal(rng, 3, device=device), normal(rng, 24, device=device)

    def call():
        return mhc_post_pre(
            x, streams, post, comb, fn, scale, base, weight, norm_eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20
        )

    check(call, device, lambda: x.neg_())


@pytest.mark.parametrize("hashed", [True, False])
def test_route(backend, device, rng, hashed):
    logits = normal(rng, 5, 16, device=device)
    ids = torch.randint(0, 16, (5, 2), generator=rng).to(device) if hashed else None

    def change():
        logits.neg_()
        if ids is not None:
            ids.copy_(15 - ids)

    check(lambda: route(logits, 2, bias=None, expert_ids=ids, scaling=1.5), device, change)


def test_rope_table(backend, device):
    positions, inv_freq = torch.tensor([1, 5, 1 << 20], device=device), torch.tensor([1.0, 0.01], device=device)
    check(lambda: rope_table(positions, inv_freq), device, lambda: positions.add_(3))


def test_fused_experts(backend, device, dtype, rng):
    """The reference asks the host which experts were chosen, and so cannot be captured."""
    x, w13, w2 = (normal(rng, *s, device=device, dtype=dtype) for s in ((3, 32), (6, 64, 32), (6, 32, 32)))
    ids = torch.tensor([[0, 1], [0, 1], [5, 0]], device=device)
    weights = torch.rand(3, 2, generator=rng).to(device)
    check(
        lambda: fused_experts(x, w13, w2, weights, ids, swiglu_limit=10.0),
        device,
        lambda: ids.copy_(torch.tensor([[3, 3], [2, 4], [1, 2]])),
    )
