"""Answer a JSONL file of chat requests with vLLM's `LLM()`; a killed run continues where it stopped.

    python examples/offline_batch.py IN.jsonl OUT.jsonl [--model DIR] [--llm '{"tensor_parallel_size": 2}']

A line of IN.jsonl is one of OpenAI's batch requests:

    {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "14+36?"}], "reasoning_effort": "high"}}

Each line has its own `reasoning_effort`: "none" does not think; "low", "high" and "max" do, if the checkpoint has the
mode. A line of OUT.jsonl is one of OpenAI's batch results, in the order in which the requests finish; a tool call is in
its `content` as the model wrote it. Every result is on disk before the next step of the model, so a kill, a power cut
or a full disk loses only what was being written. The same command again answers what is missing.

The exit status is 0, 1 if some requests were refused (their `error` gives the reason), 2 if the run could not start or
not go on; then one sentence says why, and VLLM_LOGGING_LEVEL=DEBUG adds the traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from batch_files import SAMPLING, BatchError, Request, Results, describe, read_requests, result
from tqdm import tqdm

TOY = Path(__file__).resolve().parent / "toy"
TOY_ARGUMENTS = {"kv_cache_memory_bytes": 1 << 30}
# Requests in the engine at once: enough to keep it busy. Waiting requests take no KV cache.
IN_FLIGHT = 512


def make_prompt(tokenizer: Any, body: dict[str, Any]) -> list[int]:
    """The token ids of a conversation in its reasoning mode, the same as from `LLM().chat()` and the server."""
    json.dumps(body, ensure_ascii=False).encode()  # the tokenizer does not say that it dislikes a lone surrogate
    options = dict(body.get("chat_template_kwargs") or {})
    if body.get("reasoning_effort") is not None:
        options["reasoning_effort"] = body["reasoning_effort"]
    return tokenizer.apply_chat_template(body["messages"], tools=body.get("tools"), tokenize=True, **options)


def make_sampling(llm: Any, body: dict[str, Any]) -> Any:
    """The checkpoint's default sampling with the request's changes. Without max_tokens a reply may fill the context."""
    from vllm.sampling_params import RequestOutputKind

    sampling = llm.get_default_sampling_params()
    chosen = {key: body[key] for key in SAMPLING if body.get(key) is not None}
    chosen.setdefault("max_tokens", body.get("max_completion_tokens"))
    defaults = {key: getattr(sampling, key) for key in SAMPLING}
    return type(sampling)(**(defaults | chosen), output_kind=RequestOutputKind.FINAL_ONLY)


def answer(request: Request, output: Any, tokenizer: Any, model: str) -> dict[str, Any]:
    """A finished vLLM RequestOutput as a line of the result."""
    completion = output.outputs[0]
    message: dict[str, Any] = {"role": "assistant", "content": completion.text}
    if output.prompt_token_ids[-1] == tokenizer.convert_tokens_to_ids("<think>"):
        reasoning, closed, content = completion.text.partition("</think>")
        message |= {"reasoning": reasoning, "content": content if closed else None}
    prompt, reply = len(output.prompt_token_ids), len(completion.token_ids)
    body = {
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": completion.finish_reason}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": reply, "total_tokens": prompt + reply},
    }
    return result(request, response={"status_code": 200, "body": body}, error=None)


def refusal(request: Request, error: Exception) -> dict[str, Any]:
    # The text of other errors, such as a KeyError, says little without the type.
    message = str(error) if isinstance(error, ValueError) or "VLLM" in type(error).__name__ else describe(error)
    return result(request, response=None, error={"code": "invalid_request", "message": message})


class Engine:
    """vLLM's engine with the requests in it, under ids of its own: a custom_id may be any text."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.tokenizer = llm, llm.get_tokenizer()
        self.running: dict[str, Request] = {}
        self._added = 0

    def add(self, request: Request) -> Exception | None:
        """Start a request, or return why it cannot be answered; BatchError for a fault that is not of the request."""
        from vllm.exceptions import VLLMServerError

        try:
            token_ids = make_prompt(self.tokenizer, request.body)
            (prompt,) = self.llm.llm_engine.renderer.render_cmpl([{"prompt_token_ids": token_ids}])
            self._added += 1
            self.llm.llm_engine.add_request(str(self._added), prompt, make_sampling(self.llm, request.body))
        except (MemoryError, OSError, VLLMServerError) as error:
            self._fail(error, [request])
        except Exception as error:  # too long, an unknown mode or role, calls that the template cannot read
            return error
        self.running[str(self._added)] = request
        return None

    def step(self) -> Iterator[tuple[Request, Any]]:
        """One step of the model; the requests that it finished, with their outputs."""
        try:
            outputs = self.llm.llm_engine.step()
        except Exception as error:
            self._fail(error, list(self.running.values()))
        return ((self.running.pop(output.request_id), output) for output in outputs if output.finished)

    def _fail(self, error: Exception, requests: Sequence[Request]) -> NoReturn:
        some = ", ".join(repr(request.custom_id) for request in requests[:5])
        raise BatchError(
            f"the engine failed with {len(requests)} requests in it ({some}{', ...' * (len(requests) > 5)}): "
            f"{describe(error)}. Finished results are kept; the same command continues. If it fails again, leave out "
            "one of these requests."
        ) from error


def run(llm: Any, requests: Sequence[Request], results: Results, model: str) -> None:
    """Answer the requests without a result, at most IN_FLIGHT at once."""
    engine = Engine(llm)
    waiting = [request for request in reversed(requests) if request.custom_id not in results.ids]
    generated = failed = 0
    with tqdm(total=len(requests), initial=len(results.ids), unit="request", mininterval=1) as bar:
        while waiting or engine.running:
            rows = []
            while waiting and len(engine.running) < IN_FLIGHT:
                request = waiting.pop()
                error = engine.add(request)
                if error is not None:
                    rows.append(refusal(request, error))
            if rows:  # before a step that may fail
                results.add(rows)
                bar.update(len(rows))
            rows = []
            for request, output in engine.step() if engine.running else ():
                if output.outputs[0].finish_reason in ("abort", "error"):
                    failed += 1  # inside the engine, and vLLM says that it may be tried again
                    continue
                rows.append(answer(request, output, engine.tokenizer, model))
                generated += len(output.outputs[0].token_ids)
            if rows:
                results.add(rows)
                bar.update(len(rows))
                bar.set_postfix_str(f"{generated / max(bar.format_dict['elapsed'], 1e-3):.0f} tokens/s")
    if failed:
        raise BatchError(f"the engine gave up {failed} requests: the same command tries them again")


def make_llm(options: argparse.Namespace) -> Any:
    # An engine in its own process would outlive a killed run and keep the memory that the next run needs.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    arguments = {"model": str(options.model), "use_tqdm_on_load": False}
    try:
        from vllm import LLM

        if options.model.resolve() == TOY:
            arguments |= TOY_ARGUMENTS
        return LLM(**(arguments | options.llm))
    except Exception as error:
        raise BatchError(f"the engine did not start: {describe(error)}") from error


def llm_arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{value!r} must be a JSON object such as '{{\"max_model_len\": 65536}}'")
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("input", type=Path, help="JSONL of OpenAI batch requests")
    parser.add_argument("output", type=Path, help="JSONL of their results; created, or continued")
    parser.add_argument("--model", type=Path, default=TOY, help="a checkpoint directory (default: the toy)")
    parser.add_argument("--llm", type=llm_arguments, default={}, help="further arguments of vllm.LLM, as a JSON object")
    return parser.parse_args(arguments)


def say(text: str, stream: TextIO) -> None:
    """Print a line; characters that the stream cannot encode, such as those of a file's name, become escapes."""
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def batch(options: argparse.Namespace) -> int:
    requests = read_requests(options.input)
    results = Results(options.output, options.input)
    try:
        results.check(requests)
        before = len(results.ids)
        if before:
            say(f"{before} of {len(requests)} requests have their results in {options.output}", sys.stdout)
        if before < len(requests):
            run(make_llm(options), requests, results, options.model.name)
        say(f"{len(requests) - results.refused} answered, {results.refused} refused: {options.output}", sys.stdout)
        return 1 if results.refused else 0
    finally:
        results.close()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return batch(options)
    except KeyboardInterrupt:
        status, message = 130, "\ninterrupted: the same command continues from here"
    except BatchError as error:
        status, message = 2, f"error: {error}"
        if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            message = f"{traceback.format_exc()}{message}"
    except OSError as error:  # of the messages and the progress bar: other files' are BatchErrors
        status, message = 2, f"error: the progress cannot be shown: {error}. {options.output} has the finished results."
    with suppress(OSError):  # of a full disk or a closed pipe; the exit status remains
        say(message, sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
