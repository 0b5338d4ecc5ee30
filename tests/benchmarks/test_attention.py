"""The attention benchmark: its cases and shapes, and that a wrong kernel fails its check."""

import dataclasses
import importlib
import json

import pytest
import torch

from benchmarks import roofline
from benchmarks.attention import cases as attention
from benchmarks.attention import indexer
from benchmarks.roofline import UnavailableError, WrongResultError


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


def off_by_a_hundredth(kernel):
    def run(*args, **options):
        out = kernel(*args, **options)
        first = out[0] if isinstance(out, tuple) else out
        first[-1] *= 1.02
        return out

    return run


def last_entry_replaced(kernel):
    def run(q, cos_sin, weights, entries, positions, request, **options):
        out = kernel(q, cos_sin, weights, entries, positions, request, **options)
        # The worst entry that was not chosen, in place of one that was.
        scores, _ = indexer.index_scores((q, cos_sin, weights, entries, positions, request), 0, **options)
        out[0, -1] = scores.argmin()
        out[0] = out[0].sort().values
        return out

    return run


def nothing(kernel):
    return lambda *args, **options: None


BREAKS = {
    "sparse_attention": off_by_a_hundredth, "indexer_topk": last_entry_replaced, "compress": nothing,
    "mhc_post_pre": off_by_a_hundredth, "mhc_head": off_by_a_hundredth,
    "qnorm_rope_kv_insert": off_by_a_hundredth, "route": off_by_a_hundredth,
}  # fmt: skip


@pytest.mark.parametrize("op", BREAKS)
def test_a_wrong_kernel_fails_its_check(monkeypatch, bench, op):
    kernel, reference = roofline.kernel_and_reference(op)
    monkeypatch.setattr(roofline, "kernel_and_reference", lambda op: (BREAKS[op](kernel), reference))
    with pytest.raises(WrongResultError):
        cases(op)[0].build(bench).check()


def test_rows_that_are_not_written_fail_the_check(monkeypatch, bench):
    def no_insert(q, kv, cos_sin, window, slots, *, eps):
        return kernel(q, kv, cos_sin, window, torch.full_like(slots, -1), eps=eps)

    kernel, reference = roofline.kernel_and_reference("qnorm_rope_kv_insert")
    monkeypatch.setattr(roofline, "kernel_and_reference", lambda op: (no_insert, reference))
    with pytest.raises(WrongResultError, match="a window row"):
        cases("qnorm_rope_kv_insert")[0].build(bench).check()


def test_entries_that_are_not_written_fail_the_check(monkeypatch, bench):
    def states_only(*args, **options):
        *rest, entries = args
        kernel(*rest, dataclasses.replace(entries, pages=entries.pages.clone()), **options)

    kernel, reference = roofline.kernel_and_reference("compress")
    monkeypatch.setattr(roofline, "kernel_and_reference", lambda op: (states_only, reference))
    with pytest.raises(WrongResultError, match="an entry"):
        cases("compress")[0].build(bench).check()


def test_a_wrong_topk_fails_its_check(monkeypatch, bench):
    module = importlib.import_module("vllm_deepseek_v4flash.ops.triton.topk")
    monkeypatch.setattr(module, "topk", lambda scores, counts, selected, limit: selected.copy_(torch.arange(8)))
    with pytest.raises(WrongResultError, match="the selection"):
        cases("topk")[0].build(bench).check()


def test_an_op_without_a_kernel_is_reported():
    with pytest.raises(UnavailableError, match="no_such_op has no Triton kernel"):
        roofline.kernel_and_reference("no_such_op")


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
        indexer.check_selection(*given)
    else:
        with pytest.raises(WrongResultError, match=message):
            indexer.check_selection(*given)


def test_a_short_selection_ends_in_minus_one():
    few, off = SCORES[:2], torch.zeros(2, dtype=torch.float64)
    indexer.check_selection("token 0", torch.tensor([0, 1, -1]), few, off, 3)
    with pytest.raises(WrongResultError, match="not -1"):
        indexer.check_selection("token 0", torch.tensor([0, 1, 0]), few, off, 3)


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


def test_every_kind_batch_and_context_has_a_case():
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


@pytest.mark.gpu
def test_the_benchmark_times_kernels(tmp_path):
    assert attention.main(["--only", "topk", "mhc_head", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert all(row["us"] > 0 and 0 < row["percent"] <= 110 for row in rows)
