"""A draft that knows what the model is going to say, and is wrong where a test wants it to be.

vLLM makes a `Prophet` from `{"method": "custom_class", "model": MODEL}` in its `speculative_config`.
"""

from __future__ import annotations

from typing import Any, ClassVar

MODEL = f"{__name__}.Prophet"
PERIOD = 128
"""Of everything that a position is divided by: entries, and pages of windows and states."""


class Prophet:
    """Drafts the next tokens of `texts`, but one of them wrong as long as there is a place where none has been yet."""

    texts: ClassVar[list[list[int]]] = []
    """Whole texts, prompts included. No one begins with another."""
    rejected: ClassVar[set[int]] = set()
    """Where drafts were wrong: positions modulo PERIOD, of the wrong tokens and of those after them."""

    def __init__(self, vllm_config: Any) -> None:
        self.most = vllm_config.speculative_config.num_speculative_tokens
        self.vocab = vllm_config.model_config.get_vocab_size()

    def load_model(self, *args: Any) -> None:
        """There is none."""

    def propose(
        self, sampled_token_ids: list[list[int]], lengths: Any, token_ids: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """A draft for each request that has just sampled a token; empty for the others."""
        return [
            self._draft(token_ids[row, : lengths[row]].tolist()) if sampled else []
            for row, sampled in enumerate(sampled_token_ids)
        ]

    def _draft(self, tokens: list[int]) -> list[int]:
        length = len(tokens)
        text = next((text for text in self.texts if text[:length] == tokens), None)
        draft = [] if text is None else text[length : length + self.most]
        places = [(length + n) % PERIOD for n in range(len(draft))]
        wrong = next((n for n, place in enumerate(places) if place not in self.rejected), None)
        if wrong is not None:
            draft[wrong] = 3 + (draft[wrong] - 2) % (self.vocab - 3)
            self.rejected.update(places[wrong:])
        return draft
