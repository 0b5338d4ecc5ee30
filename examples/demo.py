"""Run a DeepSeek-V4 checkpoint in vLLM's `LLM()` and show its layers, its answers and its speed.

    python examples/demo.py [DIR] [--dtype float32] [--kv-cache-dtype fp8] [--num-questions 200]

DIR defaults to the small trained model in `examples/toy`. If the directory has an `eval.jsonl`, the model is also
scored: each line has a `prompt` in V4's chat format, its `answer`, and `greedy_token_ids`, the tokens that
`transformers` generated greedily in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_deepseek_v4flash.config import DeepseekV4Config, LayerKind

TOY = Path(__file__).resolve().parent / "toy"
ARCHITECTURE = "DeepseekV4ForCausalLM"
KIND_NAMES = {LayerKind.WINDOW: "window", LayerKind.CSA: "CSA", LayerKind.HCA: "HCA"}
END_OF_THINKING = "</think>"
CHAT_PROMPTS = (
    "What is the capital of France?",
    "What is 17 + 25?",
    "Write one sentence about the sea.",
    "Name three prime numbers.",
    "Why is the sky blue? Answer in one sentence.",
    "Translate 'good morning' to German.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Complete the sequence: 2, 4, 8, 16,",
)
CHAT_MAX_TOKENS = 64
TOY_CACHE_BYTES = 1 << 30


class DemoError(Exception):
    """An error that is shown to the user without a traceback."""


@dataclass(frozen=True)
class Question:
    """One line of eval.jsonl."""

    task: str
    thinking: bool
    question: str
    answer: str
    prompt: str
    greedy_token_ids: list[int]


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's config.json; DemoError if `directory` is not a DeepSeek-V4 text checkpoint."""
    if not directory.is_dir():
        raise DemoError(f"{directory} is not a directory: give the directory of a DeepSeek-V4 checkpoint.")
    path = directory / "config.json"
    if not path.is_file():
        raise DemoError(f"{directory} has no config.json, so it is not a checkpoint directory.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DemoError(f"{path} is not JSON: {error}") from error
    architectures = config.get("architectures") or []
    if ARCHITECTURE not in architectures:
        raise DemoError(
            f"{path} is not a DeepSeek-V4 checkpoint's: its architectures are {architectures} (model_type "
            f"{config.get('model_type')!r}). Give one with {ARCHITECTURE}."
        )
    if not any(directory.glob("*.safetensors")):
        raise DemoError(f"{directory} has no *.safetensors file: there are no weights to load.")
    return config


def load_questions(directory: Path, limit: int | None) -> list[Question]:
    """The first `limit` questions of the directory's eval.jsonl; none without that file."""
    path = directory / "eval.jsonl"
    if not path.is_file():
        return []
    fields = tuple(Question.__dataclass_fields__)
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return [Question(**{name: row[name] for name in fields}) for row in rows][:limit]


def split_reply(text: str) -> tuple[str, str]:
    """`(thinking, answer)` of a reply; without `</think>` all of it is the answer."""
    thinking, _, answer = text.rpartition(END_OF_THINKING)
    return thinking.strip(), answer.strip()


def describe_layers(config: DeepseekV4Config) -> str:
    """The layers in order, with equal neighbours joined, and the number of each kind."""
    runs: list[tuple[str, int, int]] = []
    for index, kind in enumerate(config.layer_kinds):
        name = KIND_NAMES[kind]
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], index)
        else:
            runs.append((name, index, index))
    order = ", ".join(f"{first}{f'-{last}' if last > first else ''} {name}" for name, first, last in runs)
    counts = Counter(KIND_NAMES[kind] for kind in config.layer_kinds)
    total = " + ".join(f"{count} {name}" for name, count in counts.items())
    return f"{len(config.layer_kinds)} layers = {total}\n            ({order})"


def layer_cache_specs(worker: Any) -> list[Any]:
    """The specs of the caches that vLLM allocated in `worker`, one for each cache of each layer."""
    specs: list[Any] = []
    for group in worker.model_runner.kv_cache_config.kv_cache_groups:
        by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        specs += [by_layer.get(name, group.kv_cache_spec) for name in group.layer_names]
    return specs


def cache_cost(specs: Sequence[Any]) -> tuple[float, int]:
    """The cost of a sequence by vLLM's KV-cache specs: bytes for each token, and bytes for the sequence.

    Caches with a sliding window (the window's rows, the compressors' states) have a bounded number of tokens.
    """
    per_token, fixed = 0.0, 0.0
    for spec in specs:
        token_bytes = spec.page_size_bytes / spec.block_size
        window = getattr(spec, "sliding_window", None)
        if window is None:
            per_token += token_bytes
        else:
            fixed += token_bytes * window
    return per_token, round(fixed)


def score(questions: Sequence[Question], replies: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Counter]:
    """By task, and for "all": the questions asked, right answers, and replies with transformers' tokens.

    replies: `(text, token_ids)` in the order of the questions.
    """
    table: dict[str, Counter] = {}
    for question, (text, token_ids) in zip(questions, replies, strict=True):
        task = f"{question.task}, {'thinking' if question.thinking else 'no thinking'}"
        for key in (task, "all"):
            row = table.setdefault(key, Counter())
            row["asked"] += 1
            row["right"] += split_reply(text)[1] == question.answer
            row["identical"] += list(token_ids) == question.greedy_token_ids
    return {key: row for key, row in table.items() if key != "all"} | {"all": table["all"]}


def print_scores(table: Mapping[str, Counter]) -> None:
    print(f"\n{'':24}{'right':>10}  tokens identical to transformers (float32, greedy)")
    for key, row in table.items():
        asked = row["asked"]
        print(f"{key:24}{row['right']:>5}/{asked:<4}  {row['identical']}/{asked}")


def pick_shown(questions: Sequence[Question]) -> list[int]:
    """The indices of one question for each task and mode, in the file's order."""
    first: dict[tuple[str, bool], int] = {}
    for index, question in enumerate(questions):
        first.setdefault((question.task, question.thinking), index)
    return sorted(first.values())


def print_reply(question: str, text: str, note: str = "") -> None:
    thinking, answer = split_reply(text)
    print(f"\n  Q: {question}")
    if thinking:
        print(f"     thinks: {thinking}")
    print(f"  A: {answer}{note}")


def run_eval(llm: Any, questions: Sequence[Question]) -> None:
    """Answer all questions at once, greedily; the prompts are in V4's chat format."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    prompts = [
        {"prompt_token_ids": tokenizer.encode(question.prompt, add_special_tokens=False)} for question in questions
    ]
    limit = 2 * max(len(question.greedy_token_ids) for question in questions)
    started = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=limit), use_tqdm=False)
    seconds = time.perf_counter() - started
    replies = [(output.outputs[0].text, output.outputs[0].token_ids) for output in outputs]
    for index in pick_shown(questions):
        question, text = questions[index], replies[index][0]
        right = split_reply(text)[1] == question.answer
        print_reply(question.question, text, "" if right else f"   (wrong: {question.answer})")
    print_scores(score(questions, replies))
    print_speed(outputs, seconds)


def run_chat(llm: Any, count: int | None) -> None:
    """Ask a few general questions at once, with vLLM's chat template for V4."""
    from vllm import SamplingParams

    questions = CHAT_PROMPTS[:count]
    started = time.perf_counter()
    outputs = llm.chat(
        [[{"role": "user", "content": question}] for question in questions],
        SamplingParams(temperature=0.0, max_tokens=CHAT_MAX_TOKENS),
        use_tqdm=False,
    )
    seconds = time.perf_counter() - started
    for question, output in zip(questions, outputs, strict=True):
        print_reply(question, output.outputs[0].text)
    print_speed(outputs, seconds)


def print_speed(outputs: Sequence[Any], seconds: float) -> None:
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    print(
        f"\n{len(outputs)} prompts at once in {seconds:.1f} s: {generated / seconds:.0f} tokens/s generated "
        f"({generated} tokens, after {prompt} prompt tokens)"
    )


def describe_rows(config: DeepseekV4Config, vllm_config: Any) -> str:
    """How cached rows are stored, with `auto` resolved."""
    from vllm_deepseek_v4flash.kv_cache.formats import CacheFormats

    index_dtype = (vllm_config.additional_config or {}).get("index_cache_dtype", "auto")
    cache_dtype, dtype = vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype
    formats = CacheFormats.select(config, cache_dtype, index_dtype, dtype)
    names = {"e4m3": "fp8", "e2m1": "4-bit"}
    rows, index = (names.get(fmt.codec, dtype_name(fmt.dtype)) for fmt in (formats.rows, formats.index))
    return f"{rows} rows, {index} index rows"


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def print_engine(llm: Any, config: DeepseekV4Config) -> None:
    """Print the model's class and dtype, its layers and its cache."""
    model_class = llm.apply_model(lambda model: f"{type(model).__module__}.{type(model).__qualname__}")[0]
    per_token, fixed = cache_cost(llm.collective_rpc(layer_cache_specs)[0])
    rows = describe_rows(config, llm.llm_engine.vllm_config)
    print(f"  model     {model_class}, {dtype_name(llm.model_config.dtype)}")
    print(f"  layers    {describe_layers(config)}")
    print(f"  KV cache  {per_token:,.0f} bytes a token + {fixed / 1024:,.0f} KiB a sequence ({rows})")


def make_llm(options: argparse.Namespace) -> Any:
    """Start vLLM on the checkpoint."""
    # In one process, so that the model and the cache specs can be read.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    from vllm import LLM

    arguments = {"model": str(options.directory), "dtype": options.dtype, "use_tqdm_on_load": False}
    if options.kv_cache_memory_bytes is not None:
        arguments["kv_cache_memory_bytes"] = options.kv_cache_memory_bytes
    elif options.directory.resolve().parent == TOY.parent:
        # By default vLLM claims and clears half of the memory, which takes longer than everything else.
        arguments["kv_cache_memory_bytes"] = TOY_CACHE_BYTES
    if options.index_cache_dtype is not None:
        arguments["additional_config"] = {"index_cache_dtype": options.index_cache_dtype}
    if options.kv_cache_dtype is not None:
        arguments["kv_cache_dtype"] = options.kv_cache_dtype
    if options.max_model_len is not None:
        arguments["max_model_len"] = options.max_model_len
    try:
        return LLM(**arguments)
    except ValueError as error:
        raise DemoError(f"vLLM refused this checkpoint or these options: {error}") from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=TOY, help="a DeepSeek-V4 checkpoint")
    parser.add_argument("--dtype", default="auto", help="same as vLLM; auto: the checkpoint's own")
    parser.add_argument("--kv-cache-dtype", help="same as vLLM")
    parser.add_argument("--index-cache-dtype", help="the indexer's keys: fp8, fp4 or model")
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="same as vLLM; 1 GiB for the toys")
    parser.add_argument("--max-model-len", type=int, help="same as vLLM")
    parser.add_argument("--num-questions", type=int, help="ask the first this many questions (default: all)")
    options = parser.parse_args(arguments)
    if options.num_questions is not None and options.num_questions < 1:
        parser.error(f"--num-questions is {options.num_questions}; it must be at least 1")
    return options


def demo(options: argparse.Namespace) -> None:
    try:
        config = DeepseekV4Config.from_dict(read_config(options.directory))
    except ValueError as error:
        raise DemoError(f"{options.directory / 'config.json'}: {error}") from error
    questions = load_questions(options.directory, options.num_questions)
    print(f"Loading {options.directory} into vLLM (VLLM_LOGGING_LEVEL=INFO shows its log)", flush=True)
    started = time.perf_counter()
    llm = make_llm(options)
    print(f"  ready in  {time.perf_counter() - started:.1f} s")
    print_engine(llm, config)
    if questions:
        run_eval(llm, questions)
    else:
        run_chat(llm, options.num_questions)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        demo(options)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
