"""Ignore lists, overrides and targets: whichever spelling they use, they find DeepSeek's module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from testing import format_cases as cases
from testing.fixtures import headers
from testing.format_cases import CASES, FP8_GROUP, Case, weights_args
from vllm_deepseek_v4flash.checkpoint.formats import format_of, patterns
from vllm_deepseek_v4flash.ops.packed_weight import QuantizationError, Scheme

WEIGHTS_PROJ = "layers.1.attn.indexer.weights_proj"


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        ("lm_head", "head"),
        ("head", "head"),
        ("model.embed_tokens", "embed"),
        ("model.layers.0.mlp.gate", "layers.0.ffn.gate"),
        ("model.layers.0.ffn.gate", "layers.0.ffn.gate"),
        ("layers.0.ffn.gate", "layers.0.ffn.gate"),
        ("model.layers.1.self_attn.compressor.indexer.scorer.weights_proj", WEIGHTS_PROJ),
        ("model.layers.1.attn.indexer.compressor.scorer.weights_proj", WEIGHTS_PROJ),
        ("model.layers.1.attn.indexer.weights_proj", WEIGHTS_PROJ),
        ("model.layers.2.mlp.experts.11.down_proj", "layers.2.ffn.experts.11.w2"),
        ("model.layers.2.ffn.experts.11.up_proj", "layers.2.ffn.experts.11.w3"),
    ],
)
def test_names(pattern: str, module: str) -> None:
    assert patterns.is_module(pattern, module)
    assert patterns.find_name(["layers.9.attn.wkv", pattern], module) == pattern
    assert not patterns.is_module(pattern, "layers.0.attn.wkv")
    assert patterns.find_name([pattern], "layers.0.attn.wkv") is None


@pytest.mark.parametrize(
    ("pattern", "module", "found"),
    [
        ("wo_a", "layers.5.attn.wo_a", True),
        ("o_a_proj", "layers.5.attn.wo_a", True),
        ("self_attn.o_a_proj", "layers.5.attn.wo_a", True),
        ("layers.5", "layers.5.attn.wo_a", True),
        ("mlp.gate", "layers.0.ffn.gate", True),
        ("shared_experts", "layers.0.ffn.shared_experts.w1", True),
        ("gate", "layers.0.ffn.experts.0.w1", False),
        ("gate", "layers.1.attn.compressor.wgate", False),
        ("experts", "layers.0.ffn.shared_experts.w1", False),
        ("layers.5", "layers.50.attn.wo_a", False),
        ("layers.5", "layers.15.attn.wo_a", False),
        ("wo", "layers.5.attn.wo_a", False),
        # The indexer is inside the compressor to transformers, next to it to DeepSeek.
        ("compressor", "layers.1.attn.compressor.wkv", True),
        ("compressor", "layers.1.attn.indexer.compressor.wkv", True),
        ("compressor", "layers.1.attn.indexer.wq_b", False),
        ("compressor", "layers.1.attn.indexer.weights_proj", False),
        ("attn.compressor", "layers.1.attn.indexer.wq_b", False),
        ("attn.compressor", "layers.1.attn.compressor.wkv", True),
        # Only transformers has these words, so they mean what they mean there.
        ("self_attn.compressor", "layers.1.attn.indexer.wq_b", True),
        ("gate_proj", "layers.1.attn.compressor.wgate", True),
        ("indexer", "layers.1.attn.indexer.wq_b", True),
        ("layers.1.attn.compressor", "layers.1.attn.compressor.wgate", True),
        ("self_attn.wq_b", "layers.1.attn.wq_b", True),
    ],
)
def test_parts_of_names(pattern: str, module: str, found: bool) -> None:
    assert patterns.find_name([pattern], module) == (pattern if found else None)


@pytest.mark.parametrize(
    ("pattern", "module", "match"),
    [
        (r".*experts.*", "layers.0.ffn.experts.3.w1", "all"),
        (r"model\.layers\.0\..*", "layers.0.attn.wkv", "all"),
        (r"layers\.0\..*", "layers.0.attn.wkv", "all"),
        (r".*mlp\.gate$", "layers.0.ffn.gate", "some"),
        # The router to transformers; to DeepSeek the compressor's gate too.
        (r".*gate$", "layers.1.attn.compressor.wgate", "some"),
        (r".*gate$", "layers.1.ffn.gate", "all"),
        (r".*attn\.q_a_proj", "layers.0.attn.wq_a", "some"),
        (r".*mlp.*", "layers.0.attn.wq_a", "none"),
        (r"experts", "layers.0.ffn.experts.3.w1", "none"),
    ],
)
def test_regexes_match_from_the_start(pattern: str, module: str, match: str) -> None:
    assert patterns.regex_match(pattern, module, anchored=True) == match


def test_searching_regexes() -> None:
    assert patterns.regex_match(r"experts\.\d", "layers.0.ffn.experts.3.w1", anchored=False) == "all"


def test_a_module_outside_the_table_keeps_its_name() -> None:
    assert patterns.spellings("mtp.0.e_proj")[0] == ("model.mtp.0.e_proj", "mtp.0.e_proj")


def describe(case: Case, module: str, **config: Any) -> Scheme:
    config = {**case.config, **config}
    return format_of(config).describe(config, module, headers(case.leaves))


def test_auto_round_overrides() -> None:
    """A name before a part of a name before a regular expression."""
    case = CASES["auto-round"]["auto_gptq-asym"]()
    extra = {
        r".*\.w[13]$": {"group_size": 64, "sym": False},
        "wo_a": {"bits": 16},
        "layers.3.ffn.experts.7": {"bits": 2},
        "model.layers.3.mlp.experts.7.gate_proj": {"group_size": 64},
        "model.layers.0.self_attn.q_a_proj": {"bits": 16, "data_type": "float"},
    }
    wrong = {"group_size": 128, "extra_config": extra}
    assert describe(case, "layers.3.ffn.experts.7.w1", **wrong).group_size == 64
    assert describe(case, "layers.3.ffn.experts.8.w1", **wrong).zero_points
    for module, text in (
        ("layers.3.ffn.experts.7.w3", "2-bit"),
        ("layers.3.attn.wo_a", "'wo_a'"),
        ("layers.0.attn.wq_a", "q_a_proj"),
        ("layers.1.attn.wq_a", "should be [2, 48]"),
    ):
        with pytest.raises(QuantizationError) as caught:
            describe(case, module, **wrong)
        assert text in str(caught.value)


def test_a_regex_that_is_right_in_one_spelling_only_leaves_it_to_the_tensors() -> None:
    auto_round, compressed = CASES["auto-round"]["auto_gptq"](), CASES["compressed-tensors"]["g64-sym-None"]()
    wgate = "layers.1.attn.compressor.wgate"
    assert describe(auto_round, wgate, extra_config={".*gate$": {"bits": 16}}).kind == "int4"
    assert describe(compressed, wgate, ignore=["re:.*gate$"]).kind == "int4"
    with pytest.raises(QuantizationError, match="`ignore` leaves this module unquantised"):
        describe(compressed, "layers.1.ffn.gate", ignore=["re:.*gate$"])


@pytest.mark.parametrize("word", ["compressor", "attn.compressor"])
def test_a_word_that_is_right_in_one_spelling_only_leaves_it_to_the_tensors(word: str) -> None:
    auto_round, awq = CASES["auto-round"]["auto_gptq"](), CASES["awq"]["g64-asym"]()
    wq_b, wkv = "layers.1.attn.indexer.wq_b", "layers.1.attn.compressor.wkv"
    assert describe(auto_round, wq_b, extra_config={word: {"bits": 16}}).kind == "int4"
    assert describe(awq, wq_b, modules_to_not_convert=[word]).kind == "int4"
    for case, key, value in (
        (auto_round, "extra_config", {word: {"bits": 16}}),
        (awq, "modules_to_not_convert", [word]),
    ):
        with pytest.raises(QuantizationError, match="leaves this module unquantised"):
            describe(case, wkv, **{key: value})


def test_gptq_dynamic_takes_the_first_match() -> None:
    case = CASES["gptq"]["v1-g32-asym-act"]()
    dynamic = {
        r"-:.*self_attn\..*|layers\.\d+\.attn\..*": {},
        r"+:.*experts\.7\.(gate_proj|w1)": {"group_size": 32, "sym": False, "desc_act": True},
        r".*experts.*": {"bits": 8},
    }
    wrong = {"group_size": 128, "sym": True, "desc_act": False, "dynamic": dynamic}
    scheme = describe(case, "layers.3.ffn.experts.7.w1", **wrong)
    assert (scheme.group_size, scheme.zero_points, scheme.act_order) == (32, True, True)
    with pytest.raises(QuantizationError, match="8-bit int"):
        describe(case, "layers.3.ffn.experts.7.w2", **wrong)
    with pytest.raises(QuantizationError, match="`dynamic` leaves this module unquantised"):
        describe(case, "layers.3.attn.wkv", **wrong)


def groups(**entries: tuple[list[str], dict[str, Any]]) -> dict[str, Any]:
    return {name: {"targets": targets, "weights": weights} for name, (targets, weights) in entries.items()}


def test_compressed_tensors_takes_the_most_specific_group() -> None:
    case = cases.compressed(group=64)
    config_groups = groups(
        by_class=(["Linear"], weights_args(num_bits=8)),
        by_regex=(["re:.*experts.*"], weights_args(group_size=32)),
        by_name=(["model.layers.3.mlp.experts.7.gate_proj", "lm_head"], weights_args(group_size=64)),
    )
    assert describe(case, "layers.3.ffn.experts.7.w1", config_groups=config_groups).group_size == 64
    assert describe(case, "head", config_groups=config_groups).group_size == 64
    with pytest.raises(QuantizationError, match="group_size 32"):
        describe(case, "layers.3.ffn.experts.8.w1", config_groups=config_groups)
    with pytest.raises(QuantizationError, match="8-bit int"):
        describe(case, "layers.3.attn.wkv", config_groups=config_groups)


def test_class_targets() -> None:
    case = cases.compressed(group=64)
    assert describe(case, "embed", config_groups=groups(g=(["Embedding"], weights_args()))).kind == "int4"
    for module, target in (("embed", "Linear"), ("layers.0.attn.wo_a", "Embedding")):
        with pytest.raises(QuantizationError, match="no entry of `config_groups`"):
            describe(case, module, config_groups=groups(g=([target], weights_args())))


@pytest.mark.parametrize("fp8_first", [False, True])
def test_fp8_attention_with_int4_experts(fp8_first: bool) -> None:
    """Two groups that both say Linear are told apart by what the tensors are."""
    int4, fp8 = cases.compressed(group=64), cases.fp8("weight_scale", torch.bfloat16)
    entries = [("int4", (["Linear"], weights_args())), ("fp8", (["Linear"], FP8_GROUP))]
    config_groups = groups(**dict(reversed(entries) if fp8_first else entries))
    assert describe(int4, "layers.3.ffn.experts.7.w1", config_groups=config_groups).kind == "int4"
    fp8 = replace(fp8, config=int4.config)
    assert describe(fp8, "layers.3.attn.wq_b", config_groups=config_groups).kind == "fp8"


@pytest.mark.parametrize("name", CASES)
def test_plain_modules_need_no_entry(name: str) -> None:
    """Whatever the config targets, a module that holds one float `weight` is plain; so is the router with its bias."""
    make = CASES[name].get("plain", next(iter(CASES[name].values())))
    case = make()
    case = replace(case, leaves={**case.leaves, "bias": torch.zeros(4), "tid2eid": torch.zeros(9, 2).long()})
    assert describe(case, "layers.0.ffn.gate").kind == "plain"
