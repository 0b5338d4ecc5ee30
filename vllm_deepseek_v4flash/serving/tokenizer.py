"""The tokenizers of vLLM's tokenizer modes `deepseek_v4_april` and `deepseek_v4_0731`: V4's, with its chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import TokenizersBackend

from vllm_deepseek_v4flash.serving.compat import get_cached_tokenizer
from vllm_deepseek_v4flash.serving.encoding import encode_chat
from vllm_deepseek_v4flash.serving.modes import Generation, select_mode

# `--chat-template` of this text is V4's own format. Without one vLLM's /v1/messages takes the format for one whose
# system text must come first, moves later ones there, and each of them is a new beginning for the prefix cache.
OWN_TEMPLATE = "{# deepseek_v4 #}"


class AprilTokenizer(TokenizersBackend):
    """A V4 checkpoint's tokenizer.json with April's chat encoding; `from_pretrained` as transformers'."""

    chat_generation: ClassVar[Generation] = Generation.APRIL

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        # With vLLM's caches around it, as it puts them around every tokenizer: the vocabulary is asked for per token.
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
        """The prompt of a conversation: token ids, or text where `tokenize` is false.

        Args:
            conversation: messages in the form of the OpenAI API (`messages.read_messages`).
            tools, response_format, drop_thinking, add_generation_prompt, continue_final_message: `encode_chat`'s.
            thinking, enable_thinking, reasoning_effort: `select_mode`'s.
            kwargs: `truncation` and `max_length` are the tokenizer's; others are for other models' templates, and
                ignored as templates ignore what they do not name.

        Raises:
            ValueError: what is wrong with the messages, the tools or the mode; also for another `chat_template` than
                OWN_TEMPLATE.
        """
        if chat_template not in (None, OWN_TEMPLATE):
            raise ValueError(
                "DeepSeek-V4's prompts are not made by a Jinja template, so chat_template has no effect: leave it "
                "out, or choose another tokenizer with --tokenizer-mode hf."
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
        # The text holds the BOS already.
        return self.encode(prompt, add_special_tokens=False, **limits)


class JulyTokenizer(AprilTokenizer):
    """A V4 checkpoint's tokenizer.json with 0731's chat encoding."""

    chat_generation: ClassVar[Generation] = Generation.JULY
