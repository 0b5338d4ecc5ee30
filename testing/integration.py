"""What vLLM makes of a checkpoint directory before it reads any weights, and vLLM in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from testing.tiny import CONFIGS

# Importing vLLM takes 15 s on an idle core, and this machine may run several things at once.
IMPORT_TIMEOUT = 1200


def write_config(directory: Path, drop: Collection[str] = (), **overrides: Any) -> Path:
    """A checkpoint directory with nothing but a config.json: that of tiny's "mixed", with changes."""
    directory.mkdir(exist_ok=True)
    config = {**CONFIGS["mixed"].hf_config, "torch_dtype": "float32", **overrides}
    config = {key: value for key, value in config.items() if key not in drop}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def vllm_config_class() -> Any:
    """The config class that this vLLM uses for V4: its own in 0.32, later transformers'."""
    try:
        from vllm.transformers_utils.configs.deepseek_v4 import DeepseekV4Config
    except ImportError:
        from transformers import DeepseekV4Config
    return DeepseekV4Config


def engine_config(directory: Path, **arguments: Any) -> Any:
    """The VllmConfig that `vllm serve directory --arguments` would run with."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"max_model_len": 1024, "skip_tokenizer_init": True, **arguments}
    return EngineArgs(model=str(directory), **arguments).create_engine_config()


def run_python(code: str, timeout: float = IMPORT_TIMEOUT, environment: dict[str, str] | None = None) -> str:
    """Run `code` in a new interpreter at log level INFO; its output as text, stderr included."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout
