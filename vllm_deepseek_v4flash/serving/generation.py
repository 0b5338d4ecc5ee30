"""Which generation of weights a checkpoint holds, from the encoder that it ships.

Nothing else tells: config.json, tokenizer.json and tokenizer_config.json are the same for all, and both April's DSpark
preview and 0731 have `dspark_*` keys.
"""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.encoder import ENCODER as ENCODER
from ..checkpoint.encoder import generation_of
from .modes import Generation


def detect_generation(model: str, revision: str | None = None) -> tuple[Generation | None, str]:
    """The generation of a checkpoint and the reason; None if its files do not tell.

    Args:
        model: a directory, or a repository on the hub, from which only the encoder is fetched.
        revision: the revision of the repository.
    """
    text = _read_encoder(model, revision)
    if text is None:
        return None, f"it has no {ENCODER}"
    found = generation_of(text)
    if found is None:
        return None, f"its {ENCODER} contains none of the known texts"
    return Generation(found[0]), f'its {ENCODER} contains "{found[1]}"'


def _read_encoder(model: str, revision: str | None) -> str | None:
    directory = Path(model)
    if directory.is_dir():
        path = directory / ENCODER
        content = path.read_bytes() if path.is_file() else None
    else:
        from .compat import get_hf_file_bytes

        content = get_hf_file_bytes(ENCODER, model, revision)
    # A file that is not UTF-8 does not contain the known texts either.
    return None if content is None else content.decode("utf-8", errors="replace")
