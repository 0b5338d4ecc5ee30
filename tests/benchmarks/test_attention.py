import dataclasses
import importlib
import inspect
import json
import types

import pytest
import torch

from benchmarks import attention, inputs, vllm_kernels
from benchmarks.inputs import TINY, paged, spread_indices
from benchmarks.roofline import Bench, UnavailableError, WrongResultError
from testing.ops import codecs
from vllm_deepseek_v4flash.kv_cache.page_sizes import entry_page, window_page
from vllm_deepseek_v4flash.ops.rows import RowFormat

CPU = torch.device("cpu")
# FlashMLA knows one row, of 512 values.
WIDE = dataclasses.replace(TINY, heads=2, dim=512, rope=64)


@pytest.fixture
def bench():
    return Bench(CPU, dry=True)


def cases(op):
    return [case for case in attention.all_cases(True) if case.op == op]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return attention.main(["--dry-run", "--out", str(out)]), json.loads((out / "attention.json").read_text())


def test_a_dry_run_checks_every_case(dry_run):
    status, report = dry_run
    assert report["failures"] == []
    assert status == 0
    expected = attention.all_cases(True)
    assert [(row["op"], row["case"]) for row in report["rows"]] == [(case.op, case.label) for case in expected]
    assert {row["op"] for row in report["rows"]} == {
        "sparse_attention", "indexer_topk", "topk", "compress", "qnorm_rope_kv_insert", "mhc_post_pre", "mhc_head",
        "route",
    }  # fmt: skip
    assert all(row["checked"] for row in report["rows"])


def test_a_dry_run_reports_no_figures_and_why(dry_run):
    _, report = dry_run
    for row in report["rows"]:
        assert row["us"] is row["gb_per_s"] is row["percent"] is row["peer_us"] is None
        assert row["reason"] == "dry run: not timed"
        assert row["peers_not_run"]
        assert all(": " in reason for reason in row["peers_not_run"])
    assert report["peaks"] is None


def off_by_a_hundredth(twin):
    def run(*args, **options):
        out = twin(*args, **options)
        first = out[0] if isinstance(out, tuple) else out
        first[-1] *= 1.02
        return out

    return run


def last_entry_replaced(twin):
    def run(q, cos_sin, weights, entries, positions, request, **options):
        out = twin(q, cos_sin, weights, entries, positions, request, **options)
        # The worst entry that was not chosen, in place of one that was.
        scores, _ = attention.index_scores((q, cos_sin, weights, entries, positions, request), 0, **options)
        out[0, -1] = scores.argmin()
        out[0] = out[0].sort().values
        return out

    return run


def nothing(twin):
    return lambda *args, **options: None


BREAKS = {
    "sparse_attention": off_by_a_hundredth, "indexer_topk": last_entry_replaced, "compress": nothing,
    "mhc_post_pre": off_by_a_hundredth, "mhc_head": off_by_a_hundredth,
    "qnorm_rope_kv_insert": off_by_a_hundredth, "route": off_by_a_hundredth,
}  # fmt: skip


@pytest.mark.parametrize("op", BREAKS)
def test_a_wrong_kernel_fails_its_check(monkeypatch, bench, op):
    twin, reference = attention.twin_and_reference(op)
    monkeypatch.setattr(attention, "twin_and_reference", lambda op: (BREAKS[op](twin), reference))
    with pytest.raises(WrongResultError):
        cases(op)[0].build(bench).check()


def test_rows_that_are_not_written_fail_the_check(monkeypatch, bench):
    def no_insert(q, kv, cos_sin, window, slots, *, eps):
        return twin(q, kv, cos_sin, window, torch.full_like(slots, -1), eps=eps)

    twin, reference = attention.twin_and_reference("qnorm_rope_kv_insert")
    monkeypatch.setattr(attention, "twin_and_reference", lambda op: (no_insert, reference))
    with pytest.raises(WrongResultError, match="a window row"):
        cases("qnorm_rope_kv_insert")[0].build(bench).check()


def test_entries_that_are_not_written_fail_the_check(monkeypatch, bench):
    def states_only(*args, **options):
        *rest, entries = args
        twin(*rest, dataclasses.replace(entries, pages=entries.pages.clone()), **options)

    twin, reference = attention.twin_and_reference("compress")
    monkeypatch.setattr(attention, "twin_and_reference", lambda op: (states_only, reference))
    with pytest.raises(WrongResultError, match="an entry"):
        cases("compress")[0].build(bench).check()


def test_a_wrong_topk_fails_its_check(monkeypatch, bench):
    module = importlib.import_module("vllm_deepseek_v4flash.ops.triton.topk")
    monkeypatch.setattr(module, "topk", lambda scores, counts, selected, limit: selected.copy_(torch.arange(8)))
    with pytest.raises(WrongResultError, match="the selection"):
        cases("topk")[0].build(bench).check()


def test_an_op_without_a_kernel_is_reported():
    with pytest.raises(UnavailableError, match="no_such_op has no Triton kernel"):
        attention.twin_and_reference("no_such_op")


SCORES = torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("chosen", "off", "message"),
    [
        ([0, 2, 3], 0.0, None),
        # 1 and 4 are one apart: within half of that each, either may be chosen.
        ([0, 2, 4], 0.5, None),
        ([0, 2, 4], 0.49, "left out"),
        ([2, 0, 3], 0.0, "not ascending"),
        ([0, 2, 2], 0.0, "not ascending"),
        ([0, 2, 5], 0.0, "not ascending"),
        ([-1, 0, 2], 0.0, "not ascending"),
    ],
)
def test_selections_are_judged_by_their_scores(chosen, off, message):
    given = ("token 0", torch.tensor(chosen, dtype=torch.int32), SCORES, torch.full((5,), off).double(), 3)
    if message is None:
        attention.check_selection(*given)
    else:
        with pytest.raises(WrongResultError, match=message):
            attention.check_selection(*given)


def test_a_short_selection_ends_in_minus_one():
    few, off = SCORES[:2], torch.zeros(2, dtype=torch.float64)
    attention.check_selection("token 0", torch.tensor([0, 1, -1]), few, off, 3)
    with pytest.raises(WrongResultError, match="not -1"):
        attention.check_selection("token 0", torch.tensor([0, 1, 0]), few, off, 3)


def find(label):
    (found,) = [case for case in attention.all_cases(False) if case.label == label]
    return found


def test_bytes_and_operations_are_those_of_the_roofline():
    # Core attention: 131,072 operations a key and token at 64 heads; 640 keys of CSA, 128 + L / 128 of HCA.
    csa = find("CSA decode, batch 32, 128k, 64 heads, fp8 rows")
    assert csa.flops == 32 * 640 * 131072
    rows, queries, indices, angles = 640 * (448 + 128 + 7), 2 * 2 * 64 * 512, 512 * 4, 64 * 4
    assert csa.bytes == 32 * (rows + queries + indices + angles)
    hca = find("HCA decode, batch 1, 1M, 8 heads, bf16 rows")
    assert hca.flops == (128 + 8192) * 131072 // 8
    assert hca.bytes == (128 + 8192) * 1024 + 2 * 2 * 8 * 512 + angles
    # Indexer: 16,384 operations a key.
    keys = find("decode, batch 8, 1M, fp4 keys")
    assert keys.flops == 8 * 262144 * 16384
    assert keys.bytes == 8 * (262144 * 68 + 2 * 64 * 129 + 4 * 512)
    # One sequence of L tokens: 16,384 L^2 / 8, less the 2,048 tokens that see no more than 512 entries.
    prefill = find("prefill, 8192 tokens, 8k, fp8 keys")
    assert prefill.flops == pytest.approx(16384 * (8192**2 - 2048**2) / 8, rel=1e-3)
    # At 8k of context: 83.9 M a token at full lists, less what the first tokens lack.
    chunk = find("CSA prefill, 8192 tokens, 64k, 64 heads, fp8 rows")
    assert chunk.flops == 8192 * 640 * 131072


def test_the_issue_names_its_cases():
    found = attention.all_cases(False)
    labels = [case.label for case in found]
    assert len(set(labels)) == len(labels) - sum(case.op == "mhc_head" for case in found)  # as mhc_post_pre's
    for batch in (1, 8, 32, 128):
        for context in ("8k", "128k", "1M"):
            assert f"decode, batch {batch}, {context}, fp8 keys" in labels
            for kind in ("CSA", "HCA"):
                for heads in (64, 32, 16, 8):
                    assert f"{kind} decode, batch {batch}, {context}, {heads} heads, fp8 rows" in labels
    assert f"8 rows x {1 << 18}, k=512" in labels
    aims = {aim.text for case in found for aim in case.aims}
    assert aims == {
        "at least 70 % of the copy bandwidth", "level with FlashMLA (95 % or more of its speed)", "250 TFLOP/s",
        "under 10 µs", "under 40 µs",
    }  # fmt: skip


def test_pages_belong_to_one_request_each(bench):
    page = window_page(RowFormat.fp8(64, 16), 16)
    caches, note = paged(bench, "window", page, copies=2, requests=3, first=100, last=200)
    others, _ = paged(bench, "others", page, copies=1, requests=1, first=0, last=0)
    tables = torch.stack([cache.block_table for cache in caches])
    assert tables.shape == (2, 3, 4)  # blocks of 64 tokens: 1 to 3 hold 100..200
    assert (tables[..., 0] == 0).all()
    used = tables[..., 1:].flatten().tolist()
    assert sorted(used) == list(range(1, 19))
    assert used != sorted(used)
    assert note == ""
    assert others[0].pages.data_ptr() != caches[0].pages.data_ptr()
    values = inputs.stored(caches[0], torch.arange(19 * 64))
    assert values.isfinite().all()
    assert values.std() == pytest.approx(1.0, abs=0.05)


def test_pages_that_do_not_fit_are_dealt_out_again_in_order(bench):
    page = entry_page(RowFormat.fp8(64, 16), 4)
    bench.memory_bytes = 4 * 10 * 2 * page.page_bytes
    caches, note = paged(bench, "entries", page, copies=1, requests=4, first=0, last=5 * 256 - 1)
    dealt = caches[0].block_table.flatten().tolist()
    assert dealt[:10] == dealt[10:]
    assert len(set(dealt[:10])) == 10
    assert note == "each page of entries is shared by 2.0 requests"


def test_indices_are_spread_over_what_is_visible():
    visible = torch.tensor([0, 3, 8, 9, 1000])
    found = spread_indices(visible, 8)
    assert found.dtype == torch.int32
    assert found[:3].tolist() == [[-1] * 8, [0, 1, 2] + [-1] * 5, list(range(8))]
    for row, count in zip(found[3:].tolist(), (9, 1000), strict=True):
        assert row == sorted(set(row))
        assert all(i * count // 8 <= entry < (i + 1) * count // 8 for i, entry in enumerate(row))


def test_quarter_turns_are_rotations(bench):
    cos, sin = inputs.quarter_turns(bench, 50, 16).chunk(2, dim=1)
    assert torch.equal(cos**2 + sin**2, torch.ones(50, 8))
    assert cos.unique().tolist() == sin.unique().tolist() == [-1, 0, 1]


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
    reference = attention.twin_and_reference("sparse_attention")[1]
    monkeypatch.setattr(attention, "twin_and_reference", lambda op: (reference, reference))
    case = attention.attention_case(WIDE, kind, "fp8", 2 if new == 1 else 1, new, 128, tp=1)
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
    case = attention.attention_case(WIDE, "window", "plain", 2, 1, 128, tp=1)
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
    head = attention.twin_and_reference("mhc_head")[1]
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
    reference = attention.twin_and_reference("route")[1]

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
    reference = attention.twin_and_reference("qnorm_rope_kv_insert")[1]

    def op(q, kv, pages, slots, positions, cos_sin, heads, eps, rows):
        assert heads == q.shape[1]
        own = torch.zeros((len(pages), rows * 583), dtype=torch.uint8)
        cache = dataclasses.replace(window, pages=own)
        vllm_kernels._copy_rows(pages, 8, own, 7, rows)
        out = reference(q, kv, cos_sin[positions], cache, slots, eps=eps)
        vllm_kernels._copy_rows(own, 7, pages, 8, rows)
        return out

    case = attention.insert_case(WIDE, 3)
    work = case.build(bench)
    window = work.calls[0].args[3]
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


@pytest.mark.gpu
def test_the_benchmark_times_kernels(tmp_path):
    assert attention.main(["--only", "topk", "mhc_head", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert all(row["us"] > 0 and 0 < row["percent"] <= 110 for row in rows)
