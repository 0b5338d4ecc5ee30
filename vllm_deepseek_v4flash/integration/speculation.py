"""Which drafts of speculative decoding vLLM may use with this model (docs/speculation.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .switch import DISABLE_ENV

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DRAFT_FREE = ("ngram", "ngram_gpu", "suffix", "custom_class")
"""Methods that guess from the tokens alone, so that every model can verify their drafts."""


def check_speculation(vllm_config: VllmConfig) -> None:
    """Refuse drafts that read or share something that this model does not have.

    Raises:
        ValueError: naming the method, its draft model if it has one, and the fix.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in DRAFT_FREE:
        return
    draft = f"with the draft {speculative.model!r} " if speculative.model not in (None, speculative.method) else ""
    raise ValueError(
        f"--speculative-config.method={speculative.method!r}: {draft}not supported for DeepSeek-V4 by "
        f"vllm-deepseek-v4flash. Use 'ngram' or another method of docs/speculation.md, start without "
        f"--speculative-config, or set {DISABLE_ENV}=1 for vLLM's in-tree model."
    )
