"""The CPU's greedy tokens for every setting of the `engine` part, to compare a GPU's with.

    python -m checks.gpu_check.expected     on a CPU, after a change of the checkpoints: writes expected.json

vLLM's CUDA build does not run on a CPU, so the tokens are committed, each with its lead over the second best token,
which tells where two correct implementations may differ.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checkpoints
from .checkpoints import SETTINGS, Setting

FILE = Path(__file__).with_name("expected.json")


@dataclass(frozen=True)
class Reply:
    """tokens: greedy, with the stop token. gaps: the log-probability of each above the second best token's."""

    tokens: list[int]
    gaps: list[float]


def generate(llm: Any, setting: Setting, prompts: list[list[int]], most: int | None = None) -> list[Reply]:
    """Run the prompts at once. most: tokens of a reply; default: the checkpoint's."""
    from vllm import SamplingParams

    trained = setting.checkpoint != "scheduler"
    limit = most or (checkpoints.MOST_TOKENS if trained else checkpoints.SCHEDULER_TOKENS)
    params = SamplingParams(
        temperature=0.0, max_tokens=limit, logprobs=2, detokenize=False,
        ignore_eos=True, stop_token_ids=[checkpoints.STOP] if trained else None,
    )  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [_reply(output.outputs[0]) for output in outputs]


def _reply(completion: Any) -> Reply:
    gaps = []
    for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
        second = max(entry.logprob for other, entry in logprobs.items() if other != token)
        gaps.append(round(logprobs[token].logprob - second, 3))
    return Reply(list(completion.token_ids), gaps)


def read() -> dict[str, Any]:
    """checkpoints: fingerprints by name; replies: by the setting's name, [tokens, gaps] for each prompt."""
    return json.loads(FILE.read_text())


def replies(stored: dict[str, Any], setting: Setting) -> list[Reply]:
    return [Reply(*pair) for pair in stored["replies"][setting.name]]


def compute(settings: tuple[Setting, ...] = SETTINGS) -> dict[str, Any]:
    """The contents of expected.json, computed on this machine's CPU."""
    from testing import engine

    found: dict[str, Any] = {"checkpoints": {}, "replies": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for setting in settings:
            path = checkpoints.checkpoint(setting.checkpoint, Path(scratch))
            found["checkpoints"][setting.checkpoint] = checkpoints.fingerprint(path)
            with engine.running(path, max_num_seqs=checkpoints.PROMPTS, **setting.options) as llm:
                made = generate(llm, setting, checkpoints.prompts(setting.checkpoint))
            found["replies"][setting.name] = [[reply.tokens, reply.gaps] for reply in made]
            print(setting.name, flush=True)
    return found


def write(found: dict[str, Any], path: Path = FILE) -> None:
    """One reply a line, so that a changed reply is a changed line."""
    lines = [json.dumps({"checkpoints": found["checkpoints"]})[:-1] + ', "replies": {']
    for number, (name, pairs) in enumerate(found["replies"].items()):
        lines.append(f"{',' if number else ''}{json.dumps(name)}: [")
        lines += [",\n".join(json.dumps(pair, separators=(",", ":")) for pair in pairs), "]"]
    path.write_text("\n".join([*lines, "}}"]) + "\n")


if __name__ == "__main__":
    import torch

    if torch.cuda.is_available():
        raise SystemExit("torch sees a GPU: expected.json holds a CPU's tokens. Set CUDA_VISIBLE_DEVICES= to hide it.")
    write(compute())
