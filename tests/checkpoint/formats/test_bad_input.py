"""Wrong headers and wrong values: an error that names the module and the tensor, what it has and what it should."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from testing import format_cases as cases
from testing.fixtures import headers
from testing.format_cases import (
    CASES,
    FP8_CONFIG,
    FP8_GROUP,
    MODULE,
    SCALE_LEAVES,
    WEIGHT_LEAVES,
    Case,
    Make,
    ct_config,
    weights_args,
)
from vllm_deepseek_v4flash.checkpoint.formats import format_of
from vllm_deepseek_v4flash.checkpoint.headers import TensorHeader
from vllm_deepseek_v4flash.ops.packed_weight import QuantizationError, Scheme

PACKED = [
    pytest.param(make, id=f"{name}-{case}")
    for name, made in CASES.items()
    for case, make in made.items()
    if case != "plain" and name != "unquantised"
]


def describe(case: Case) -> Scheme:
    return format_of(case.config).describe(case.config, case.module, headers(case.leaves))


def message(call: Callable[[], object]) -> str:
    with pytest.raises(QuantizationError) as caught:
        call()
    return str(caught.value)


def with_leaf(case: Case, leaf: str, tensor: torch.Tensor) -> Case:
    return replace(case, leaves={**case.leaves, leaf: tensor})


def both(case: Case, scheme: Scheme) -> list[str]:
    """The messages of repack and of dequantise."""
    form = format_of(case.config)
    return [message(partial(read, case.leaves, scheme)) for read in (form.repack, form.dequantise)]


@pytest.mark.parametrize("make", PACKED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scale_not_finite(make: Make, value: float) -> None:
    case = make()
    leaf = next(name for name in SCALE_LEAVES if name in case.leaves)
    scheme, scales = describe(case), case.leaves[leaf].clone()
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scales.view(torch.uint8)[-1, 0] = 255  # its only value that is not finite
    else:
        scales[-1, 0] = value
    at = f"[{scales.shape[0] - 1}, 0]"
    for text in both(with_leaf(case, leaf, scales), scheme):
        assert text.startswith(f"{case.module}: tensor {leaf} has 1 scales that are NaN or inf, the first at {at}")


@pytest.mark.parametrize("make", PACKED)
def test_cut_short(make: Make) -> None:
    """A companion tensor one row short: refused from the header, and again when it is read."""
    case = make()
    scheme = describe(case)
    for leaf, tensor in case.leaves.items():
        if leaf in WEIGHT_LEAVES:
            continue
        short = with_leaf(case, leaf, tensor[:-1])
        for text in (message(partial(describe, short)), *both(short, scheme)):
            assert text.startswith(f"{case.module}: tensor {leaf} has shape ["), text
            assert "should be" in text


@pytest.mark.parametrize("make", PACKED)
def test_weight_cut_short_when_read(make: Make) -> None:
    case = make()
    leaf = next(name for name in WEIGHT_LEAVES if name in case.leaves)
    for text in both(with_leaf(case, leaf, case.leaves[leaf][:-1]), describe(case)):
        assert re.match(rf"{re.escape(case.module)}: tensor {leaf} has shape \[.*\], should be \[", text)


@pytest.mark.parametrize("make", PACKED)
def test_wrong_dtype(make: Make) -> None:
    case = make()
    for leaf, tensor in case.leaves.items():
        wrong = with_leaf(case, leaf, torch.zeros(tensor.shape, dtype=torch.int16))
        text = message(partial(describe, wrong))
        assert text.startswith(f"{case.module}: tensor {leaf} has dtype I16, should be ")


@pytest.mark.parametrize("make", PACKED)
def test_missing_and_unexpected(make: Make) -> None:
    case = make()
    scheme = describe(case)
    optional = {"weight_shape"}
    optional |= set() if scheme.zero_points else {"qzeros"}
    optional |= set() if scheme.act_order else {"g_idx"}
    for leaf in case.leaves:
        rest = replace(case, leaves={name: tensor for name, tensor in case.leaves.items() if name != leaf})
        if leaf in optional:
            form = format_of(rest.config)
            assert torch.equal(form.dequantise(rest.leaves, describe(rest)), case.weight)
        else:
            assert message(partial(describe, rest)).startswith(f"{case.module}: ")
    text = message(lambda: describe(with_leaf(case, "weight_scale_2", torch.zeros(1))))
    assert "unexpected tensor weight_scale_2" in text


def edited(make: Make, leaf: str, edit: Callable[[torch.Tensor], object]) -> Make:
    def made() -> Case:
        case = make()
        tensor = case.leaves[leaf].clone()
        edit(tensor)
        return with_leaf(case, leaf, tensor)

    return made


def put(index: Any, value: int) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor.__setitem__(index, value)


ORDERED, CT_ORDERED = CASES["gptq"]["v1-g64-asym-act"], CASES["compressed-tensors"]["g64-asym-group"]
TRIVIAL, CT_TRIVIAL = CASES["gptq"]["v1-g64-sym"], CASES["compressed-tensors"]["g64-sym-None"]

# What is wrong, the case, and what the message says.
VALUES: dict[str, tuple[Make, str]] = {
    "g_idx too high": (edited(ORDERED, "g_idx", put(5, 4)), "tensor g_idx holds group 4, should be 0 to 3"),
    "g_idx negative": (edited(ORDERED, "g_idx", put(5, -2)), "tensor g_idx holds group -2, should be 0 to 3"),
    "g_idx uneven": (
        edited(ORDERED, "g_idx", lambda g: g.copy_(torch.where(g == 3, 2, g))),
        "tensor g_idx gives group 2 128 columns, should be 64 in every group",
    ),
    "g_idx without desc_act": (
        edited(TRIVIAL, "g_idx", put(5, 2)),
        "tensor g_idx puts column 5 in group 2, should be 0 because the config has no act-order; set desc_act",
    ),
    "g_idx too high without desc_act": (edited(TRIVIAL, "g_idx", put(5, 9)), "holds group 9, should be 0 to 3"),
    "weight_g_idx too high": (edited(CT_ORDERED, "weight_g_idx", put(5, 4)), "weight_g_idx holds group 4"),
    "weight_g_idx uneven": (edited(CT_ORDERED, "weight_g_idx", lambda g: g.zero_()), "gives group 0 256 columns"),
    "gptq zero point, symmetric": (
        edited(TRIVIAL, "qzeros", put((0, 0), 0x77777776)),
        "tensor qzeros has a zero point of 7, should be 8 everywhere because the config says symmetric",
    ),
    "awq zero point, symmetric": (
        edited(CASES["awq"]["g64-sym"], "qzeros", put((0, 0), 0x78888888)),
        "tensor qzeros has a zero point of 7, should be 8",
    ),
    "gptq data read as v2": (
        lambda: replace(TRIVIAL(), config={**TRIVIAL().config, "checkpoint_format": "gptq_v2"}),
        "tensor qzeros has a zero point of 7, should be 8",
    ),
    "zero point above 7": (
        edited(CASES["compressed-tensors"]["zero-points-not-packed"], "weight_zero_point", put((0, 0), 8)),
        "tensor weight_zero_point holds 8, should be -8 to 7",
    ),
    "zero point below -8": (
        edited(CASES["compressed-tensors"]["zero-points-not-packed"], "weight_zero_point", put((0, 0), -9)),
        "tensor weight_zero_point holds -9, should be -8 to 7",
    ),
    "zero point, symmetric": (
        lambda: with_leaf(CT_TRIVIAL(), "weight_zero_point", torch.full((48, 4), 1, dtype=torch.int8)),
        "tensor weight_zero_point has a zero point of 9, should be 8",
    ),
    "weight_shape": (
        edited(CT_TRIVIAL, "weight_shape", put(1, 250)),
        "tensor weight_shape says [48, 250], should be [48, 256]",
    ),
    "bias": (
        lambda: with_leaf(TRIVIAL(), "bias", torch.ones(48, dtype=torch.float16)),
        "tensor bias is not zero",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_value(name: str) -> None:
    make, want = VALUES[name]
    case = make()
    scheme = describe(case)
    text = message(lambda: format_of(case.config).repack(case.leaves, scheme))
    assert text.startswith(f"{MODULE}: ")
    assert want in text


def test_a_bias_of_zeros_is_dropped() -> None:
    case = with_leaf(TRIVIAL(), "bias", torch.zeros(48, dtype=torch.float16))
    assert set(format_of(case.config).repack(case.leaves, describe(case))) == {"qweight", "scales"}


def config(make: Make, **changes: Any) -> Case:
    case = make()
    return replace(case, config={**case.config, **changes})


def ct(weights: dict[str, Any], **changes: Any) -> Case:
    return replace(CT_TRIVIAL(), config=ct_config(weights, **changes))


AWQ, AUTO_ROUND = CASES["awq"]["g64-asym"], CASES["auto-round"]["auto_gptq"]
CT_FP8, NATIVE, FP4 = CASES["compressed-tensors"]["fp8-block"], CASES["deepseek"]["fp8-fp32"], CASES["deepseek"]["fp4"]
TRANSFORMERS = "model.layers.3.mlp.experts.7.gate_proj"
NOT_SUPPORTED = "{} in quantization_config: not supported. It should be "
EXCLUDED = "is packed, but {} leaves this module unquantised ({!r})"

CONFIGS: dict[str, tuple[Callable[[], Case], str]] = {
    **{
        f"{bits} bits, {name}": (made, f"the config says {bits}-bit int weights, which are not supported. Packed")
        for bits in (2, 3, 8)
        for name, made in {
            "gptq": lambda bits=bits: config(TRIVIAL, bits=bits),
            "awq": lambda bits=bits: config(AWQ, bits=bits),
            "auto-round": lambda bits=bits: config(AUTO_ROUND, bits=bits),
            "compressed-tensors": lambda bits=bits: ct(weights_args(num_bits=bits)),
            "dynamic": lambda bits=bits: config(TRIVIAL, dynamic={r"+:.*experts\..*": {"bits": bits}}),
            "extra_config": lambda bits=bits: config(AUTO_ROUND, extra_config={"layers.3": {"bits": bits}}),
        }.items()
    },
    "nvfp4": (lambda: ct(weights_args(type="float", strategy="tensor_group", group_size=16)), "4-bit float weights"),
    "mxfp, auto-round": (lambda: config(AUTO_ROUND, data_type="mx_fp"), "4 (mx_fp)-bit int weights"),
    "group size, gptq": (
        lambda: config(TRIVIAL, group_size=32),
        "tensor scales has shape [4, 48], should be [8, 48] (qweight [32, 48], group_size 32)",
    ),
    "group size, awq": (lambda: config(AWQ, group_size=128), "tensor scales has shape [4, 48], should be [2, 48]"),
    "group size, auto-round": (
        lambda: config(AUTO_ROUND, group_size=64),
        "scales has shape [2, 48], should be [4, 48]",
    ),
    "group size, compressed-tensors": (
        lambda: ct(weights_args(group_size=128)),
        "tensor weight_scale has shape [48, 4], should be [48, 2]",
    ),
    "group size does not divide": (lambda: config(TRIVIAL, group_size=96), "not a whole number of groups of 96"),
    "group size 0": (
        lambda: config(TRIVIAL, group_size=0),
        NOT_SUPPORTED.format("group_size=0"),
    ),
    "group size a word": (
        lambda: config(TRIVIAL, group_size="64"),
        NOT_SUPPORTED.format("group_size='64'") + "a positive integer, or -1",
    ),
    "checkpoint_format": (
        lambda: config(TRIVIAL, checkpoint_format="marlin"),
        NOT_SUPPORTED.format("checkpoint_format='marlin'") + "gptq, gptq_v2 or gemm.",
    ),
    "pack_dtype": (
        lambda: config(TRIVIAL, pack_dtype="int64"),
        NOT_SUPPORTED.format("pack_dtype='int64'") + "'int32'.",
    ),
    "version": (
        lambda: config(AWQ, version="gemv"),
        NOT_SUPPORTED.format("version='gemv'") + "'gemm'.",
    ),
    "packing_format": (
        lambda: config(AUTO_ROUND, packing_format="auto_round:llm_compressor"),
        NOT_SUPPORTED.format("packing_format='auto_round:llm_compressor'") + "auto_round:auto_gptq",
    ),
    "excluded by dynamic": (
        lambda: config(TRIVIAL, dynamic={r"-:.*experts\.7\..*": {}}),
        EXCLUDED.format("`dynamic`", r"-:.*experts\.7\..*"),
    ),
    "excluded by modules_to_not_convert": (
        lambda: config(AWQ, modules_to_not_convert=["lm_head", TRANSFORMERS]),
        EXCLUDED.format("`modules_to_not_convert`", TRANSFORMERS),
    ),
    "excluded by a part of its name": (
        lambda: config(AWQ, modules_to_not_convert=["experts"]),
        EXCLUDED.format("`modules_to_not_convert`", "experts"),
    ),
    "excluded by extra_config": (
        lambda: config(AUTO_ROUND, extra_config={TRANSFORMERS: {"bits": 16}}),
        EXCLUDED.format("`extra_config`", TRANSFORMERS),
    ),
    "excluded by a regex of extra_config": (
        lambda: config(AUTO_ROUND, extra_config={r".*experts\.7.*": {"bits": 16, "data_type": "float"}}),
        EXCLUDED.format("`extra_config`", r".*experts\.7.*"),
    ),
    "excluded, auto-round's modules_to_not_convert": (
        lambda: config(AUTO_ROUND, modules_to_not_convert=[TRANSFORMERS]),
        EXCLUDED.format("`modules_to_not_convert`", TRANSFORMERS),
    ),
    "ignored": (
        lambda: ct(weights_args(), ignore=["lm_head", TRANSFORMERS]),
        EXCLUDED.format("`ignore`", TRANSFORMERS),
    ),
    "ignored by regex": (
        lambda: ct(weights_args(), ignore=["re:.*experts.*"]),
        EXCLUDED.format("`ignore`", "re:.*experts.*"),
    ),
    "excluded, deepseek": (
        lambda: replace(NATIVE(), config={**FP8_CONFIG, "modules_to_not_convert": ["wq_b"]}),
        EXCLUDED.format("`modules_to_not_convert`", "wq_b"),
    ),
    "no group": (
        lambda: replace(CT_TRIVIAL(), config=ct_config(weights_args(), targets=("re:.*self_attn.*",))),
        "tensor weight_packed is packed, but no entry of `config_groups` targets this module; there are ['group_0']",
    ),
    "strategy": (
        lambda: ct(weights_args(strategy="tensor")),
        NOT_SUPPORTED.format("strategy='tensor'"),
    ),
    "fp8 per channel": (
        lambda: replace(CT_FP8(), config=ct_config({**FP8_GROUP, "strategy": "channel", "block_structure": None})),
        "stores 8-bit float weights with strategy 'channel' and block_structure None, which is not supported",
    ),
    "fp8 under an int4 group": (
        lambda: replace(CT_FP8(), config=ct_config(weights_args())),
        "group 'group_0' of the config stores 4-bit int weights",
    ),
    "weight_block_size": (
        lambda: config(NATIVE, weight_block_size=[64, 64]),
        NOT_SUPPORTED.format("weight_block_size=[64, 64]") + "[128, 128].",
    ),
    "fmt": (
        lambda: config(NATIVE, fmt="e5m2"),
        NOT_SUPPORTED.format("fmt='e5m2'") + "'e4m3'.",
    ),
    "not a regex": (lambda: config(TRIVIAL, dynamic={"+:*": {}}), "holds '*', which is not a regular expression"),
    "packed, but no quantization_config": (
        lambda: replace(TRIVIAL(), config={}),
        "has qweight [32, 48] I32, qzeros [4, 6] I32, scales [4, 48] F16, g_idx [256] I32, should be a weight in BF16, "
        "F16, F32 or F64, because config.json has no quantization_config. Restore",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name: str) -> None:
    make, want = CONFIGS[name]
    case = make()
    text = message(lambda: describe(case))
    assert want in text
    if "regular expression" not in want:
        assert text.startswith(f"{case.module}: ")


def test_fp4_rows_must_be_whole_groups() -> None:
    leaves = {"weight": TensorHeader("I8", (8, 40)), "scale": TensorHeader("F8_E8M0", (8, 2))}
    text = message(lambda: format_of(FP8_CONFIG).describe(FP8_CONFIG, MODULE, leaves))
    assert "tensor weight has 40 bytes a row, should be a multiple of 16" in text


def test_awq_odd_rows() -> None:
    case = cases.awq(group=-1)
    odd = {"qweight": TensorHeader("I32", (255, 6)), "scales": TensorHeader("F16", (1, 48))}
    odd["qzeros"] = TensorHeader("I32", (1, 6))
    assert "255 input rows, should be an even number" in message(
        lambda: format_of(case.config).describe(case.config, MODULE, odd)
    )
