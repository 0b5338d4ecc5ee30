"""V4's tokenizer with its chat format: vLLM's tokenizer modes `deepseek_v4_april` and `deepseek_v4_0731`."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import TokenizersBackend

from .compat import get_cached_tokenizer
from .encoding import encode_chat
from .modes import Generation, select_mode

# `--chat-template` with this text selects V4's own format. Without a template vLLM's /v1/messages assumes that system
# text must come first and moves later ones there, and each of them then invalidates the cached prefix.
OWN_TEMPLATE = "{# deepseek_v4 #}"


class AprilTokenizer(TokenizersBackend):
    """A V4 checkpoint's tokenizer.json with April's chat encoding; `from_pretrained` is transformers'."""

    chat_generation: ClassVar[Generation] = Generation.APRIL

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # With the caches that vLLM puts around every tokenizer, because the vocabulary is looked up for every token.
        return get_cached_tokenizer(super().from_pretrained(*args, **kwargs))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        thinking: bool | None = None,
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
        response_format: Any = None,
        drop_thinking: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str | list[int]:
        """The prompt of a conversation: token ids, or text if `tokenize` is false.

        Args:
            conversation: messages in the form of the OpenAI API (see `messages.read_messages`).
            tools, response_format, drop_thinking, add_generation_prompt, continue_final_message: see `encode_chat`.
            thinking, enable_thinking, reasoning_effort: see `select_mode`.
            chat_template: None or OWN_TEMPLATE.
            kwargs: `truncation` and `max_length` are the tokenizer's. Others are meant for other models' templates and
                are ignored, as a template ignores variables that it does not use.

        Raises:
            ValueError: naming what is wrong with the messages, the tools, the mode or the template, and the fix.
        """
        if chat_template not in (None, OWN_TEMPLATE):
            raise ValueError(
                f"chat_template={reprlib.repr(chat_template)}: DeepSeek-V4's prompts are not made by a Jinja template. "
                f"Leave it out, or select another tokenizer with --tokenizer-mode hf."
            )
        mode = select_mode(
            self.chat_generation, thinking=thinking, enable_thinking=enable_thinking, reasoning_effort=reasoning_effort
        )
        prompt = encode_chat(
            conversation,
            mode,
            tools=tools,
            response_format=response_format,
            drop_thinking=drop_thinking,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        if not tokenize:
            return prompt
        limits = {name: kwargs[name] for name in ("truncation", "max_length") if name in kwargs}
        # The text already contains the BOS.
        return self.encode(prompt, add_special_tokens=False, **limits)


class JulyTokenizer(AprilTokenizer):
    """A V4 checkpoint's tokenizer.json with 0731's chat encoding."""

    chat_generation: ClassVar[Generation] = Generation.JULY
