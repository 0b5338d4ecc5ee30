"""vLLM before and after the plugin is registered in it, and what the plugin logs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import vllm_deepseek_v4flash
from testing.logs import recorded
from vllm_deepseek_v4flash.config import ARCHITECTURE
from vllm_deepseek_v4flash.integration import install
from vllm_deepseek_v4flash.integration.in_tree import IN_TREE_ARCHITECTURE
from vllm_deepseek_v4flash.integration.switch import DISABLE_ENV
from vllm_deepseek_v4flash.integration.workarounds import MLA_DISABLE_ENV


@pytest.fixture
def log():
    """The lines of the package's loggers."""
    with recorded("vllm.deepseek_v4flash") as recorder:
        yield recorder.lines


@pytest.fixture
def no_mla_switch(monkeypatch):
    """VLLM_MLA_DISABLE is not set, and what the plugin sets is undone after the test."""
    monkeypatch.setenv(MLA_DISABLE_ENV, "")  # recorded, so that the end of the test removes it again
    monkeypatch.delenv(MLA_DISABLE_ENV)


@pytest.fixture
def vllm_state(monkeypatch, no_mla_switch):
    """vLLM as it is before any plugin: registrations of the test are undone after it."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry, _LazyRegisteredModel
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for registry in (MODELS_CONFIG_MAP, ModelRegistry.models, _CONFIG_REGISTRY):
        for key, value in list(registry.items()):
            monkeypatch.setitem(registry, key, value)
    in_tree = _LazyRegisteredModel("vllm.models.deepseek_v4", ARCHITECTURE)
    monkeypatch.setitem(ModelRegistry.models, ARCHITECTURE, in_tree)
    monkeypatch.delitem(ModelRegistry.models, IN_TREE_ARCHITECTURE, raising=False)
    hook = MODELS_CONFIG_MAP[ARCHITECTURE]
    if getattr(hook, install._HOOK_MARK, False):
        monkeypatch.setitem(MODELS_CONFIG_MAP, ARCHITECTURE, hook.__mro__[1])
    monkeypatch.setattr(vllm_deepseek_v4flash, "_registered", False)
    monkeypatch.delenv(DISABLE_ENV, raising=False)
    return SimpleNamespace(models=ModelRegistry.models, hooks=MODELS_CONFIG_MAP, readers=_CONFIG_REGISTRY)


@pytest.fixture
def registered():
    """vLLM with its general plugins loaded, as in every process that it starts."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
