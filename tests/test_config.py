"""One dataclass from any config.json, and an error for anything impossible."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from typing import Any

import pytest

from testing.integration import vllm_config_class
from testing.tiny import BASE, CONFIGS, resaved
from vllm_deepseek_v4flash.config import DeepseekV4Config, LayerKind, RopeScaling

YARN = {
    "type": "yarn",
    "factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 65536,
}

FLASH = {
    **BASE,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
    "rope_scaling": YARN,
    "qk_rope_head_dim": 64,
    "head_dim": 512,
    "vocab_size": 129280,
    "max_position_embeddings": 1048576,
}


def test_flash() -> None:
    config = DeepseekV4Config.from_dict(FLASH)
    assert len(config.layer_kinds) == len(config.compress_ratios) == 43
    assert config.layer_kinds[:4] == (LayerKind.WINDOW, LayerKind.WINDOW, LayerKind.CSA, LayerKind.HCA)
    # Entry 43 is the MTP block's; layer 42 compresses by 4.
    assert config.compress_ratios[42] == 4
    assert config.compress_ratios.count(4) == 21
    assert config.compress_ratios.count(128) == 20
    assert config.rope_scaling == RopeScaling(16.0, 65536, 32.0, 1.0)
    assert (config.rope_theta, config.compress_rope_theta) == (10000.0, 160000.0)


def test_dspark_appends_three_entries() -> None:
    dspark = {**FLASH, "compress_ratios": FLASH["compress_ratios"] + [0, 0]}
    assert DeepseekV4Config.from_dict(dspark) == DeepseekV4Config.from_dict(FLASH)


def test_ratio_one_is_a_window() -> None:
    ones = {**BASE, "compress_ratios": [1, 4, 128, 4, 1]}
    assert DeepseekV4Config.from_dict(ones) == DeepseekV4Config.from_dict(BASE)


@pytest.mark.parametrize("hf_config", [FLASH, *(spec.hf_config for spec in CONFIGS.values())])
def test_all_sources_agree(hf_config: dict[str, Any]) -> None:
    from transformers import DeepseekV4Config as TransformersConfig

    native = DeepseekV4Config.from_dict(hf_config)
    saved_again = resaved(hf_config)
    # Its class writes into the rope_scaling that it is given.
    transformers = TransformersConfig(**copy.deepcopy(hf_config))
    assert DeepseekV4Config.from_hf(transformers) == native
    assert DeepseekV4Config.from_dict(json.loads(transformers.to_json_string())) == native
    assert DeepseekV4Config.from_dict(saved_again) == native
    assert DeepseekV4Config.from_hf(TransformersConfig(**saved_again)) == native


@pytest.mark.parametrize("hf_config", [FLASH, *(spec.hf_config for spec in CONFIGS.values())])
def test_vllm_object_agrees(hf_config: dict[str, Any]) -> None:
    config = vllm_config_class()(**copy.deepcopy(hf_config))
    assert DeepseekV4Config.from_hf(config) == DeepseekV4Config.from_dict(hf_config)


def test_defaults_of_absent_keys_are_those_of_transformers() -> None:
    from transformers import DeepseekV4Config as TransformersConfig

    sparse = {
        "model_type": "deepseek_v4",
        "vocab_size": 100,
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "compress_ratios": [0, 0, 4, 128, 4],
    }
    config = DeepseekV4Config.from_dict(sparse)
    assert config == DeepseekV4Config.from_hf(TransformersConfig(**sparse))
    assert config.num_hash_layers == 3
    assert config.qk_rope_head_dim == 64


def test_rates_of_a_resaved_config() -> None:
    config = resaved(BASE)
    config["compress_rates"] = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 64}
    assert DeepseekV4Config.from_dict(config).compress_ratios == (0, 8, 64, 8)


def test_flat_keys_that_a_tool_leaves_next_to_the_nested_ones() -> None:
    config = resaved({**BASE, "rope_scaling": YARN})
    config["rope_parameters"] |= {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}
    assert DeepseekV4Config.from_dict(config) == DeepseekV4Config.from_dict({**BASE, "rope_scaling": YARN})


# What and its value, why, what to do.
TEMPLATE = re.compile(r"[^=]+=.+: .+\. [A-Z].+\.")

IMPOSSIBLE: list[tuple[str, Any, str]] = [
    ("model_type", "llama", r"^model_type='llama': must be 'deepseek_v4'. Correct it in the model's config.json.$"),
    ("model_type", "deepseek_v41", r"^model_type='deepseek_v41': must .*another architecture. Use vLLM's own class"),
    ("model_type", None, r"model_type=None: must"),
    ("vision_n_layers", 24, r"vision_n_layers=24: must be 0; the vision variant is .*Use vLLM's own class"),
    ("compress_ratios", [0, 4, 5, 4], r"compress_ratios\[2\]=5: must be 0 or 1 \(window\), 4"),
    ("compress_ratios", [0, 4, 128], r"compress_ratios=\[0, 4, 128\]: must have at least num_hidden_layers=4"),
    ("compress_ratios", [0, 4, True, 4], r"compress_ratios\[2\]=True: must"),
    ("compress_ratios", 4, r"compress_ratios=4: must be a list"),
    ("compress_ratios", None, r"compress_ratios=None: must .*layer_types"),
    ("num_hidden_layers", None, r"num_hidden_layers=None: must .*missing"),
    ("num_hidden_layers", 0, r"num_hidden_layers=0: must be an integer >= 1"),
    ("hidden_size", "128", r"hidden_size='128': must"),
    ("vocab_size", 1.5, r"vocab_size=1.5: must"),
    ("qk_rope_head_dim", 64, r"qk_rope_head_dim=64: must be less than head_dim=64"),
    ("qk_rope_head_dim", 31, r"qk_rope_head_dim=31: must be even"),
    ("index_head_dim", 16, r"index_head_dim=16: must be at least qk_rope_head_dim=32"),
    ("partial_rotary_factor", 0.25, r"partial_rotary_factor=0.25: must be .* 32 / 64"),
    ("partial_rotary_factor", 1e308, r"partial_rotary_factor=1e\+308: must be at most 1"),
    ("o_groups", 3, r"o_groups=3: must divide num_attention_heads=4"),
    ("num_experts_per_tok", 9, r"num_experts_per_tok=9: must be at most n_routed_experts=8"),
    ("num_hash_layers", 5, r"num_hash_layers=5: must be at most num_hidden_layers=4"),
    ("num_hash_layers", -1, r"num_hash_layers=-1: must"),
    ("n_shared_experts", 2, r"n_shared_experts=2: must be 1"),
    ("num_key_value_heads", 2, r"num_key_value_heads=2: must be 1"),
    ("scoring_func", "sigmoid", r"scoring_func='sigmoid': must be 'sqrtsoftplus'"),
    ("topk_method", "greedy", r"topk_method='greedy': must be 'noaux_tc'"),
    ("hidden_act", "gelu", r"hidden_act='gelu': must be 'silu'"),
    ("norm_topk_prob", False, r"norm_topk_prob=False: must be True"),
    ("tie_word_embeddings", True, r"tie_word_embeddings=True: must be False"),
    ("attention_bias", True, r"attention_bias=True: must be False"),
    ("mlp_bias", True, r"mlp_bias=True: must be False"),
    ("swiglu_limit", 0, r"swiglu_limit=0: must be a finite number > 0"),
    ("rms_norm_eps", float("nan"), r"rms_norm_eps=nan: must"),
    ("rope_theta", -1, r"rope_theta=-1: must"),
    ("index_topk", 0, r"index_topk=0: must"),
    ("expert_dtype", 4, r"expert_dtype=4: must be a string or null"),
    ("eos_token_id", [1, -2], r"eos_token_id=-2: must"),
    ("rope_scaling", {**YARN, "type": "linear"}, r"rope_scaling.type='linear': must be 'yarn'"),
    ("rope_scaling", {"factor": 16}, r"rope_scaling.type=None: must be 'yarn'"),
    ("rope_scaling", {**YARN, "factor": None}, r"rope_scaling.factor=None: must"),
    ("rope_scaling", {**YARN, "factor": 0.5}, r"rope_scaling.factor=0.5: must"),
    ("rope_scaling", {**YARN, "attention_factor": 1.277}, r"attention_factor=1.277: must be 1.0; .*no YaRN mscale"),
    ("rope_scaling", {**YARN, "truncate": False}, r"truncate=False: must"),
    ("rope_scaling", {**YARN, "beta_fast": 1}, r"beta_fast=1.0: must be more than beta_slow=1.0"),
    (
        "rope_scaling",
        {**YARN, "original_max_position_embeddings": None},
        r"rope_scaling.original_max_position_embeddings=None: must",
    ),
    ("rope_scaling", "yarn", r"rope_parameters='yarn': must be a mapping or null"),
    ("layer_types", ["sliding_attention"] * 4, r"layer_types=.*: must be the same schedule as compress_ratios"),
]


@pytest.mark.parametrize(("field", "value", "message"), IMPOSSIBLE)
def test_impossible_native_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        DeepseekV4Config.from_dict({**BASE, field: value})
    assert TEMPLATE.fullmatch(str(refusal.value))


IMPOSSIBLE_RESAVED: list[tuple[str, Any, str]] = [
    ("layer_types", ["full_attention"] * 4, r"layer_types\[0\]='full_attention': must .*sliding_attention"),
    ("layer_types", ["sliding_attention"], r"layer_types=.*: must have exactly num_hidden_layers=4"),
    (
        "compress_rates",
        {"compressed_sparse_attention": 6},
        r"layer 1 \(csa\)=6: must be above 1 and divide 256",
    ),
    ("compress_rates", {"heavily_compressed_attention": 1}, r"heavily_compressed_attention'\]=1: must"),
    ("compress_rates", 4, r"compress_rates=4: must be a mapping"),
    ("mlp_layer_types", ["moe", "hash_moe", "moe", "moe"], r"mlp_layer_types=.*: must be 'hash_moe' for the first"),
    ("mlp_layer_types", ["moe"], r"mlp_layer_types=.*: must have exactly num_hidden_layers=4"),
    ("num_hash_layers", 2, r"num_hash_layers=2: must be 1, .*mlp_layer_types"),
    ("rope_parameters", {"main": {}}, r"rope_parameters=.*: must have both 'main' and 'compress'"),
    ("rope_parameters", {"main": YARN, "compress": {}}, r"'main'\].rope_type='yarn': must be 'default'"),
    ("rope_parameters", {"main": {}, "compress": {"type": "llama3"}}, r"'compress'\].type='llama3': must"),
]


@pytest.mark.parametrize(("field", "value", "message"), IMPOSSIBLE_RESAVED)
def test_impossible_resaved_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        DeepseekV4Config.from_dict({**resaved(BASE), field: value})
    assert TEMPLATE.fullmatch(str(refusal.value))


def test_json_file_or_directory(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    expected = DeepseekV4Config.from_dict(BASE)
    assert DeepseekV4Config.from_json_file(tmp_path) == expected
    assert DeepseekV4Config.from_json_file(tmp_path / "config.json") == expected
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object, found list"):
        DeepseekV4Config.from_json_file(tmp_path)


def test_replace_checks_again() -> None:
    config = DeepseekV4Config.from_dict(BASE)
    assert config.replace(sliding_window=7).sliding_window == 7
    with pytest.raises(ValueError, match="o_groups=3: must"):
        config.replace(o_groups=3)


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, vllm_deepseek_v4flash.config, vllm_deepseek_v4flash.checkpoint.names\n"
        "heavy = {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
