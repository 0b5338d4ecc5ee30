"""A config.json that transformers saved again, read by vLLM 0.32, whose class knows DeepSeek's own keys only."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from transformers import DeepseekV4Config as TransformersConfig

from testing.tiny import CONFIGS, resaved
from vllm_deepseek_v4flash.config import DeepseekV4Config
from vllm_deepseek_v4flash.integration.hf_config import native_keys, reader_for

configs = pytest.importorskip("vllm.transformers_utils.configs.deepseek_v4", reason="vLLM 0.33 has no class of its own")
VllmConfigClass = configs.DeepseekV4Config

ALL = pytest.mark.parametrize("spec", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def registered():
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def saved_by_transformers(spec, directory, **extra):
    """The directory of a config.json that `save_pretrained` really wrote."""
    TransformersConfig(**spec.hf_config, **extra).save_pretrained(directory)
    return directory


def test_the_reader_is_still_needed():
    """Once vLLM's class reads such a file, integration/hf_config.py can go."""
    with pytest.raises(Exception, match="mlp_layer_types"):
        VllmConfigClass.from_dict(resaved(CONFIGS["mixed"].hf_config))


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
    reader = reader_for(VllmConfigClass)
    assert reader_for(VllmConfigClass) is reader
    assert reader.reads_resaved_configs
    assert not hasattr(VllmConfigClass, "reads_resaved_configs")
    config = reader.from_dict(resaved(spec.hf_config))
    assert type(config) is VllmConfigClass
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
    assert type(config) is VllmConfigClass
    assert DeepseekV4Config.from_hf(config) == spec.config

    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "config.json").write_text(json.dumps(spec.hf_config))
    native = get_config(tmp_path / "native", trust_remote_code=False)
    assert type(native) is VllmConfigClass
    assert DeepseekV4Config.from_hf(native) == spec.config


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
