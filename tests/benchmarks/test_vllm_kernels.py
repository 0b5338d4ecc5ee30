"""vLLM's kernels get the same work as ours: stand-ins that compute what vLLM documents pass the benchmark's checks."""

import dataclasses
import importlib
import inspect
import types
from typing import Any

import pytest
import torch

from benchmarks import roofline, vllm_kernels
from benchmarks.attention import cases as attention
from benchmarks.attention import sparse, writes
from benchmarks.inputs import TINY
from benchmarks.roofline import UnavailableError, WrongResultError
from testing.ops import codecs
from vllm_deepseek_v4flash.ops.rows import RowFormat

# FlashMLA supports rows of 512 values only.
WIDE = dataclasses.replace(TINY, heads=2, dim=512, rope=64)


def cases(op):
    return [case for case in attention.all_cases(True) if case.op == op]


class FlashMLA:
    """What FlashMLA's documentation says that it computes, in fp64, from the bytes of its caches."""

    class FlashMLASchedMeta:
        pass

    @staticmethod
    def is_flashmla_sparse_supported():
        return True, None

    @classmethod
    def flash_mla_with_kvcache(
        cls, q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, softmax_scale,
        is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length,
        out,
    ):  # fmt: skip
        assert isinstance(tile_scheduler_metadata, cls.FlashMLASchedMeta)
        assert q.shape[1:] == (1, 64, 512)
        assert is_fp8_kvcache
        for b in range(len(q)):
            keys = cls.listed(k_cache, indices[b, 0], int(topk_length[b]))
            if extra_k_cache is not None:
                keys += cls.listed(extra_k_cache, extra_indices_in_kvcache[b, 0], int(extra_topk_length[b]))
            out[b, 0] = cls.attend(q[b, 0], torch.stack(keys), softmax_scale, attn_sink)
        return out, None

    @classmethod
    def flash_mla_sparse_fwd(cls, q, kv, indices, sm_scale, attn_sink, topk_length, out):
        assert indices.shape[2] % 128 == 0
        for t in range(len(q)):
            listed = indices[t, 0, : int(topk_length[t])].long()
            out[t] = cls.attend(q[t], kv[listed, 0].double(), sm_scale, attn_sink)
        return out, None, None

    @staticmethod
    def listed(cache, indices, length):
        """The keys of the first `length` slots, each decoded from 576 bytes of data and 7 of 8 scale bytes."""
        assert cache.dtype == torch.uint8
        assert cache.stride(0) % 576 == 0
        rows, fmt, found = cache.shape[1], RowFormat.fp8(512, 64), []
        for slot in indices[:length].tolist():
            page = cache[slot // rows].flatten()
            data, scales = page[: rows * 576].view(rows, 576), page[rows * 576 :].view(rows, 8)
            row = slot % rows
            content = data[row].numpy().tobytes(), scales[row, :7].numpy().tobytes()
            found.append(torch.tensor(codecs.decode(*content, fmt), dtype=torch.float64))
        assert (indices[length:] == -1).all()
        return found

    @staticmethod
    def attend(q, keys, scale, sinks):
        weights = torch.cat((q.double() @ keys.T * scale, sinks[:, None].double()), dim=1).softmax(dim=1)[:, :-1]
        return (weights @ keys).to(q.dtype)


@pytest.fixture
def vllm_at_hand(monkeypatch):
    """As on a GPU, with FlashMLA as documented."""
    real = vllm_kernels.load
    monkeypatch.setattr(vllm_kernels, "need_cuda", lambda bench: None)
    monkeypatch.setattr(
        vllm_kernels, "load", lambda bench, name: FlashMLA if name.endswith("flashmla") else real(bench, name)
    )


@pytest.mark.parametrize("kind", ["window", "CSA", "HCA"])
@pytest.mark.parametrize("new", [1, 2])
def test_flashmla_is_given_the_same_work(vllm_at_hand, monkeypatch, bench, kind, new):
    reference = roofline.kernel_and_reference("sparse_attention")[1]
    monkeypatch.setattr(roofline, "kernel_and_reference", lambda op: (reference, reference))
    case = sparse.attention_case(WIDE, kind, "fp8", 2 if new == 1 else 1, new, 128, tp=1)
    (peer,) = case.build(bench).peers
    assert peer.name.endswith("(2 heads padded to 64)")
    work = peer.prepare()
    assert len(work.calls) == 2
    assert work.check()
    if new == 1:
        monkeypatch.setattr(vllm_kernels, "ds_mla_pages", lambda cache: broken_pages(cache))
        with pytest.raises(WrongResultError):
            peer.prepare().check()


real_pages = vllm_kernels.ds_mla_pages


def broken_pages(cache):
    """The scales' bytes, one row further."""
    pages = real_pages(cache)
    scales = pages.flatten(1)[:, cache.rows_per_page * 576 :]
    scales.copy_(scales.roll(8, dims=1) + 1)
    return pages


def test_flashmla_reads_fp8_rows_only(vllm_at_hand, bench):
    case = sparse.attention_case(WIDE, "window", "plain", 2, 1, 128, tp=1)
    with pytest.raises(UnavailableError, match="fp8 rows only"):
        case.build(bench).peers[0].prepare()


@pytest.mark.parametrize("name", ["cooperative_topk", "persistent_topk"])
def test_topk_is_given_the_same_work(vllm_at_hand, monkeypatch, bench, name):
    def op(logits, lengths, output, workspace, k, longest):
        assert lengths.shape == (2, 1)
        assert longest == logits.shape[1] == int(lengths[0])
        output.copy_(logits.topk(k).indices.flip(1))

    monkeypatch.setattr(vllm_kernels, "load_op", lambda bench, space, found: op if found == name else None)
    (peer,) = [peer for peer in cases("topk")[0].build(bench).peers if peer.name == f"vLLM {name}"]
    work = peer.prepare()
    assert work.check() == "equal"
    monkeypatch.setattr(vllm_kernels, "load_op", lambda *_: lambda logits, lengths, output, *rest: output.zero_())
    with pytest.raises(WrongResultError):
        peer.prepare().check()


def peers(bench, op):
    return {peer.name: peer for peer in cases(op)[0].build(bench).peers}


def test_vllm_computes_the_same_hyper_connections(vllm_at_hand, bench):
    # vLLM's PyTorch code runs here too, and is what its kernels are tested against.
    assert peers(bench, "mhc_post_pre")["vLLM mHC (PyTorch)"].prepare().check()


def test_vllms_tilelang_kernel_is_given_the_same_work(vllm_at_hand, monkeypatch, bench):
    real, code = (importlib.import_module(f"vllm.model_executor.kernels.mhc.{n}") for n in ("tilelang", "torch"))

    def kernel(*args, **options):
        given = inspect.signature(real.mhc_fused_post_pre_tilelang).bind(*args, **options)
        given.apply_defaults()
        x, streams, post, comb, *rest = list(given.arguments.values())[:12]
        streams = code.mhc_post_torch(x, streams, post, comb)
        post, comb, x = code.mhc_pre_torch(streams, *rest)
        weight, eps = given.arguments["norm_weight"], given.arguments["norm_eps"]
        return streams, post, comb, torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

    fake = types.SimpleNamespace(mhc_fused_post_pre_tilelang=kernel)
    monkeypatch.setattr(vllm_kernels, "load", lambda bench, name: fake)
    assert peers(bench, "mhc_post_pre")["vLLM mHC (TileLang)"].prepare().check()


def test_vllms_head_kernels_are_given_the_same_work(vllm_at_hand, monkeypatch, bench):
    head = roofline.kernel_and_reference("mhc_head")[1]
    real = {n: importlib.import_module(f"vllm.model_executor.kernels.mhc.{n}") for n in ("tilelang", "triton")}

    def tilelang(*args):
        *given, eps, hc_eps = inspect.signature(real["tilelang"].hc_head_fused_kernel_tilelang).bind(*args).args
        return head(*given, norm_eps=eps, hc_eps=hc_eps)

    def triton(*args):
        given = inspect.signature(real["triton"].hc_head_reduce_triton_kernel).bind(*args).arguments
        names = ("x", "hc_fn", "hc_scale", "hc_base")
        given["out"].copy_(head(*(given[n] for n in names), norm_eps=given["norm_eps"], hc_eps=given["hc_eps"]))

    fake = types.SimpleNamespace(hc_head_fused_kernel_tilelang=tilelang, hc_head_reduce_triton_kernel=triton)
    monkeypatch.setattr(vllm_kernels, "load", lambda bench, name: fake)
    for peer in peers(bench, "mhc_head").values():
        assert peer.prepare().check()


def test_vllms_router_is_given_the_same_work(vllm_at_hand, monkeypatch, bench):
    custom = importlib.import_module("vllm._custom_ops")
    names = list(inspect.signature(custom.topk_hash_softplus_sqrt).parameters)
    reference = roofline.kernel_and_reference("route")[1]

    def op(*args):
        given = dict(zip(names, args, strict=True))
        weights, ids = reference(
            given["gating_output"], given["topk_indices"].shape[1], bias=given["e_score_correction_bias"],
            expert_ids=given["hash_indices_table"], scaling=given["routed_scaling_factor"],
            renormalize=given["renormalize"],
        )  # fmt: skip
        given["topk_weights"].copy_(weights)
        given["topk_indices"].copy_(ids)

    monkeypatch.setattr(vllm_kernels, "load_op", lambda *_: op)
    assert peers(bench, "route")["vLLM topk_softplus_sqrt"].prepare().check()


def test_vllms_insert_is_given_the_same_work(vllm_at_hand, monkeypatch, bench):
    reference = roofline.kernel_and_reference("qnorm_rope_kv_insert")[1]

    def op(q, kv, pages, slots, positions, cos_sin, heads, eps, rows):
        assert heads == q.shape[1]
        own = torch.zeros((len(pages), rows * 583), dtype=torch.uint8)
        cache = dataclasses.replace(window, pages=own)
        vllm_kernels._copy_rows(pages, 8, own, 7, rows)
        out = reference(q, kv, cos_sin[positions], cache, slots, eps=eps)
        vllm_kernels._copy_rows(own, 7, pages, 8, rows)
        return out

    case = writes.insert_case(WIDE, 3)
    work = case.build(bench)
    call: Any = work.calls[0]
    window = call.args[3]
    monkeypatch.setattr(vllm_kernels, "load_op", lambda *_: op)
    (peer,) = work.peers
    assert peer.prepare().check()
    monkeypatch.setattr(vllm_kernels, "load_op", lambda *_: lambda q, *rest: q)
    with pytest.raises(WrongResultError):
        peer.prepare().check()


def test_vllms_kernels_are_missed_for_a_reason(monkeypatch, bench):
    with pytest.raises(UnavailableError, match="needs a CUDA device"):
        vllm_kernels.load_flashmla(bench)
    monkeypatch.setattr(vllm_kernels, "need_cuda", lambda bench: None)
    with pytest.raises(UnavailableError, match="_flashmla_C is not available"):
        vllm_kernels.load_flashmla(bench)
    with pytest.raises(UnavailableError, match=r"no op _C\.cooperative_topk"):
        vllm_kernels.load_op(bench, "_C", "cooperative_topk")
    with pytest.raises(UnavailableError, match=r"vllm\.nothing cannot be imported"):
        vllm_kernels.load(bench, "vllm.nothing")
