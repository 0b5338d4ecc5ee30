"""The plugin inside vLLM: what it takes over, what it leaves alone, what it refuses, and how it fails."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import vllm_deepseek_v4flash
from testing.tiny import CONFIGS
from vllm_deepseek_v4flash import DISABLE_ENV
from vllm_deepseek_v4flash.integration import install as plugin
from vllm_deepseek_v4flash.log import info_at_startup

OURS = "vllm_deepseek_v4flash.model"
IN_TREE = "vllm.models.deepseek_v4"
# Importing vLLM takes 15 s on an idle core, and this machine may run several things at once.
IMPORT_TIMEOUT = 300
ENGINE_TIMEOUT = 600


def write_config(directory, drop=(), **overrides):
    """A checkpoint directory with nothing but a config.json: enough for everything before the weights."""
    directory.mkdir(exist_ok=True)
    config = {**CONFIGS["mixed"].hf_config, "torch_dtype": "float32", **overrides}
    config = {key: value for key, value in config.items() if key not in drop}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def engine_config(directory, **arguments):
    """What `vllm serve directory --arguments` would run with."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"max_model_len": 1024, "skip_tokenizer_init": True, **arguments}
    return EngineArgs(model=str(directory), **arguments).create_engine_config()


def run_python(code, timeout=IMPORT_TIMEOUT, **environment):
    """Run `code` in a new interpreter at log level INFO; its output as text, stderr included."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture
def log():
    """Messages of our loggers, which reach no root handler once vLLM has configured its logging."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(handler.format(record))
    logger = logging.getLogger("vllm.deepseek_v4flash")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def vllm_state(monkeypatch):
    """vLLM as it is before any plugin: registrations of the test are undone after it."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for registry in (MODELS_CONFIG_MAP, ModelRegistry.models, _CONFIG_REGISTRY):
        for key, value in list(registry.items()):
            monkeypatch.setitem(registry, key, value)
    monkeypatch.setitem(ModelRegistry.models, plugin.ARCHITECTURE, _LazyRegisteredModel(IN_TREE, plugin.ARCHITECTURE))
    monkeypatch.delitem(ModelRegistry.models, plugin.IN_TREE_ARCHITECTURE, raising=False)
    hook = MODELS_CONFIG_MAP[plugin.ARCHITECTURE]
    if getattr(hook, plugin._HOOK_MARK, False):
        monkeypatch.setitem(MODELS_CONFIG_MAP, plugin.ARCHITECTURE, hook.__mro__[1])
    monkeypatch.setattr(vllm_deepseek_v4flash, "_registered", False)
    monkeypatch.delenv(DISABLE_ENV, raising=False)
    # Recorded by setenv first, so that what the plugin may put there is taken away again.
    monkeypatch.setenv(plugin._MLA_DISABLE_ENV, "")
    monkeypatch.delenv(plugin._MLA_DISABLE_ENV)
    return SimpleNamespace(models=ModelRegistry.models, hooks=MODELS_CONFIG_MAP, readers=_CONFIG_REGISTRY)


@pytest.fixture
def registered():
    """vLLM with its general plugins loaded, as in every process that it starts."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


# ---- registration


def test_register_takes_over_the_text_model_only(vllm_state, log):
    before = dict(vllm_state.models)
    vllm_deepseek_v4flash.register()
    after = dict(vllm_state.models)
    assert after.pop(plugin.ARCHITECTURE).module_name == OURS
    assert after.pop(plugin.IN_TREE_ARCHITECTURE) is before.pop(plugin.ARCHITECTURE)
    assert after == before
    assert len(log) == 1
    assert f"{plugin.ARCHITECTURE} is served by {plugin.MODEL_PATH} instead of vLLM's in-tree class" in log[0]
    assert plugin.BACKEND_NAME in log[0]
    assert f"{DISABLE_ENV}=1 leaves vLLM's in place" in log[0]


def test_register_twice(vllm_state, log):
    vllm_deepseek_v4flash.register()
    once = dict(vllm_state.models), dict(vllm_state.hooks), dict(vllm_state.readers)
    vllm_deepseek_v4flash.register()
    assert len(log) == 1
    plugin.install()  # what a second import of the package would do
    assert (dict(vllm_state.models), dict(vllm_state.hooks), dict(vllm_state.readers)) == (
        {**once[0], plugin.ARCHITECTURE: vllm_state.models[plugin.ARCHITECTURE]},
        *once[1:],
    )
    assert vllm_state.models[plugin.ARCHITECTURE].module_name == OURS
    assert vllm_state.models[plugin.IN_TREE_ARCHITECTURE].module_name == IN_TREE
    assert len(log) == 1


def test_a_fresh_process_says_it_once():
    output = run_python(
        "from vllm.plugins import load_general_plugins\n"
        "import vllm_deepseek_v4flash, vllm.plugins, torch\n"
        "load_general_plugins()\n"
        "vllm.plugins.plugins_loaded = False\n"
        "load_general_plugins()\n"
        "vllm_deepseek_v4flash.register()\n"
        "from vllm.model_executor.models.registry import ModelRegistry\n"
        "print('MODEL', ModelRegistry.models['DeepseekV4ForCausalLM'].module_name)\n"
        "print('CUDA', torch.cuda.is_initialized())\n"
    )
    lines = [line for line in output.splitlines() if "vllm-deepseek-v4flash" in line]
    assert len(lines) == 1, output
    assert "INFO" in lines[0]
    assert f"MODEL {OURS}" in output
    assert "CUDA False" in output


def test_the_switch_leaves_vllms_model(tmp_path):
    """Down to the class that an engine would construct, and without our refusals."""
    write_config(tmp_path / "model")
    output = run_python(
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"config = EngineArgs(model={str(tmp_path / 'model')!r}, skip_tokenizer_init=True, max_model_len=1024)"
        ".create_model_config()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        "cls, _ = config.registry.resolve_model_cls(config.architectures, config)\n"
        "print('CLASS', cls.__module__)\n"
        "print('MLA', config.use_mla)\n"
        "print('BACKEND', 'DEEPSEEK_V4FLASH' in AttentionBackendEnum.__members__)\n",
        **{DISABLE_ENV: "1"},
    )
    assert f"CLASS {IN_TREE}." in output
    assert "MLA True" in output
    assert "BACKEND False" in output
    assert f"{DISABLE_ENV} is set: DeepSeek-V4 stays with vLLM's in-tree model." in output


@pytest.mark.parametrize(
    ("value", "disabled", "warned"),
    [("1", True, False), (" True ", True, False), ("on", True, False), ("0", False, False), ("", False, False),
     ("no", False, False), ("maybe", True, True)],
)  # fmt: skip
def test_values_of_the_switch(vllm_state, log, monkeypatch, value, disabled, warned):
    monkeypatch.setenv(DISABLE_ENV, value)
    vllm_deepseek_v4flash.register()
    assert vllm_state.models[plugin.ARCHITECTURE].module_name == (IN_TREE if disabled else OURS)
    assert (plugin.IN_TREE_ARCHITECTURE in vllm_state.models) is not disabled
    assert any("is neither 0 nor 1" in message for message in log) is warned


def test_the_line_is_silent_where_vllm_is(monkeypatch, capfd):
    """Before vLLM configures its logging we print with a handler of our own, and not against the user's wish."""
    silent = logging.getLogger("vllm_deepseek_v4flash_test")
    silent.propagate = False
    for level, configure, expected in (("INFO", "1", True), ("WARNING", "1", False), ("INFO", "0", False)):
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
        monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", configure)
        info_at_startup(silent, "a line")
        assert ("a line" in capfd.readouterr().err) is expected, (level, configure)
    assert silent.handlers == []


# ---- a vLLM that has changed


def remove(monkeypatch, path):
    module, _, name = path.rpartition(".")
    monkeypatch.delattr(sys.modules[module], name)


def test_a_model_registry_that_is_gone_is_logged_with_the_mend(vllm_state, log, monkeypatch):
    models = dict(vllm_state.models)
    remove(monkeypatch, "vllm.model_executor.models.registry.ModelRegistry")
    vllm_deepseek_v4flash.register()
    (message,) = log
    assert "cannot import name 'ModelRegistry'" in message
    assert "did not register" in message
    assert "pip uninstall vllm-deepseek-v4flash" in message
    assert f"{DISABLE_ENV}=1" in message
    assert "DeepSeek-V4 falls back to vLLM's own implementation" in message
    assert dict(vllm_state.models) == models


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        (
            "vllm.model_executor.layers.quantization.register_quantization_config",
            "quantisation registry has changed",
        ),
        ("vllm.v1.attention.backends.registry.register_backend", "attention-backend registry has changed"),
        ("vllm.renderers.registry.RENDERER_REGISTRY", "tokenizer, renderer or parser registry has changed"),
        ("vllm.transformers_utils.config._CONFIG_REGISTRY", "config registry has changed"),
        ("vllm.model_executor.models.config.MODELS_CONFIG_MAP", "per-model config hook has moved"),
    ],
)
def test_conveniences_are_only_missed(vllm_state, log, monkeypatch, symbol, message):
    remove(monkeypatch, symbol)
    vllm_deepseek_v4flash.register()
    assert vllm_state.models[plugin.ARCHITECTURE].module_name == OURS
    assert [line for line in log if message in line and symbol.rpartition(".")[2] in line]
    assert "is served by" in log[-1]


def test_without_the_hook_the_cpu_still_caches(vllm_state, log, monkeypatch):
    remove(monkeypatch, "vllm.model_executor.models.config.MODELS_CONFIG_MAP")
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: True)
    vllm_deepseek_v4flash.register()
    assert os.environ[plugin._MLA_DISABLE_ENV] == "1"
    assert [line for line in log if "chunked prefill and prefix caching stay on" in line]


def test_a_hook_without_its_methods_is_not_replaced(vllm_state, log):
    vllm_state.hooks[plugin.ARCHITECTURE] = moved = type("Moved", (), {})
    vllm_deepseek_v4flash.register()
    assert vllm_state.hooks[plugin.ARCHITECTURE] is moved
    assert [line for line in log if "Moved.verify_and_update_model_config is missing" in line]


# ---- other models


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
    """What vLLM was asked to initialise in place of our model."""
    calls = []

    def initialize_model(vllm_config, *, prefix="", model_class=None):
        calls.append((prefix, model_class))
        return "vLLM's own"

    monkeypatch.setattr("vllm.model_executor.model_loader.utils.initialize_model", initialize_model)
    return calls


def fake_config(**hf):
    hf_config = SimpleNamespace(architectures=[plugin.ARCHITECTURE], **hf)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=hf_config, model_impl="auto", convert_type="none", runner_type="generate", registry=None
        )
    )


@pytest.mark.usefixtures("registered")
def test_the_vision_wrapper_gets_vllms_text_model(built):
    from vllm_deepseek_v4flash.model import DeepseekV4ForCausalLM

    model = DeepseekV4ForCausalLM(vllm_config=fake_config(vision_n_layers=2), prefix="language_model")
    assert model == "vLLM's own"
    ((prefix, in_tree),) = built
    assert prefix == "language_model"
    assert (in_tree.__name__, in_tree.__module__.startswith(f"{IN_TREE}.")) == (plugin.ARCHITECTURE, True)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("hf", [{}, {"vision_n_layers": 0}])
def test_a_text_checkpoint_gets_ours(built, hf):
    assert plugin.build_in_tree_model(fake_config(**hf), "") is None
    assert built == []


@pytest.mark.usefixtures("registered")
def test_the_vision_variant_is_not_refused_by_us(tmp_path):
    """On a CPU vLLM has no vision model and says so itself; none of our words, and its own class."""
    directory = write_config(tmp_path / "model", vision_n_layers=2)
    with pytest.raises(ValueError, match="does not support `--runner generate`") as refusal:
        engine_config(directory)
    assert "vllm-deepseek-v4flash" not in str(refusal.value)
    assert "vision_n_layers is" not in str(refusal.value)


@pytest.mark.usefixtures("registered")
def test_another_mla_model_keeps_its_attention(tmp_path):
    """Also after ours was configured in the same process."""
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
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            **plugins,
        )
        assert ("is served by vllm_deepseek_v4flash" in output) is (name == "with")
        (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
        results[name] = json.loads(line.removeprefix("RESULT "))
    assert results["with"] == results["without"]
    assert len({tuple(tokens) for tokens, _ in results["with"]}) == 3


# ---- our model's configuration


@pytest.mark.usefixtures("registered")
def test_the_cpu_keeps_chunked_prefill_and_prefix_caching(tmp_path, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setenv(plugin._MLA_DISABLE_ENV, "")
    monkeypatch.delenv(plugin._MLA_DISABLE_ENV)
    assert current_platform.is_cpu(), "this test is about vLLM's CPU build"
    config = engine_config(write_config(tmp_path / "model"), max_num_batched_tokens=256)
    assert config.scheduler_config.enable_chunked_prefill is True
    assert config.scheduler_config.max_num_batched_tokens == 256
    assert config.cache_config.enable_prefix_caching is True
    assert plugin._MLA_DISABLE_ENV not in os.environ
    cls, name = config.model_config.registry.resolve_model_cls(config.model_config.architectures, config.model_config)
    assert (cls.__module__, name) == (OURS, plugin.ARCHITECTURE)


@pytest.mark.usefixtures("registered")
def test_a_use_mla_that_no_longer_follows_falls_back(log, monkeypatch):
    monkeypatch.setenv(plugin._MLA_DISABLE_ENV, "")
    monkeypatch.delenv(plugin._MLA_DISABLE_ENV)
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: True)
    plugin._use_paged_cache_on_cpu(SimpleNamespace(use_mla=True))
    assert os.environ[plugin._MLA_DISABLE_ENV] == "1"
    assert [line for line in log if "no longer follows" in line]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("cpu", "asked", "eager", "says"),
    [
        (True, None, False, []),
        (False, None, True, ["CUDA graphs are off (as with --enforce-eager)"]),
        (False, "NONE", False, []),
        (False, "FULL_AND_PIECEWISE", False, ["CUDA graphs (FULL_AND_PIECEWISE) are on as asked"]),
    ],
)
def test_a_gpu_runs_eagerly_unless_graphs_are_asked_for(log, monkeypatch, cpu, asked, eager, says):
    from vllm.config import CUDAGraphMode

    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        compilation_config=SimpleNamespace(cudagraph_mode=asked and CUDAGraphMode[asked]),
    )
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: cpu)
    plugin._leave_cuda_graphs_to_who_asks(config)
    assert config.model_config.enforce_eager is eager
    assert [line[: len(said)] for line, said in zip(log, says, strict=True)] == says
    config.model_config.enforce_eager = True
    plugin._leave_cuda_graphs_to_who_asks(config)
    assert len(log) == len(says)


@pytest.mark.usefixtures("registered")
def test_vllm_has_not_filled_in_its_graph_mode_when_the_hook_asks(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        plugin, "_leave_cuda_graphs_to_who_asks", lambda config: seen.append(config.compilation_config.cudagraph_mode)
    )
    model = write_config(tmp_path / "model")
    engine_config(model)
    engine_config(model, compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE"})
    assert [mode and mode.name for mode in seen] == [None, "FULL_AND_PIECEWISE"]


@pytest.mark.usefixtures("registered")
def test_the_backend_has_a_name_of_its_own():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_deepseek_v4flash.kv_cache import backend

    plugin._register_attention_backend()  # once more
    member = AttentionBackendEnum[plugin.BACKEND_NAME]
    assert member.get_class() is backend.DeepseekV4Backend
    assert backend.DeepseekV4Backend.get_name() == plugin.BACKEND_NAME
    assert [name for name in AttentionBackendEnum.__members__ if "V4FLASH" in name] == [plugin.BACKEND_NAME]


@pytest.mark.usefixtures("registered")
def test_the_quantisation_config_has_a_name_of_its_own():
    from vllm.model_executor.layers.quantization import get_quantization_config

    from vllm_deepseek_v4flash.integration.quantization import NAME, DeepseekV4QuantConfig

    plugin._register_quantization()  # once more
    assert get_quantization_config(NAME) is DeepseekV4QuantConfig


@pytest.mark.usefixtures("registered")
def test_the_inspection_subprocess_sees_our_class(tmp_path, monkeypatch):
    from vllm.model_executor.models import registry

    runs = []

    def run(*args, **kwargs):
        runs.append(subprocess.run(*args, **kwargs))
        return runs[-1]

    # vLLM remembers an inspection on disk by the content of model.py, and would start no process.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setattr(registry, "subprocess", SimpleNamespace(run=run))
    info = registry.ModelRegistry.models[plugin.ARCHITECTURE].inspect_model_cls()
    (process,) = runs
    assert process.returncode == 0
    output = (process.stdout + process.stderr).decode()
    assert output.count(f"{plugin.ARCHITECTURE} is served by {plugin.MODEL_PATH}") == 1, output
    assert (info.architecture, info.is_text_generation_model, info.supports_pp) == (plugin.ARCHITECTURE, True, True)
    assert (info.is_pooling_model, info.supports_multimodal) == (False, False)


# ---- refusals

REFUSED = {
    "ngram": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        {},
        ["--speculative-config", "'ngram'", "Start without --speculative-config", f"{DISABLE_ENV}=1"],
    ),
    "mtp": (
        {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
        {},
        ["--speculative-config", "'mtp'", "Start without --speculative-config", f"{DISABLE_ENV}=1"],
    ),
    "fp8_e5m2": (
        {"kv_cache_dtype": "fp8_e5m2"},
        {},
        ["--kv-cache-dtype fp8_e5m2", "allowed: auto, float16", "Start without --kv-cache-dtype"],
    ),
    "dcp": (
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        {},
        ["--decode-context-parallel-size 2", "Use 1"],
    ),
    "index cache": (
        {"additional_config": {"index_cache_dtype": "fp6"}},
        {},
        ["index_cache_dtype in --additional-config is 'fp6'", "use one of auto, fp8, fp4, model"],
    ),
    "additional config": (
        {"additional_config": {"index_cache_type": "fp4"}},
        {},
        ["--additional-config has 'index_cache_type', which nothing reads", "allowed: 'index_cache_dtype'"],
    ),
    "prompt embeds": ({"enable_prompt_embeds": True}, {}, ["--enable-prompt-embeds is not served", "token ids"]),
    "tp": (
        {"tensor_parallel_size": 2},
        {"moe_intermediate_size": 33},
        ["--tensor-parallel-size 2 does not divide moe_intermediate_size, 33"],
    ),
    "tp+ep": (
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        {"n_routed_experts": 7},
        ["--tensor-parallel-size 2 does not divide n_routed_experts, 7"],
    ),
    "pcp": ({"prefill_context_parallel_size": 2}, {}, ["--prefill-context-parallel-size 2", "Use 1"]),
    "dp+ep": (
        {"data_parallel_size": 2, "enable_expert_parallel": True},
        {},
        ["--data-parallel-size 2", "--enable-expert-parallel", "Drop one of the two options"],
    ),
    "config value": ({}, {"hc_mult": 0}, ["DeepSeek-V4 config: hc_mult is 0", "allowed: an integer >= 1"]),
    "layer schedule": ({}, {"compress_ratios": [0, 8, 4, 128, 4, 0]}, ["compress_ratios[1] is 8", "4 (CSA)"]),
    "quantisation": (
        {},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        ["quantization 'bitsandbytes'", "allowed: awq, gptq", f"{DISABLE_ENV}=1"],
    ),
    "--quantization": (
        {"quantization": "bitsandbytes"},
        {},
        ["quantization 'bitsandbytes'", "allowed: awq, gptq", f"{DISABLE_ENV}=1"],
    ),
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("arguments", "config", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, arguments, config, words):
    """The option or key, its value, what to do instead; before any engine process starts."""
    with pytest.raises(ValueError, match=r"\S") as refusal:
        engine_config(write_config(tmp_path / "model", **config), **arguments)
    assert [word for word in words if word not in str(refusal.value)] == []


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"])
def test_row_formats_that_are_served(tmp_path, dtype):
    config = engine_config(write_config(tmp_path / "model"), kv_cache_dtype=dtype)
    assert config.cache_config.cache_dtype == dtype


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "arguments",
    [{"tensor_parallel_size": 2, "enable_expert_parallel": True}, {"pipeline_parallel_size": 2}],
    ids=["tp+ep", "pp"],
)
def test_parallelism_that_is_served(tmp_path, arguments):
    # Each half has a CSA and an HCA layer.
    model = write_config(tmp_path / "model", num_hidden_layers=6, compress_ratios=[4, 128, 0, 0, 128, 4, 0])
    config = engine_config(model, **arguments)
    assert {name: getattr(config.parallel_config, name) for name in arguments} == arguments


@pytest.mark.usefixtures("registered")
def test_a_pipeline_stage_without_a_kind_of_layer_is_refused(tmp_path):
    model = write_config(tmp_path / "model", num_hidden_layers=6, compress_ratios=[0, 4, 128, 4, 4, 4, 0])
    with pytest.raises(ValueError, match=r"stage 1 has layers 3 to 5, none of them HCA.*VLLM_PP_LAYER_PARTITION"):
        engine_config(model, pipeline_parallel_size=2)


@pytest.mark.usefixtures("registered")
def test_a_pipeline_on_a_cpu_keeps_vllms_warm_up_run(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    model = write_config(tmp_path / "model", num_hidden_layers=6, compress_ratios=[4, 128, 0, 0, 128, 4, 0])
    with pytest.raises(ValueError, match=r"--pipeline-parallel-size 2 on a CPU.*start without --enforce-eager"):
        engine_config(model, pipeline_parallel_size=2, enforce_eager=True)
    config = engine_config(model, pipeline_parallel_size=2)
    assert config.compilation_config.mode != 0
