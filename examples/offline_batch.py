"""Answer a JSONL file of chat requests with vLLM's `LLM()`; a killed run continues where it stopped.

    python examples/offline_batch.py IN.jsonl OUT.jsonl [--model DIR] [--llm '{"tensor_parallel_size": 2}']

A line of IN.jsonl is one of OpenAI's batch requests:

    {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "14+36?"}], "reasoning_effort": "high"}}

Each line has its own `reasoning_effort`: "none" does not think; "low", "high" and "max" do, if the checkpoint has the
mode. A line of OUT.jsonl is one of OpenAI's batch results, in the order in which the requests finish; a tool call is in
its `content` as the model wrote it. Every result is on disk before the next step of the model, so a kill or a power cut
loses only what was being written. The same command again answers what is missing.

The exit status is 0, 1 if some requests were refused (their `error` gives the reason), 2 if nothing could run.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

TOY = Path(__file__).resolve().parent / "toy"
TOY_ARGUMENTS = {"kv_cache_memory_bytes": 1 << 30}
# Requests in the engine at once: enough to keep it busy. Waiting requests take no KV cache.
IN_FLIGHT = 512
URL = "/v1/chat/completions"
LINE_KEYS = ("custom_id", "method", "url", "body")
CHAT_KEYS = ("messages", "tools", "reasoning_effort", "chat_template_kwargs")
SAMPLING_KEYS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "thinking_token_budget",
)  # fmt: skip
# `model` is accepted, but --model decides. `max_completion_tokens` is OpenAI's newer name of `max_tokens`.
BODY_KEYS = ("model", "max_completion_tokens", *CHAT_KEYS, *SAMPLING_KEYS)


class BatchError(Exception):
    """An error that is shown to the user without a traceback."""


@dataclass(frozen=True)
class Request:
    """One line of the input."""

    custom_id: str
    body: dict[str, Any]

    @property
    def id(self) -> str:
        """The id of the result, which depends on the body: another body with the same custom_id has another id."""
        return f"batch_req_{hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()[:16]}"


def read_requests(path: Path) -> list[Request]:
    """All lines of the input; BatchError with the first line that is not a request."""
    try:
        # Not splitlines, which also splits at characters that JSON text may contain.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path} cannot be read: {error}") from error
    requests: dict[str, Request] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = parse_request(line)
            if request.custom_id in requests:
                raise ValueError(f"custom_id {request.custom_id!r} was there before: each must be used once")
        except ValueError as error:
            raise BatchError(f"{path}, line {number}: {error}") from error
        requests[request.custom_id] = request
    return list(requests.values())


def parse_request(line: str) -> Request:
    """The request of one line; ValueError with what is wrong and what is allowed."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"the line is {type(row).__name__}, and must be an object with {', '.join(LINE_KEYS)}")
    custom_id, body = row.get("custom_id"), row.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id is {custom_id!r}, and must be a text that is not empty")
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ValueError("body must be an object with a list of messages that is not empty")
    if row.get("url", URL) != URL:
        raise ValueError(f"url is {row['url']!r}; only {URL} is answered")
    unknown = sorted([*row.keys() - set(LINE_KEYS), *(f"body.{key}" for key in body.keys() - set(BODY_KEYS))])
    if unknown:
        raise ValueError(f"{', '.join(unknown)} would be ignored; allowed in body: {', '.join(BODY_KEYS)}")
    return Request(custom_id, body)


class Results:
    """The output file: a whole line for each finished request and nothing else, whenever the run ends.

    A line counts when its line break is on disk. Opening the file cuts off what follows the last line break, which a
    killed run was writing. Two runs cannot have the same file open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise BatchError(f"{path} cannot be written: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise BatchError(f"another run is writing {path}: wait for it, or give another output file") from None
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)
        # The file's name must be on disk, too.
        sync_directory(path.resolve().parent)
        self.ids: dict[str, str] = {}
        self.refused = 0
        self._read(content[:whole])

    def _read(self, content: bytes) -> None:
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                self._count(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise BatchError(
                    f"{self.path}, line {number} is no result of this program ({error!r}): give another output file"
                ) from error

    def _count(self, row: dict[str, Any]) -> None:
        self.ids[row["custom_id"]] = row["id"]
        self.refused += row["error"] is not None

    def check(self, requests: Sequence[Request]) -> None:
        """BatchError if the file has a result of other requests than these."""
        expected = {request.custom_id: request.id for request in requests}
        for custom_id, found in self.ids.items():
            if expected.get(custom_id) != found:
                what = "whose body was another one" if custom_id in expected else "which the input does not have"
                raise BatchError(
                    f"{self.path} has a result of custom_id {custom_id!r}, {what}: give another output file"
                )

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; returns when they are on disk."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        for row in rows:
            self._count(row)

    def close(self) -> None:
        os.close(self._file)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_prompt(tokenizer: Any, body: dict[str, Any]) -> list[int]:
    """The token ids of a conversation in its reasoning mode, the same as from `LLM().chat()` and the server."""
    options = dict(body.get("chat_template_kwargs") or {})
    if body.get("reasoning_effort") is not None:
        options["reasoning_effort"] = body["reasoning_effort"]
    return tokenizer.apply_chat_template(body["messages"], tools=body.get("tools"), tokenize=True, **options)


def make_sampling(llm: Any, body: dict[str, Any]) -> Any:
    """The checkpoint's default sampling with the request's changes. Without max_tokens a reply may fill the context."""
    from vllm.sampling_params import RequestOutputKind

    sampling = llm.get_default_sampling_params()
    chosen = {key: body[key] for key in SAMPLING_KEYS if body.get(key) is not None}
    chosen.setdefault("max_tokens", body.get("max_completion_tokens"))
    defaults = {key: getattr(sampling, key) for key in SAMPLING_KEYS}
    return type(sampling)(**(defaults | chosen), output_kind=RequestOutputKind.FINAL_ONLY)


def answer(request: Request, output: Any, tokenizer: Any, model: str) -> dict[str, Any]:
    """A finished vLLM RequestOutput as a line of the result."""
    completion = output.outputs[0]
    message: dict[str, Any] = {"role": "assistant", "content": completion.text}
    if output.prompt_token_ids[-1] == tokenizer.convert_tokens_to_ids("<think>"):
        reasoning, closed, content = completion.text.partition("</think>")
        message |= {"reasoning": reasoning, "content": content if closed else None}
    prompt, reply = len(output.prompt_token_ids), len(completion.token_ids)
    return {
        "id": request.id,
        "custom_id": request.custom_id,
        "response": {
            "status_code": 200,
            "body": {
                "object": "chat.completion",
                "model": model,
                "choices": [{"index": 0, "message": message, "finish_reason": completion.finish_reason}],
                "usage": {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply},
            },
        },
        "error": None,
    }


def refusal(request: Request, error: Exception) -> dict[str, Any]:
    reason = {"code": "invalid_request", "message": str(error)}
    return {"id": request.id, "custom_id": request.custom_id, "response": None, "error": reason}


def run(llm: Any, requests: Sequence[Request], results: Results, model: str) -> None:
    """Answer the requests without a result, at most IN_FLIGHT at once."""
    from vllm.exceptions import VLLMClientError

    tokenizer, engine = llm.get_tokenizer(), llm.llm_engine
    waiting = iter([request for request in requests if request.custom_id not in results.ids])
    running: dict[str, Request] = {}
    generated = 0
    with tqdm(total=len(requests), initial=len(results.ids), unit="request", mininterval=1) as bar:
        exhausted = False
        while running or not exhausted:
            rows = []
            while len(running) < IN_FLIGHT and not exhausted:
                request = next(waiting, None)
                if request is None:
                    exhausted = True
                    break
                try:
                    token_ids = make_prompt(tokenizer, request.body)
                    (prompt,) = engine.renderer.render_cmpl([{"prompt_token_ids": token_ids}])
                    engine.add_request(request.custom_id, prompt, make_sampling(llm, request.body))
                except (VLLMClientError, ValueError, TypeError) as error:  # too long, an unknown mode or role
                    rows.append(refusal(request, error))
                else:
                    running[request.custom_id] = request
            for output in engine.step() if running else ():
                if output.finished:
                    rows.append(answer(running.pop(output.request_id), output, tokenizer, model))
                    generated += len(output.outputs[0].token_ids)
            if rows:
                results.add(rows)
                bar.update(len(rows))
                bar.set_postfix_str(f"{generated / bar.format_dict['elapsed']:.0f} tokens/s")


def make_llm(options: argparse.Namespace) -> Any:
    # An engine in its own process would outlive a killed run and keep the memory that the next run needs.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    arguments = {"model": str(options.model), "use_tqdm_on_load": False}
    if options.model.resolve() == TOY:
        arguments |= TOY_ARGUMENTS
    return LLM(**(arguments | options.llm))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("input", type=Path, help="JSONL of OpenAI batch requests")
    parser.add_argument("output", type=Path, help="JSONL of their results; created, or continued")
    parser.add_argument("--model", type=Path, default=TOY, help="a checkpoint directory (default: the toy)")
    parser.add_argument("--llm", type=json.loads, default={}, help="further arguments of vllm.LLM, as a JSON object")
    options = parser.parse_args(arguments)
    if not isinstance(options.llm, dict):
        parser.error(f"--llm is {options.llm!r}; it must be a JSON object such as '{{\"max_model_len\": 65536}}'")
    return options


def batch(options: argparse.Namespace) -> int:
    requests = read_requests(options.input)
    results = Results(options.output)
    try:
        results.check(requests)
        before = len(results.ids)
        if before:
            print(f"{before} of {len(requests)} requests have their results in {options.output}", flush=True)
        if before < len(requests):
            run(make_llm(options), requests, results, options.model.name)
        print(f"{len(requests) - results.refused} answered, {results.refused} refused: {options.output}")
        return 1 if results.refused else 0
    finally:
        results.close()


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return batch(parse(arguments))
    except BatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
