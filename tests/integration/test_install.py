"""Registering in vLLM: what the plugin takes over, what it says, and how it fails in a vLLM that has changed."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import vllm_deepseek_v4flash
from testing.integration import run_python, write_config
from vllm_deepseek_v4flash.config import ARCHITECTURE
from vllm_deepseek_v4flash.integration import install
from vllm_deepseek_v4flash.integration.in_tree import IN_TREE_ARCHITECTURE
from vllm_deepseek_v4flash.integration.switch import DISABLE_ENV
from vllm_deepseek_v4flash.integration.workarounds import MLA_DISABLE_ENV
from vllm_deepseek_v4flash.kv_cache import BACKEND_NAME
from vllm_deepseek_v4flash.log import info_at_startup, info_once, warning_once

OURS = "vllm_deepseek_v4flash.integration.registered_model"
IN_TREE = "vllm.models.deepseek_v4"
LINE = (
    f"vllm-deepseek-v4flash {vllm_deepseek_v4flash.__version__}: Registered {ARCHITECTURE} (replacing vLLM's in-tree "
    f"class), quantization loader, attention backend and chat encoding. Set {DISABLE_ENV}=1 to keep vLLM's."
)


def test_register_takes_over_the_text_model_only(vllm_state, log):
    before = dict(vllm_state.models)
    vllm_deepseek_v4flash.register()
    after = dict(vllm_state.models)
    assert after.pop(ARCHITECTURE).module_name == OURS
    assert after.pop(IN_TREE_ARCHITECTURE) is before.pop(ARCHITECTURE)
    assert after == before
    assert log == [LINE]


def test_register_twice(vllm_state, log):
    vllm_deepseek_v4flash.register()
    once = dict(vllm_state.models), dict(vllm_state.hooks), dict(vllm_state.readers)
    vllm_deepseek_v4flash.register()
    assert len(log) == 1
    install.install()  # what a second import of the package would do
    assert (dict(vllm_state.models), dict(vllm_state.hooks), dict(vllm_state.readers)) == (
        {**once[0], ARCHITECTURE: vllm_state.models[ARCHITECTURE]},
        *once[1:],
    )
    assert vllm_state.models[ARCHITECTURE].module_name == OURS
    assert vllm_state.models[IN_TREE_ARCHITECTURE].module_name == IN_TREE
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
        environment={DISABLE_ENV: "1"},
    )
    assert f"CLASS {IN_TREE}." in output
    assert "MLA True" in output
    assert "BACKEND False" in output
    assert f"{DISABLE_ENV} is set: vLLM's in-tree model serves DeepSeek-V4." in output


@pytest.mark.parametrize(
    ("value", "disabled", "warned"),
    [("1", True, False), (" True ", True, False), ("on", True, False), ("0", False, False), ("", False, False),
     ("no", False, False), ("maybe", True, True)],
)  # fmt: skip
def test_values_of_the_switch(vllm_state, log, monkeypatch, value, disabled, warned):
    monkeypatch.setenv(DISABLE_ENV, value)
    vllm_deepseek_v4flash.register()
    assert vllm_state.models[ARCHITECTURE].module_name == (IN_TREE if disabled else OURS)
    assert (IN_TREE_ARCHITECTURE in vllm_state.models) is not disabled
    assert any("neither 0 nor 1" in message for message in log) is warned


def test_the_line_is_silent_where_vllm_is(monkeypatch, capfd):
    """Before vLLM configures logging the line has a handler of its own; the user's log level still applies."""
    silent = logging.getLogger("vllm_deepseek_v4flash_test")
    silent.propagate = False
    for level, configure, expected in (("INFO", "1", True), ("WARNING", "1", False), ("INFO", "0", False)):
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
        monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", configure)
        info_at_startup(silent, "a line")
        assert ("a line" in capfd.readouterr().err) is expected, (level, configure)
    assert silent.handlers == []


def test_a_line_that_appears_once(log):
    logger = logging.getLogger("vllm.deepseek_v4flash.once")
    for _ in range(2):
        info_once(logger, "%s tokens", 3)
        info_once(logger, "%s tokens", 4)
        warning_once(logger, "%s tokens", 3)
    assert log == ["3 tokens", "4 tokens", "3 tokens"]


@pytest.mark.usefixtures("registered")
def test_the_inspection_subprocess_sees_our_class(tmp_path, monkeypatch):
    from vllm.model_executor.models import registry

    runs = []

    def run(*args, **kwargs):
        runs.append(subprocess.run(*args, **kwargs))
        return runs[-1]

    # vLLM caches an inspection on disk under a hash of the class's file, and would start no process.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setattr(registry, "subprocess", SimpleNamespace(run=run))
    info = registry.ModelRegistry.models[ARCHITECTURE].inspect_model_cls()
    (process,) = runs
    assert process.returncode == 0
    output = (process.stdout + process.stderr).decode()
    assert output.count(LINE) == 1, output
    assert (info.architecture, info.is_text_generation_model, info.supports_pp) == (ARCHITECTURE, True, True)
    assert (info.is_pooling_model, info.supports_multimodal) == (False, False)


@pytest.mark.usefixtures("registered")
def test_the_backend_has_a_name_of_its_own():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_deepseek_v4flash.kv_cache import backend

    install._register_attention_backend()  # once more
    member = AttentionBackendEnum[BACKEND_NAME]
    assert member.get_class() is backend.DeepseekV4Backend
    assert backend.DeepseekV4Backend.get_name() == BACKEND_NAME
    assert [name for name in AttentionBackendEnum.__members__ if "V4FLASH" in name] == [BACKEND_NAME]


@pytest.mark.usefixtures("registered")
def test_the_quantization_config_has_a_name_of_its_own():
    from vllm.model_executor.layers.quantization import get_quantization_config

    from vllm_deepseek_v4flash.integration.quantization import NAME, DeepseekV4QuantConfig

    install._register_quantization()  # once more
    assert get_quantization_config(NAME) is DeepseekV4QuantConfig


# ---- a vLLM that has changed


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.31.9", True), ("0.32.0", False), ("0.33.1", False), ("0.34.0rc1", True), ("1.0", True)],
)
def test_a_version_that_is_not_tested_is_named(vllm_state, log, monkeypatch, version, warned):
    monkeypatch.setattr("vllm.version.__version__", version)
    monkeypatch.setattr("vllm.version.__version_tuple__", tuple(map(int, re.findall(r"\d+", version))))
    vllm_deepseek_v4flash.register()
    assert vllm_state.models[ARCHITECTURE].module_name == OURS
    said = [line for line in log if line.startswith(f"vllm={version}: vllm-deepseek-v4flash has not been tested")]
    assert len(said) == warned
    assert all(f"Install {vllm_deepseek_v4flash.SUPPORTED_VLLM}, or set {DISABLE_ENV}=1" in line for line in said)


def test_a_symbol_that_is_gone_is_one_sentence():
    """docs/compatibility.md lists what is going to move; the model's import says which symbol has."""
    output = run_python(
        "import vllm.v1.kv_cache_interface as moved\n"
        "del moved.SlidingWindowMLASpec\n"
        "try:\n"
        "    import vllm_deepseek_v4flash.kv_cache.backend\n"
        "except ImportError as error:\n"
        "    print('ERROR', error, error.__cause__, error.__suppress_context__)\n"
    )
    (line,) = [line for line in output.splitlines() if line.startswith("ERROR ")]
    assert re.fullmatch(
        r"ERROR vllm=[\w.+]+: vllm-deepseek-v4flash does not support this version \(cannot import name "
        r"'SlidingWindowMLASpec' from .*\)\. Install one of those in docs/compatibility\.md, or set "
        rf"{DISABLE_ENV}=1 for vLLM's own model\. None True",
        line,
    )


def remove(monkeypatch, path):
    module, _, name = path.rpartition(".")
    monkeypatch.delattr(sys.modules[module], name)


def test_a_model_registry_that_is_gone_is_logged_with_the_help(vllm_state, log, monkeypatch):
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
    ("symbol", "message", "added"),
    [
        (
            "vllm.model_executor.layers.quantization.register_quantization_config",
            "quantization registry has changed",
            "quantization loader",
        ),
        (
            "vllm.v1.attention.backends.registry.register_backend",
            "attention backend registry has changed",
            "attention backend",
        ),
        (
            "vllm.renderers.registry.RENDERER_REGISTRY",
            "tokenizer, renderer or parser registry has changed",
            "chat encoding",
        ),
        ("vllm.transformers_utils.config._CONFIG_REGISTRY", "config registry has changed", None),
        ("vllm.model_executor.models.config.MODELS_CONFIG_MAP", "per-model config hook has moved", None),
    ],
)
def test_what_else_has_changed_is_left_out(vllm_state, log, monkeypatch, symbol, message, added):
    remove(monkeypatch, symbol)
    vllm_deepseek_v4flash.register()
    assert vllm_state.models[ARCHITECTURE].module_name == OURS
    assert [line for line in log if message in line and symbol.rpartition(".")[2] in line]
    assert f"Registered {ARCHITECTURE}" in log[-1]
    assert (log[-1] == LINE) is (added is None)
    assert added is None or added not in log[-1]


def test_without_the_hook_the_cpu_still_caches(vllm_state, log, monkeypatch):
    remove(monkeypatch, "vllm.model_executor.models.config.MODELS_CONFIG_MAP")
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: True)
    vllm_deepseek_v4flash.register()
    assert os.environ[MLA_DISABLE_ENV] == "1"
    assert [line for line in log if "keep chunked prefill and prefix caching" in line]


def test_a_hook_without_its_methods_is_not_replaced(vllm_state, log):
    vllm_state.hooks[ARCHITECTURE] = moved = type("Moved", (), {})
    vllm_deepseek_v4flash.register()
    assert vllm_state.hooks[ARCHITECTURE] is moved
    assert [line for line in log if "Moved.verify_and_update_model_config is missing" in line]
