"""Which generation of weights a checkpoint is: its shipped encoder says so.

config.json, tokenizer.json and tokenizer_config.json are the same for all of them, and `dspark_*` keys are in April's
DSpark preview as well as in 0731.
"""

from __future__ import annotations

from pathlib import Path

from vllm_deepseek_v4flash.serving.modes import Generation

ENCODER = "encoding/encoding_dsv4.py"

# What each encoder puts before a prompt. 0731's has both texts, so it comes first.
_SIGNS = (("Beyond maximum", Generation.JULY), ("Absolute maximum", Generation.APRIL))


def detect_generation(model: str, revision: str | None = None) -> tuple[Generation | None, str]:
    """The generation of a checkpoint and the reason; None where its files do not tell.

    Args:
        model: a directory, or the name of a repository on the hub, of which only the encoder is fetched.
        revision: of the repository.
    """
    text = _read_encoder(model, revision)
    if text is None:
        return None, f"it has no {ENCODER}"
    for sign, generation in _SIGNS:
        if sign in text:
            return generation, f'its {ENCODER} has the text "{sign}"'
    return None, f"its {ENCODER} has none of the known texts"


def _read_encoder(model: str, revision: str | None) -> str | None:
    directory = Path(model)
    if directory.is_dir():
        path = directory / ENCODER
        content = path.read_bytes() if path.is_file() else None
    else:
        from vllm_deepseek_v4flash.serving.compat import get_hf_file_bytes

        content = get_hf_file_bytes(ENCODER, model, revision)
    # A file in another encoding is a file without the known texts.
    return None if content is None else content.decode("utf-8", errors="replace")
