"""Options and checkpoints that are refused, with what to do, and their neighbors that are accepted."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import get_args

import pytest
from vllm.config import VllmConfig
from vllm.config.speculative import SpeculativeMethod

from testing.integration import engine_config, write_config
from vllm_deepseek_v4flash.config import MODEL_TYPE
from vllm_deepseek_v4flash.integration.quantization import NAME, DeepseekV4QuantConfig
from vllm_deepseek_v4flash.integration.refusals import HYBRID_CONNECTORS
from vllm_deepseek_v4flash.integration.speculation import DRAFT_FREE, check_speculation
from vllm_deepseek_v4flash.integration.switch import DISABLE_ENV

# What and its value, why, what to do; vLLM puts its own words around what the hook for a model raises.
TEMPLATE = re.compile(r"[-.\w\[\]]+=[^=]+: .+\. [A-Z].+\.")

REFUSED = {
    "mtp": (
        {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
        {},
        ["--speculative-config.method='mtp': with the draft '", "Use 'ngram'", f"{DISABLE_ENV}=1"],
    ),
    "fp8_e5m2": (
        {"kv_cache_dtype": "fp8_e5m2"},
        {},
        ["--kv-cache-dtype=fp8_e5m2: ", "Use one of auto, float16", "start without --kv-cache-dtype"],
    ),
    "dcp": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        {},
        ["--decode-context-parallel-size=2: ", "Use 1"],
    ),
    "index cache": (
        {"additional_config": {"index_cache_dtype": "fp6"}},
        {},
        ["--additional-config.index_cache_dtype=fp6: ", "Use one of auto, fp8, fp4, model."],
    ),
    "additional config": (
        {"additional_config": {"index_cache_type": "fp4"}},
        {},
        [
            "--additional-config={'index_cache_type': 'fp4'}: unknown keys",
            "only 'index_cache_dtype' is supported. Remove",
        ],
    ),
    "prompt embeds": (
        {"enable_prompt_embeds": True},
        {},
        ["--enable-prompt-embeds=True: ", "Start without it", "token ids"],
    ),
    "tp": (
        {"tensor_parallel_size": 2},
        {"moe_intermediate_size": 33},
        ["--tensor-parallel-size=2: does not divide moe_intermediate_size=33. Use a size that"],
    ),
    "tp+ep": (
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        {"n_routed_experts": 7},
        ["--tensor-parallel-size=2: does not divide n_routed_experts=7. Use a size that"],
    ),
    "pcp": ({"prefill_context_parallel_size": 2}, {}, ["--prefill-context-parallel-size=2: ", "Use 1"]),
    "dp+ep": (
        {"data_parallel_size": 2, "enable_expert_parallel": True},
        {},
        ["--data-parallel-size=2: ", "--enable-expert-parallel", "Drop one of the two options"],
    ),
    "attention backend": (
        {"attention_backend": "CPU_ATTN"},
        {},
        ["--attention-backend=CPU_ATTN: has no effect", "Start without it; VLLM_DEEPSEEK_V4FLASH_OPS chooses"],
    ),
    "moe backend": ({"moe_backend": "triton"}, {}, ["--moe-backend=triton: has no effect", "Start without it"]),
    "skip layers": (
        {"kv_cache_dtype_skip_layers": ["0"]},
        {},
        ["--kv-cache-dtype-skip-layers=['0']: has no effect", "Start without it"],
    ),
    "block size": ({"block_size": 16}, {}, ["--block-size=16: ", "take blocks of 256", "Start without --block-size."]),
    "no hybrid manager": (
        {"disable_hybrid_kv_cache_manager": True},
        {},
        ["--disable-hybrid-kv-cache-manager=True: ", "Start without it."],
    ),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        {},
        ["--kv-transfer-config.kv_connector='ExampleConnector': ", "OffloadingConnector", "or start without"],
    ),
    "pooling": ({"runner": "pooling"}, {}, ["--runner=pooling: ", "Start without --runner and --convert."]),
    "other quantization": (
        {"quantization": "fp8"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        ["--quantization=fp8: config.json says quant_method 'gptq'", "Start without --quantization."],
    ),
    "quantization of plain weights": (
        {"quantization": "fp8"},
        {},
        ["--quantization='fp8': vLLM's own classes would read", "Start without --quantization", f"{DISABLE_ENV}=1"],
    ),
    "sharded state": (
        {"load_format": "sharded_state"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        ["--load-format=sharded_state: not supported for packed weights", "Serve the checkpoint itself"],
    ),
    "transformers": (
        {"model_impl": "transformers"},
        {},
        ["--model-impl=transformers: ", "Start without it"],
    ),
    "eos": ({}, {"eos_token_id": 264}, ["eos_token_id=264: must be less than vocab_size=264. Correct it"]),
    "config value": (
        {},
        {"hc_mult": 0},
        ["hc_mult=0: must be an integer >= 1. Correct it in the model's config.json."],
    ),
    "layer schedule": ({}, {"compress_ratios": [0, 8, 4, 128, 4, 0]}, ["compress_ratios[1]=8: ", "4 (CSA)"]),
    "quantization": (
        {},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        ["quantization='bitsandbytes': ", "it supports awq, gptq", f"{DISABLE_ENV}=1"],
    ),
    "--quantization": (
        {"quantization": "bitsandbytes"},
        {},
        ["quantization='bitsandbytes': ", "it supports awq, gptq", f"{DISABLE_ENV}=1"],
    ),
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("arguments", "config", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, arguments, config, words):
    """The option or key, its value, what to do instead; before any engine process starts."""
    with pytest.raises(ValueError, match=r"\S") as refusal:
        engine_config(write_config(tmp_path / "model", **config), **arguments)
    message = str(refusal.value)
    assert [word for word in words if word not in message] == []
    assert TEMPLATE.search(message)


METHODS = get_args(SpeculativeMethod)


@pytest.mark.parametrize("method", METHODS)
def test_every_draft_is_allowed_or_refused_by_name(method):
    config = SimpleNamespace(speculative_config=SimpleNamespace(method=method, model="org/draft"))
    if method in DRAFT_FREE:
        check_speculation(config)
        return
    with pytest.raises(ValueError, match="not supported") as refusal:
        check_speculation(config)
    assert str(refusal.value).startswith(f"--speculative-config.method={method!r}: with the draft 'org/draft' ")
    assert TEMPLATE.search(str(refusal.value))


def test_no_draft_that_is_allowed_has_gone():
    assert set(DRAFT_FREE) <= set(METHODS)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("rows", "model"),
    [("auto", "float32"), ("fp8", "float32"), ("fp8_e4m3", "bfloat16"), ("float16", "float16"),
     ("bfloat16", "bfloat16")],
)  # fmt: skip
def test_row_formats_that_are_supported(tmp_path, rows, model):
    config = engine_config(write_config(tmp_path / "model"), kv_cache_dtype=rows, dtype=model)
    assert config.cache_config.cache_dtype == rows


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("model", ["bfloat16", "float32"])
def test_16_bit_rows_of_another_dtype_than_the_model(tmp_path, model):
    """vLLM 0.33 refuses them for every model; README.md says so."""
    directory = write_config(tmp_path / "model")
    if hasattr(VllmConfig, "_reject_mismatched_float_kv_cache"):
        with pytest.raises(ValueError, match=r"incompatible with dtype=.*Please set `--kv-cache-dtype` to `auto`"):
            engine_config(directory, kv_cache_dtype="float16", dtype=model)
    else:
        config = engine_config(directory, kv_cache_dtype="float16", dtype=model)
        assert config.cache_config.cache_dtype == "float16"


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "arguments",
    [{"tensor_parallel_size": 2, "enable_expert_parallel": True}, {"pipeline_parallel_size": 2}],
    ids=["tp+ep", "pp"],
)
def test_parallelism_that_is_supported(tmp_path, arguments):
    # Each half has a CSA and an HCA layer.
    model = write_config(tmp_path / "model", num_hidden_layers=6, compress_ratios=[4, 128, 0, 0, 128, 4, 0])
    config = engine_config(model, **arguments)
    assert {name: getattr(config.parallel_config, name) for name in arguments} == arguments


@pytest.mark.usefixtures("registered")
def test_a_pipeline_stage_without_a_kind_of_layer_is_refused(tmp_path):
    model = write_config(tmp_path / "model", num_hidden_layers=6, compress_ratios=[0, 4, 128, 4, 4, 4, 0])
    with pytest.raises(ValueError, match=r"stage 1, layers 3 to 5, has no HCA layer.*VLLM_PP_LAYER_PARTITION"):
        engine_config(model, pipeline_parallel_size=2)


@pytest.mark.usefixtures("registered")
def test_connectors_that_are_recommended_support_the_hybrid_manager():
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in HYBRID_CONNECTORS:
        config = KVTransferConfig(kv_connector=name, kv_role="kv_both")
        assert KVConnectorFactory.supports_hma_config(config), name


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("method", ["GPTQ", "gptq"])
def test_the_checkpoints_own_quantization_may_be_asked_for(method):
    hf_config = SimpleNamespace(model_type=MODEL_TYPE, vision_n_layers=0)
    source = {"quant_method": "gptq"}
    assert DeepseekV4QuantConfig.override_quantization_method(source, method, hf_config) == NAME
