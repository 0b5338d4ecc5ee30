"""What stays vLLM's: other architectures, the vision wrapper's text model, other models in the same process."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from testing.integration import engine_config, run_python, write_config
from vllm_deepseek_v4flash.config import ARCHITECTURE
from vllm_deepseek_v4flash.integration.in_tree import build_in_tree_model

OURS = "vllm_deepseek_v4flash.integration.registered_model"
IN_TREE = "vllm.models.deepseek_v4"
ENGINE_TIMEOUT = 600


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("DeepseekV4ForConditionalGeneration", IN_TREE),
        ("DeepseekV41ForCausalLM", "vllm.models.deepseek_v41"),
        ("DSparkDraftModel", IN_TREE),
        ("DeepSeekV4MTPModel", IN_TREE),
        ("DeepseekV3ForCausalLM", "vllm.model_executor.models.deepseek_v2"),
        ("DeepseekV4ForCausalLM", OURS),
    ],
)
def test_who_serves(architecture, module):
    from vllm.model_executor.models.registry import ModelRegistry

    assert ModelRegistry.models[architecture].module_name == module


@pytest.fixture
def built(monkeypatch):
    """What vLLM was asked to initialize in place of our model."""
    calls = []

    def initialize_model(vllm_config, *, prefix="", model_class=None):
        calls.append((prefix, model_class))
        return "vLLM's own"

    monkeypatch.setattr("vllm.model_executor.model_loader.utils.initialize_model", initialize_model)
    return calls


def fake_config(**hf):
    hf_config = SimpleNamespace(architectures=[ARCHITECTURE], **hf)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=hf_config, model_impl="auto", convert_type="none", runner_type="generate", registry=None
        )
    )


@pytest.mark.usefixtures("registered")
def test_the_vision_wrapper_gets_vllms_text_model(built):
    from vllm_deepseek_v4flash.integration.registered_model import DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM(vllm_config=fake_config(vision_n_layers=2), prefix="language_model")
    assert model == "vLLM's own"
    ((prefix, in_tree),) = built
    assert prefix == "language_model"
    assert (in_tree.__name__, in_tree.__module__.startswith(f"{IN_TREE}.")) == (ARCHITECTURE, True)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("hf", [{}, {"vision_n_layers": 0}])
def test_a_text_checkpoint_gets_ours(built, hf):
    assert build_in_tree_model(fake_config(**hf), "") is None
    assert built == []


@pytest.mark.usefixtures("registered")
def test_the_vision_variant_is_not_refused_by_us(tmp_path):
    """On a CPU vLLM has no vision model and says so itself, in its own words."""
    directory = write_config(tmp_path / "model", vision_n_layers=2)
    with pytest.raises(ValueError, match="does not support `--runner generate`") as refusal:
        engine_config(directory)
    assert "vllm-deepseek-v4flash" not in str(refusal.value)
    assert "vision_n_layers=" not in str(refusal.value)


@pytest.mark.usefixtures("registered")
def test_another_mla_model_keeps_its_attention(tmp_path):
    """Even after ours was configured in the same process."""
    assert engine_config(write_config(tmp_path / "ours")).model_config.use_mla is False
    deepseek_v2 = write_config(
        tmp_path / "v2",
        drop=("compress_ratios", "head_dim", "compress_rope_theta", "index_topk"),
        architectures=["DeepseekV2ForCausalLM"],
        model_type="deepseek_v2",
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        intermediate_size=64,
        topk_method="greedy",
        scoring_func="softmax",
        rope_scaling=None,
    )
    config = engine_config(deepseek_v2)
    assert config.model_config.use_mla is True
    assert config.model_config.model_arch_config.is_deepseek_mla is True


LLAMA = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", skip_tokenizer_init=True, max_model_len=128, max_num_seqs=4,
              kv_cache_memory_bytes=16 << 20, enforce_eager=True, disable_log_stats=True, seed=0)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=3)
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (5, 40, 17)]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    print("RESULT", json.dumps([
        [list(o.token_ids), [{t: p.logprob for t, p in row.items()} for row in o.logprobs]] for o in outputs
    ]), flush=True)
"""


def test_llama_is_the_same_with_and_without_the_plugin(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).float().save_pretrained(tmp_path / "llama")
    script = tmp_path / "llama.py"
    script.write_text(LLAMA)

    results = {}
    for name, plugins in (("without", {"VLLM_PLUGINS": ""}), ("with", {})):
        output = run_python(
            f"import runpy, sys; sys.argv = ['', {str(tmp_path / 'llama')!r}]\n"
            f"runpy.run_path({str(script)!r}, run_name='__main__')",
            timeout=ENGINE_TIMEOUT,
            environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | plugins,
        )
        assert (f"Registered {ARCHITECTURE}" in output) is (name == "with")
        (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
        results[name] = json.loads(line.removeprefix("RESULT "))
    assert results["with"] == results["without"]
    assert len({tuple(tokens) for tokens, _ in results["with"]}) == 3
