"""What a layer is handed in a step for which vLLM has no cache yet."""

from types import SimpleNamespace

import pytest
import torch

from testing.flash import FLASH_CONFIG as FLASH
from vllm_deepseek_v4flash.config import LayerKind
from vllm_deepseek_v4flash.kv_cache import layer_caches as caches
from vllm_deepseek_v4flash.kv_cache.formats import CacheFormats
from vllm_deepseek_v4flash.kv_cache.layer_caches import LayerCaches
from vllm_deepseek_v4flash.ops.compress import compress
from vllm_deepseek_v4flash.ops.indexer_topk import indexer_topk
from vllm_deepseek_v4flash.ops.qnorm_rope_kv_insert import qnorm_rope_kv_insert
from vllm_deepseek_v4flash.ops.sparse_attention import sparse_attention

TOKENS, MAX_MODEL_LEN = 9, 4096
LAYERS = {kind: FLASH.layer_kinds.index(kind) for kind in LayerKind}


def profiling_step(monkeypatch, kind, index):
    formats = CacheFormats.select(FLASH, "fp8", index, torch.bfloat16)
    layer = LayerCaches(
        FLASH, LAYERS[kind], formats, max_model_len=MAX_MODEL_LEN, prefix="model.layers.2.attn", registry={}
    )
    monkeypatch.setattr(caches, "get_forward_context", lambda: SimpleNamespace(attn_metadata=None))
    monkeypatch.setattr(caches, "_compiles_at_use", lambda device: True)
    # vLLM's own positions may be left over from anything.
    return layer.step(torch.full((TOKENS,), 10**6)), list(layer.warm_up(torch.full((TOKENS,), 10**6)))


@pytest.mark.parametrize("index", ["fp8", "fp4"])
@pytest.mark.parametrize("kind", LayerKind)
def test_every_op_runs_in_the_profiling_run(monkeypatch, kind, index):
    """With the shapes of the longest context, so that every workspace is taken, and without an effect."""
    step, smaller = profiling_step(monkeypatch, kind, index)
    q, kv = torch.randn(TOKENS, 4, 512).bfloat16(), torch.randn(TOKENS, 512).bfloat16()
    cos_sin, inv_freq = torch.ones(TOKENS, 64), torch.ones(32)
    q = qnorm_rope_kv_insert(q, kv, cos_sin, step.window, step.window_slots, eps=1e-6)
    ratio = {LayerKind.WINDOW: 0, LayerKind.CSA: 4, LayerKind.HCA: 128}[kind]
    assert step.max_entries == (MAX_MODEL_LEN // ratio if ratio else 0)
    written, indices = [step.window], None
    for cache, dim in ((step.main, 512), (step.index, 128)):
        if cache is not None:
            width = dim * (2 if ratio == 4 else 1)
            main, gate = torch.randn(2, TOKENS, width)
            compress(
                main, gate, torch.zeros(ratio, width), torch.ones(dim).bfloat16(), inv_freq,
                step.positions, step.request, cache.states, cache.state_slots, cache.entries,
                ratio=ratio, eps=1e-6, dtype=torch.bfloat16,
            )  # fmt: skip
            written += [cache.states, cache.entries]
    if step.index is not None:
        indices = indexer_topk(
            torch.randn(TOKENS, 4, 128).bfloat16(), cos_sin, torch.randn(TOKENS, 4).bfloat16(), step.index.entries,
            step.positions, step.request, ratio=4, topk=512, max_entries=step.max_entries, scale=1.0,
        )  # fmt: skip
        assert indices.shape == (TOKENS, 512)
    out = sparse_attention(
        q, torch.zeros(4), step.positions, step.request, step.window, window_size=128, scale=1.0,
        entries=step.main and step.main.entries, indices=indices, ratio=ratio, max_entries=step.max_entries,
        cos_sin=cos_sin,
    )  # fmt: skip
    assert not out.any()
    assert [(s.positions.shape[0], s.window.block_table.shape[0]) for s in smaller] == [(n, n) for n in (1, 2, 4, 8)]
    assert {s.max_entries for s in smaller} == {step.max_entries}
    assert [rows for rows in written if rows.pages.any()] == []
    assert {None: 1, 4: 5, 128: 3}[ratio or None] == len(written)
