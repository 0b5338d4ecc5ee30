"""What serving needs of a checkpoint besides config.json and weights: tokenizer, sampling defaults, chat encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.encoder import ENCODER, generation_of
from ..config import line, parse_json, shown

TOKENIZER, GENERATION_CONFIG = "tokenizer.json", "generation_config.json"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True)
class ChatFiles:
    """What was found. `problems` are sentences; `vllm serve` would stop for each of them after minutes."""

    tokenizer: bool
    sampling: Mapping[str, Any] | None
    """What generation_config.json sets; None where there is none."""
    generation: str | None
    """Of the weights, by the encoder that the checkpoint ships: "april" or "0731"; None where it tells neither."""
    problems: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people, a line for each file."""
        sampling = ", ".join(f"{name} {shown(value)}" for name, value in (self.sampling or {}).items())
        return [
            f"tokenizer: {TOKENIZER if self.tokenizer else 'none here'}",
            "sampling defaults: "
            + (f"{sampling or 'none'}, of {GENERATION_CONFIG}" if self.sampling is not None else "vLLM's own"),
            f"chat encoding: {self.generation}'s, by {ENCODER}"
            if self.generation
            else f"chat encoding: April's, as there is no {ENCODER}; for weights of 0731 pass --tokenizer-mode "
            f"deepseek_v4_0731",
        ]


def check_chat_files(read: Callable[[str], bytes | None], exists: Callable[[str], bool], where: str) -> ChatFiles:
    """Look for the files.

    Args:
        read: a file's content, None if there is none.
        exists: whether there is a file, without reading it.
        where: what messages call the checkpoint.
    """
    problems = []
    tokenizer = exists(TOKENIZER)
    if not tokenizer:
        problems.append(
            f"{where} has no {TOKENIZER}, which vLLM needs. Copy it from the repository of the original weights, or "
            f"pass `vllm serve` a --tokenizer directory that has it"
        )
    sampling: Mapping[str, Any] | None = None
    content = read(GENERATION_CONFIG)
    if content is not None:
        try:
            values = parse_json(content)
        except ValueError as error:
            values, problem = {}, f"is not JSON ({error})"
        else:
            problem = "" if isinstance(values, Mapping) else f"is a JSON {type(values).__name__}, should be an object"
        if problem:
            problems.append(line(f"{where}: {GENERATION_CONFIG} {problem}. Download it again"))
            values = {}
        sampling = {name: values[name] for name in _SAMPLING if values.get(name) is not None}
    encoder = read(ENCODER)
    found = None if encoder is None else generation_of(encoder.decode("utf-8", errors="replace"))
    return ChatFiles(tokenizer, sampling, found[0] if found else None, tuple(problems))
