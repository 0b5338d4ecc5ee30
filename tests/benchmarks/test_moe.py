import importlib
import json

import pytest
import torch

from benchmarks import moe
from benchmarks.roofline import Bench, UnavailableError, WrongResultError


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return moe.main(["--dry-run", "--out", str(out)]), json.loads((out / "moe.json").read_text())


def test_a_dry_run_checks_every_case_of_triton_and_says_why_not_the_others(dry_run):
    status, report = dry_run
    assert (status, report["failures"]) == (0, [])
    assert [row["case"] for row in report["rows"]] == [case.label for case in moe.all_cases(True)]
    for row in report["rows"]:
        assert row["us"] is None
        if row["case"].endswith("triton"):
            assert row["checked"]
            assert row["peers_not_run"]
        else:
            assert not row["checked"]
            assert "csrc/'s kernels need a GPU" in row["reason"]


@pytest.mark.parametrize("weight", ["int4", "fp4"])
def test_a_wrong_kernel_is_noticed(monkeypatch, weight):
    module = importlib.import_module("vllm_deepseek_v4flash.ops.triton.packed_experts")
    right = module.packed_experts
    monkeypatch.setattr(module, "packed_experts", lambda *args, **options: right(*args, **options) * 1.03)
    case = next(case for case in moe.all_cases(True) if case.op == weight)
    with pytest.raises(WrongResultError):
        case.build(Bench(torch.device("cpu"), dry=True)).check()


def test_every_format_has_flashs_tokens_and_widths():
    labels = {case.label for case in moe.all_cases(False)}
    for weight in ("int4", "fp4"):
        for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192):
            for inner in (2048, 1024):
                assert f"{weight}, {tokens} tokens, intermediate {inner}, triton" in labels
                named = f"{weight}, {tokens} tokens, intermediate {inner}, cuda" in labels
                assert named == (tokens <= 32)


@pytest.mark.parametrize("weight", ["int4", "fp4"])
def test_marlins_weights_are_made_from_ours(monkeypatch, weight):
    """Its repacking needs a GPU; that it gets whole matrices of words, and the scales their places, does not."""
    custom = importlib.import_module("vllm._custom_ops")

    def repack(b_q_weight, size_k, size_n, num_bits, is_a_8bit=False):
        assert b_q_weight.shape[-2:] == (size_k // 8, size_n)
        return b_q_weight.reshape(*b_q_weight.shape[:-2], size_k // 16, size_n * num_bits // 2)

    for name in ("gptq_marlin_repack", "gptq_marlin_moe_repack"):
        monkeypatch.setattr(custom, name, repack)
    monkeypatch.setattr(moe.vllm_kernels, "need_cuda", lambda bench: None)
    bench, s = Bench(torch.device("cpu"), dry=True), moe.TINY
    layer = moe.layer_of(bench, s, weight, s.inners[0])
    (q13, s13), (q2, s2) = (moe.marlin_int4 if weight == "int4" else moe.marlin_fp4)(bench, layer)
    for codes, scales, n, k in ((q13, s13, 2 * s.inners[0], s.hidden), (q2, s2, s.hidden, s.inners[0])):
        assert (codes.dtype, codes.shape) == (torch.int32, (s.experts, k // 16, 2 * n))
        assert scales.shape == (s.experts, k // layer.scheme.group_size, n)
    stored = layer.w13["scales"].flatten(1)
    moved = s13.flatten(1).view(stored.dtype)
    assert torch.equal(moved.float().sort().values, stored.float().sort().values)


def test_kernels_of_csrc_are_not_replaced_by_others():
    with pytest.raises(UnavailableError, match="need a GPU"):
        moe.ours(Bench(torch.device("cpu"), dry=True), "cuda")


def test_the_bound_of_tokens_is_the_kernels_own():
    from vllm_deepseek_v4flash.ops.cuda.packed_experts import MOST_TOKENS

    assert moe.MOST_TOKENS == MOST_TOKENS


def test_as_many_experts_as_tokens_choose_on_average():
    assert moe.distinct(moe.FLASH, 1) == pytest.approx(6)
    assert moe.distinct(moe.FLASH, 8) == pytest.approx(44.2, abs=0.1)
    # 3 matrices of 4096 x 2048 codes of half a byte, and a bf16 scale for every 128 of them.
    assert moe.expert_bytes("int4", moe.FLASH, 2048) == 3 * 4096 * 2048 * (1 / 2 + 2 / 128)
