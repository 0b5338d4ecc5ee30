"""Every config.json of V4, read by the config class of the installed vLLM: its own in 0.32, later transformers'."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import DeepseekV4Config as TransformersConfig

from testing.integration import vllm_config_class, write_config
from testing.tiny import BASE, CONFIGS, resaved
from vllm_deepseek_v4flash.config import DeepseekV4Config
from vllm_deepseek_v4flash.integration.hf_config import native_keys, reader_for, typed_values

CONFIG_CLASS = vllm_config_class()
ADAPT = typed_values if CONFIG_CLASS is TransformersConfig else native_keys

ALL = pytest.mark.parametrize("spec", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def registered():
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def saved_by_transformers(spec, directory, **extra):
    """The directory of a config.json that `save_pretrained` really wrote."""
    TransformersConfig(**spec.hf_config, **extra).save_pretrained(directory)
    return directory


def test_the_readers_are_still_needed():
    """Once the class reads such a file, `native_keys` and `typed_values` can go."""
    if CONFIG_CLASS is not TransformersConfig:
        with pytest.raises(Exception, match="mlp_layer_types"):
            CONFIG_CLASS.from_dict(resaved(CONFIGS["mixed"].hf_config))
    with pytest.raises(StrictDataclassError, match="expected float, got int"):
        TransformersConfig.from_dict({**BASE, "swiglu_limit": 10})


@ALL
def test_native_keys_stay_as_they_are(spec):
    native = spec.hf_config
    result = native_keys(native)
    assert result == native
    assert result is not native


@ALL
def test_resaved_keys_become_native(spec):
    native = spec.hf_config
    result = native_keys(resaved(native))
    assert not {"layer_types", "mlp_layer_types", "compress_rates", "rope_parameters"} & set(result)
    assert DeepseekV4Config.from_dict(result) == spec.config
    # Backbone layers only: transformers does not write the MTP block's entry.
    assert result["compress_ratios"] == native["compress_ratios"][: native["num_hidden_layers"]]
    assert result["num_hash_layers"] == native["num_hash_layers"]
    assert result["rope_scaling"] == native["rope_scaling"]
    assert (result["rope_theta"], result["compress_rope_theta"], result["qk_rope_head_dim"]) == (
        native["rope_theta"],
        native["compress_rope_theta"],
        native["qk_rope_head_dim"],
    )


def test_other_keys_are_kept():
    quantization = {"quant_method": "awq", "bits": 4}
    result = native_keys(resaved(CONFIGS["mixed"].hf_config) | {"quantization_config": quantization, "mine": 3})
    assert (result["quantization_config"], result["mine"]) == (quantization, 3)


def test_the_argument_is_not_changed():
    values = resaved(CONFIGS["yarn"].hf_config)
    before = copy.deepcopy(values)
    native_keys(values)
    assert values == before


def test_an_impossible_value_is_named():
    values = resaved(CONFIGS["mixed"].hf_config)
    values["layer_types"][1] = "full_attention"
    with pytest.raises(ValueError, match=r"layer_types\[1\]='full_attention': must be one of sliding_attention"):
        native_keys(values)


@ALL
def test_the_reader_makes_vllms_own_objects(spec):
    reader = reader_for(CONFIG_CLASS, ADAPT)
    assert reader_for(CONFIG_CLASS, ADAPT) is reader
    assert reader.reads_any_v4_config
    assert not hasattr(CONFIG_CLASS, "reads_any_v4_config")
    config = reader.from_dict(resaved(spec.hf_config))
    assert type(config) is CONFIG_CLASS
    assert DeepseekV4Config.from_hf(config) == spec.config
    assert DeepseekV4Config.from_hf(pickle.loads(pickle.dumps(config))) == spec.config


@pytest.mark.usefixtures("registered")
@ALL
def test_vllm_reads_what_transformers_saved(spec, tmp_path):
    """Through vLLM's own `get_config`, and the same as from DeepSeek's file."""
    from vllm.transformers_utils.config import get_config

    saved = saved_by_transformers(spec, tmp_path / "saved")
    assert "compress_ratios" not in json.loads((saved / "config.json").read_text())
    config = get_config(saved, trust_remote_code=False)
    assert type(config) is CONFIG_CLASS
    assert DeepseekV4Config.from_hf(config) == spec.config

    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "config.json").write_text(json.dumps(spec.hf_config))
    native = get_config(tmp_path / "native", trust_remote_code=False)
    assert type(native) is CONFIG_CLASS
    assert DeepseekV4Config.from_hf(native) == spec.config


# Values in another type than transformers' class declares, or spelled as it does not know.
READABLE = {
    "whole numbers": {"swiglu_limit": 10, "routed_scaling_factor": 2, "rope_theta": 10000, "hc_eps": 1},
    "whole numbers that only transformers reads": {"attention_dropout": 0, "router_jitter_noise": 0},
    "floats": {"hidden_size": 128.0, "num_hidden_layers": 4.0, "n_routed_experts": 8.0, "bos_token_id": 0.0},
    "nulls": {
        "swiglu_limit": None, "routed_scaling_factor": None, "rope_scaling": None, "tie_word_embeddings": None,
        "num_nextn_predict_layers": None, "architectures": None, "initializer_range": None,
    },
    "ratio 1": {"compress_ratios": [1, 4, 128, 4, 1]},
    "lists of tokens": {"eos_token_id": [1, 2.0]},
}  # fmt: skip


@pytest.mark.parametrize("changes", READABLE.values(), ids=READABLE)
def test_transformers_class_reads_any_spelling(changes):
    config = reader_for(TransformersConfig, typed_values).from_dict({**BASE, **changes})
    assert type(config) is TransformersConfig
    assert DeepseekV4Config.from_hf(config) == DeepseekV4Config.from_dict({**BASE, **changes})


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("changes", READABLE.values(), ids=READABLE)
def test_vllm_reads_any_spelling(changes, tmp_path):
    from vllm.transformers_utils.config import get_config

    config = get_config(write_config(tmp_path / "model", **changes), trust_remote_code=False)
    assert type(config) is CONFIG_CLASS
    assert DeepseekV4Config.from_hf(config) == DeepseekV4Config.from_json_file(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [0, 4, 8, 4, 0]}, r"compress_ratios\[2\]=8: must be 0 or 1 .*Correct it in the model's"),
        ({"swiglu_limit": "10"}, r"swiglu_limit='10': must be a finite number > 0\. Correct it in the model's"),
        ({"hidden_size": None}, r"hidden_size=None: must be an integer >= 1, and the key is missing\."),
        ({"use_cache": "yes"}, r"use_cache='yes': refused by transformers \(.*expected bool, got str.*\)\. Correct it"),
        ({"initializer_range": [1]}, r"initializer_range=\[1\]: refused by transformers \(.*\)\. Correct it"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(changes, message):
    with pytest.raises(ValueError, match=re.compile(f"^{message}")) as refusal:
        reader_for(TransformersConfig, typed_values).from_dict({**BASE, **changes})
    assert "\n" not in str(refusal.value)


def test_the_vision_variant_is_read_by_transformers_alone():
    values = {**BASE, "vision_n_layers": 2, "swiglu_limit": None}
    assert typed_values(values, TransformersConfig) == values


@pytest.mark.usefixtures("registered")
def test_an_engine_is_configured_alike(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    spec = CONFIGS["mixed"]
    saved = saved_by_transformers(spec, tmp_path / "saved", dtype="float32")
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "config.json").write_text(json.dumps({**spec.hf_config, "torch_dtype": "float32"}))
    seen = [
        (
            config.architectures, str(config.dtype), config.max_model_len, config.get_head_size(), config.use_mla,
            config.get_vocab_size(), config.get_sliding_window(), config.tokenizer_mode,
        )
        for config in (
            EngineArgs(model=str(directory), skip_tokenizer_init=True).create_model_config()
            for directory in (saved, tmp_path / "native")
        )
    ]  # fmt: skip
    assert seen[0] == seen[1]
    assert seen[0][0] == ["DeepseekV4ForCausalLM"]
