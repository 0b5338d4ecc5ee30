"""Every format of the registry: random weights, and the checkpoints of the public tools, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from testing.fixtures import PARTIAL, WHOLE, fixture, headers, sha256
from testing.format_cases import CASES, WEIGHT_LEAVES, Case, Make
from vllm_deepseek_v4flash.checkpoint.formats import FORMATS, format_of, is_supported, register
from vllm_deepseek_v4flash.log import warning_once
from vllm_deepseek_v4flash.ops.packed_weight import QuantizationError, Scheme, canonical_shapes, dequantise

RANDOM = [
    pytest.param(name, make, id=f"{name}-{case}") for name, cases in CASES.items() for case, make in cases.items()
]


def described(case: Case) -> Scheme:
    return format_of(case.config).describe(case.config, case.module, headers(case.leaves))


def test_every_format_has_cases() -> None:
    assert set(CASES) == set(FORMATS)
    assert all(CASES.values())


@pytest.mark.parametrize(("name", "make"), RANDOM)
def test_random(name: str, make: Make) -> None:
    case = make()
    form = format_of(case.config)
    assert form is FORMATS[name]
    scheme = described(case)
    assert (scheme.kind, scheme.module, scheme.shape) == (case.kind, case.module, tuple(case.weight.shape))
    before = {leaf: tensor.clone() for leaf, tensor in case.leaves.items()}

    canonical = form.repack(case.leaves, scheme)

    found = {leaf: (tuple(tensor.shape), tensor.dtype) for leaf, tensor in canonical.items()}
    assert found == canonical_shapes(scheme, *scheme.shape)
    assert all(tensor.is_contiguous() for tensor in canonical.values())
    # Bytes, not values: -0 is told from +0.
    want = case.weight.view(torch.int32)
    assert torch.equal(dequantise(canonical, scheme).view(torch.int32), want)
    assert torch.equal(form.dequantise(case.leaves, scheme).view(torch.int32), want)
    for leaf, tensor in case.leaves.items():
        assert torch.equal(tensor.flatten().view(torch.uint8), before[leaf].flatten().view(torch.uint8)), leaf


@pytest.mark.parametrize(("name", "make"), RANDOM)
def test_groups_are_contiguous(name: str, make: Make) -> None:
    """`perm` sorts the columns by group: W = W_c with its columns put back, x[perm] for W_c."""
    case = make()
    scheme = described(case)
    canonical = FORMATS[name].repack(case.leaves, scheme)
    if not scheme.act_order:
        assert "perm" not in canonical
        return
    perm = canonical["perm"].long()
    assert torch.equal(perm.sort().values, torch.arange(scheme.shape[1]))
    assert not torch.equal(perm, perm.sort().values)
    g_idx = case.leaves.get("g_idx", case.leaves.get("weight_g_idx"))
    assert g_idx is not None
    assert torch.equal(g_idx[perm].long(), torch.arange(scheme.shape[1]) // scheme.group_size)
    # Within a group in their order, so that w1 and w3 with one g_idx get one perm on every machine.
    in_group = perm.unflatten(0, (-1, scheme.group_size))
    assert torch.equal(in_group, in_group.sort(dim=1).values)


@pytest.mark.parametrize("name", WHOLE + PARTIAL)
def test_checkpoints_of_the_tools(name: str) -> None:
    checkpoint = fixture(name)
    form = format_of(checkpoint.config)
    packed = set()
    for module, leaves in checkpoint.modules.items():
        if not leaves.keys() & set(WEIGHT_LEAVES):
            continue  # a bare parameter
        scheme = form.describe(checkpoint.config, module, headers(leaves))
        assert (scheme.kind == "plain") == (module not in checkpoint.hashes), module
        if scheme.kind == "plain":
            continue
        packed.add(module)
        assert sha256(form.dequantise(leaves, scheme)) == checkpoint.hashes[module], module
        assert sha256(dequantise(form.repack(leaves, scheme), scheme)) == checkpoint.hashes[module], module
    assert packed == set(checkpoint.hashes)


def test_a_zero_point_of_0_borrows_and_wraps_in_gptq_v1() -> None:
    case = CASES["gptq"]["v1-g64-asym"]()
    scheme = described(case)
    assert (case.leaves["qzeros"][0, 0] & 15) == 15
    zeros = FORMATS["gptq"].repack(case.leaves, scheme)["zeros"]
    assert zeros[0].tolist() == [0, 0, 0, 0]
    assert zeros[1].tolist() == [15, 15, 15, 15]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("model-free-0.15.1-auto_round-asym", "0.15.1) stores asymmetric zero points minus one"),
        ("model-free-0.16.1-auto_round:auto_gptq-asym", "0.16.1) stores asymmetric zero points as they are"),
        ("model-free-0.16.1-auto_round", "0.16.1) stores symmetric zero points minus one"),
    ],
)
def test_a_label_that_is_not_the_layout_is_said_once(case: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    warning_once.cache_clear()
    with caplog.at_level("WARNING", logger="vllm.deepseek_v4flash"):
        for name in (case, case, "as-labelled-asym", "model-free-0.16.1-auto_round-asym"):
            described(CASES["auto-round"][name.replace("auto_round:", "")]())
    assert [record.name for record in caplog.records] == ["vllm.deepseek_v4flash.checkpoint.formats.auto_round"]
    assert said in caplog.text


@pytest.mark.parametrize("version", [None, "", "main", "0.16.0.dev12+gabc", "0.16.0rc1", 16])
def test_asymmetric_zero_points_of_an_unknown_release_are_refused(version: object) -> None:
    case = CASES["auto-round"]["model-free-0.16.1-auto_round-asym"]()
    case.config["autoround_version"] = version
    with pytest.raises(QuantizationError, match=r"autoround_version=.*minus one before 0\.16, as it is since"):
        described(case)
    # Both store a symmetric zero point minus one.
    case = CASES["auto-round"]["model-free-0.16.1-auto_round"]()
    case.config["autoround_version"] = version
    assert described(case).source == "gptq_v1"


def test_unknown_method() -> None:
    with pytest.raises(QuantizationError, match=r"quant_method='bitsandbytes'.*Use .* quant_method is awq, gptq"):
        format_of({"quant_method": "bitsandbytes"})
    assert format_of(None) is format_of({}) is FORMATS["unquantised"]


@pytest.mark.parametrize(
    ("method", "name"),
    [("GPTQ", "gptq"), ("compressed_tensors", "compressed-tensors"), ("Auto-Round", "auto-round"), ("fp8", "deepseek")],
)
def test_vllms_spellings_of_a_method(method: str, name: str) -> None:
    assert format_of({"quant_method": method}) is FORMATS[name]
    assert is_supported(method)


def test_a_format_is_registered_once() -> None:
    for again in (FORMATS["awq"], replace(FORMATS["awq"], name="new"), replace(FORMATS["awq"], quant_methods=())):
        with pytest.raises(ValueError, match="already registered"):
            register(again)
    assert not is_supported("None")
