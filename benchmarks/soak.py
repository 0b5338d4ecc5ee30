"""Thousands of mixed requests to one `vllm serve`, every answer checked, and then the faults.

    python -m benchmarks.soak [DIR] [--minutes 10] [--clients 24] [--tensor-parallel-size 2] [--no-faults]

Clients ask for random numbers of tokens after prompts of random lengths, many of which share a beginning; half of
them stream, a fifth hang up before the end, and the cache holds only a few prompts. What is checked:

- every answer is the one that the same request had alone, with nothing cached;
- requests were preempted, and prefixes found in the cache, so that the first check means something;
- the resident memory of each process is flat after the warm-up;
- afterwards no KV block is in use, and the answers are still the same;
- kill -9 of the engine core, and of a worker, under load: every request fails at once, the log says why, no process
  is left, and a restart serves; SIGTERM under load: running requests end, and the exit status is 0.

Prints one JSON object. The exit status is 1 where a check failed, which `failures` then names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from benchmarks.server import FRONT_END, Server

TOY = Path(__file__).resolve().parent.parent / "examples" / "toy"
# vLLM finds a prefix in the cache by whole multiples of this many tokens (the toy's ratio-128 pages).
CACHED_STEP = 256
MAX_PROMPT = 2 * CACHED_STEP + 128
MAX_MODEL_LEN = 1024
# 1,100 tokens of the toy: two of the longest prompts do not fit at once, and decoding requests preempt each other.
CACHE_MIB = 34
OPTIONS = (
    "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16",
    "--max-num-batched-tokens", "256",
)  # fmt: skip
# oneDNN keeps the code of 1024 matmuls, one for each shape and 70 KiB each, by default: the growth of a worker's first
# hour on a CPU. Kept to few, that ends within the warm-up, and what grows after it is a leak.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
ANSWER_TOKENS = 64
# In logprobs. The order of fp32 sums, which changes with the batch, moves a logprob by some 1e-5 (tests/scheduler);
# an answer is compared up to the first token that was not chosen more clearly than this.
CLEAR = 1e-3
ON_ITS_WAY = 1.0  # seconds in which an answer that was ready may still reach a client of a killed server
ABORTED_SHARE, LONG_SHARE, STREAMED_SHARE = 0.2, 0.3, 0.5
# Of aborted and of long requests: enough to need further blocks while they decode, when there are none.
LONG_TOKENS = 160
FAULT_PROMPT = (0, 5, 6)
# Seconds. A step of this model takes 0.02, so that a request which takes this long hangs.
REQUEST_TIMEOUT = 300
FAILURE_TIMEOUT = 30
STOP_TIMEOUT = 120
SAMPLE_SECONDS = 0.5
# One cause has many effects; the first ones tell it.
MAX_FAILURES = 20
# Bytes by which a process may grow after the warm-up: a leak of 12 KiB a request, as of its token ids and parameters,
# over the 1,350 requests between the two measurements of a 10-minute run. There a worker's heap moved by 4 MiB.
GROWTH = 16 << 20


@dataclass(frozen=True)
class Question:
    """A prompt, and the greedy tokens that follow it when it is asked alone, as far as each was a clear choice."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass
class Report:
    """What a soak saw. memory: resident bytes of each process, as `Sampler.stop` gives them."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    blocks_in_use: float = 0.0
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"counts": dict(self.counts), "seconds": round(self.seconds, 1)}


def client_of(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.api, api_key="unused", timeout=REQUEST_TIMEOUT, max_retries=0)


def make_prompts(count: int, seed: int, vocab_size: int = 264) -> list[tuple[int, ...]]:
    """Random prompts without special tokens: 6 of 10 short ones, and 4 that begin with one of two shared texts."""
    draw = random.Random(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocab_size) for _ in range(length))

    stems = [(0, *ids(CACHED_STEP - 1)), (0, *ids(2 * CACHED_STEP - 1))]
    prompts = []
    for number in range(count):
        if number % 10 < 6:
            prompts.append((0, *ids(draw.randrange(CACHED_STEP // 2))))
        else:
            prompts.append(stems[number % 10 == 9] + ids(draw.randint(1, MAX_PROMPT - 2 * CACHED_STEP)))
    return prompts


async def ask(client: openai.AsyncOpenAI, prompt: Sequence[int], tokens: int, stream: bool = False) -> list[int]:
    """Greedily `tokens` token ids after `prompt`; AssertionError where the reply is not of that form."""
    options: dict[str, Any] = {
        "model": Server.NAME, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0.0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }  # fmt: skip
    found: list[int] = []
    if stream:
        reason = None
        async with await client.completions.create(stream=True, **options) as chunks:
            async for chunk in chunks:
                found += getattr(chunk.choices[0], "token_ids", None) or ()
                reason = chunk.choices[0].finish_reason or reason
    else:
        reply = await client.completions.create(**options)
        found, reason = list(reply.choices[0].token_ids), reply.choices[0].finish_reason  # type: ignore[attr-defined]
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(prompt), reply.usage
    assert (len(found), reason) == (tokens, "length"), f"{len(found)} of {tokens} tokens, finished by {reason!r}"
    return found


async def ask_alone(client: openai.AsyncOpenAI, prompt: tuple[int, ...], tokens: int, salt: str) -> Question:
    """The reference for `prompt`; `salt` must be one that no request had before, so that nothing is cached."""
    reply = await client.completions.create(
        model=Server.NAME, prompt=list(prompt), max_tokens=tokens, temperature=0.0, logprobs=2,
        extra_body={
            "ignore_eos": True, "return_token_ids": True, "cache_salt": salt, "return_tokens_as_token_ids": True,
        },
    )  # fmt: skip
    (choice,) = reply.choices
    assert choice.logprobs is not None
    assert choice.logprobs.top_logprobs is not None
    margins = []
    for row in choice.logprobs.top_logprobs:
        best, second = sorted(row.values(), reverse=True)[:2]
        margins.append(best - second)
    clear = list(itertools.takewhile(lambda margin: margin > CLEAR, margins))
    return Question(prompt, tuple(choice.token_ids[: len(clear)]))  # type: ignore[attr-defined]


async def ask_each_alone(server: Server, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[Question]:
    """One after another. Prompts whose first token already hangs on rounding are left out."""
    async with client_of(server) as client:
        found = [await ask_alone(client, prompt, tokens, f"alone {time.time_ns()}") for prompt in prompts]
    questions = [question for question in found if question.answer]
    assert 2 * len(questions) > len(prompts), "most of these prompts have no clear answer: use other weights"
    return questions


class Sampler(threading.Thread):
    """Resident bytes of every process of `server`, every SAMPLE_SECONDS until `stop`."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._processes = server.processes()
        self._done = threading.Event()
        self.samples: dict[str, list[int]] = {name: [] for name in self._processes}

    def run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            for name, process in self._processes.items():
                self.samples[name].append(process.memory_info().rss)

    def stop(self) -> dict[str, dict[str, int]]:
        """What each process never fell below, in the sixth of the time after a warm-up of a third, and in the last one.

        In the warm-up caches fill, and the pages of the KV cache are touched for the first time. The floor, because
        a step's own tensors come and go.
        """
        self._done.set()
        self.join()
        found = {}
        for name, samples in self.samples.items():
            sixth = max(1, len(samples) // 6)
            after, end = samples[2 * sixth : 3 * sixth], samples[-sixth:]
            found[name] = {"after warm-up": min(after), "at the end": min(end), "at most": max(samples)}
        return found


async def load(server: Server, questions: Sequence[Question], seconds: float, clients: int, report: Report) -> None:
    """`clients` at once ask random questions until `seconds` are over; wrong answers become failures."""
    until = time.monotonic() + seconds

    async def one(client: openai.AsyncOpenAI, draw: random.Random) -> None:
        question, stream = draw.choice(questions), draw.random() < STREAMED_SHARE
        hang_up = draw.random() < ABORTED_SHARE
        tokens = draw.randint(1, len(question.answer))
        if hang_up or draw.random() < LONG_SHARE:
            tokens = LONG_TOKENS
        try:
            async with asyncio.timeout(draw.uniform(0, 3) if hang_up else None):
                found = await ask(client, question.prompt, tokens, stream)
        except TimeoutError:
            report.counts["aborted"] += 1
            return
        except (openai.APIError, AssertionError) as error:
            report.failures.append(f"a request failed: {error!r} {error.__cause__!r}")
            return
        length = min(len(found), len(question.answer))
        report.counts["answered"] += 1
        report.counts["tokens"] += tokens
        if tuple(found[:length]) != question.answer[:length]:
            report.failures.append(
                f"a prompt of {len(question.prompt)} tokens was answered {found[:length]}, "
                f"and alone {list(question.answer[:length])}"
            )

    async def work(seed: int) -> None:
        draw = random.Random(seed)
        async with client_of(server) as client:
            while time.monotonic() < until and len(report.failures) < MAX_FAILURES:
                await one(client, draw)

    await asyncio.gather(*[work(seed) for seed in range(clients)])


async def all_blocks_free(server: Server, seconds: float = FAILURE_TIMEOUT) -> float:
    """The share of KV blocks in use once nothing runs: 0.0, or what is still held after `seconds`.

    vLLM sets the gauge at the end of a step, so that after aborts it takes one more request to see it.
    """
    deadline = time.monotonic() + seconds
    async with client_of(server) as client:
        while True:
            await ask(client, (0, 5), 1)
            metrics = await asyncio.to_thread(server.metrics)
            used = metrics["vllm:kv_cache_usage_perc"]
            idle = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"] == 0
            if (idle and used == 0) or time.monotonic() > deadline:
                return used
            await asyncio.sleep(0.2)


async def still_the_same(server: Server, questions: Sequence[Question], report: Report, when: str) -> None:
    """Ask again, one after another."""
    async with client_of(server) as client:
        for question in questions:
            found = await ask(client, question.prompt, len(question.answer))
            if tuple(found) != question.answer:
                report.failures.append(f"{when}, a prompt of {len(question.prompt)} tokens is answered {found}")


async def soak(server: Server, questions: Sequence[Question], seconds: float, clients: int) -> Report:
    """The load and all checks of it on a running server."""
    report, before = Report(), server.metrics()
    sampler = Sampler(server)
    sampler.start()
    started = time.monotonic()
    await load(server, questions, seconds, clients, report)
    report.seconds = time.monotonic() - started
    report.memory = sampler.stop()
    report.blocks_in_use = await all_blocks_free(server)
    after = server.metrics()
    report.preemptions = int(after["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"])
    report.prefix_hit_tokens = int(after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"])
    await still_the_same(server, questions[:10], report, "after the load")
    judge(report)
    return report


def judge(report: Report) -> None:
    """Add what the numbers of `report` say to its failures."""
    for name, memory in report.memory.items():
        growth = memory["at the end"] - memory["after warm-up"]
        if growth > GROWTH:
            report.failures.append(f"{name} grew by {growth / 2**20:.1f} MiB, more than {GROWTH >> 20}")
    if report.blocks_in_use:
        report.failures.append(f"{report.blocks_in_use:.1%} of the KV blocks are in use though nothing runs")
    for what, seen in (
        ("request was answered", report.counts["answered"]),
        ("request was aborted", report.counts["aborted"]),
        ("request was preempted", report.preemptions),
        ("prefix was found in the cache", report.prefix_hit_tokens),
    ):
        if not seen:
            report.failures.append(f"no {what}: this load did not test what it should")


@dataclass
class Ending:
    """How a server under load ended. replies: how many of its running requests, by their ends."""

    status: int
    seconds: float
    replies: Counter[str]
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"replies": dict(self.replies), "seconds": round(self.seconds, 1)}


async def end_under_load(
    server: Server, number: signal.Signals, victim: str = FRONT_END, tokens: int = LONG_TOKENS, clients: int = 8
) -> Ending:
    """Send a signal to one process of a server with running and waiting requests, and watch all of it end."""
    family = server.processes()
    replies: Counter[str] = Counter()
    started = float("inf")

    async def request(client: openai.AsyncOpenAI, stream: bool) -> None:
        try:
            await ask(client, FAULT_PROMPT, tokens, stream)
            early = time.monotonic() < started + ON_ITS_WAY
            replies["answered before it could matter" if early else "answered"] += 1
        except openai.APIError as error:
            replies[type(error).__name__] += 1
        except AssertionError as error:
            replies[f"cut short: {error}"] += 1

    async with client_of(server) as client:
        running = [asyncio.create_task(request(client, stream)) for stream in (True, False) * (clients // 2)]
        while (await asyncio.to_thread(server.metrics))["vllm:num_requests_running"] == 0:
            await asyncio.sleep(0.1)
        started = time.monotonic()
        family[victim].send_signal(number)
        await asyncio.wait_for(asyncio.gather(*running), STOP_TIMEOUT)
    status = await asyncio.to_thread(server.wait_until_gone, list(family.values()), STOP_TIMEOUT)
    ending = Ending(status, time.monotonic() - started, replies)
    if server.healthy():
        ending.failures.append("the server has ended, and something answers on its port")
    return ending


async def kill_under_load(server: Server, victim: str) -> Ending:
    """kill -9 of one process: every request fails within FAILURE_TIMEOUT, and the server says so and ends."""
    # As many tokens as there can be: a request that ends before the kill says nothing.
    ending = await end_under_load(server, signal.SIGKILL, victim, MAX_MODEL_LEN - len(FAULT_PROMPT))
    finished = sum(count for kind, count in ending.replies.items() if kind.startswith("answered before"))
    wrong = ending.replies["answered"] or any(kind.startswith("cut short") for kind in ending.replies)
    if wrong or finished == ending.replies.total():
        ending.failures.append(f"requests ended as if nothing had happened: {dict(ending.replies)}")
    if ending.seconds > FAILURE_TIMEOUT:
        ending.failures.append(f"it took {ending.seconds:.0f} s until the server had ended")
    if "EngineDeadError" not in server.output():
        ending.failures.append("the log does not say that the engine is dead")
    return ending


async def terminate_under_load(server: Server) -> Ending:
    """SIGTERM to a server that was given a --shutdown-timeout: what runs is finished, and the exit status is 0."""
    ending = await end_under_load(server, signal.SIGTERM)
    if ending.status:
        ending.failures.append(f"the exit status is {ending.status}")
    if {kind.partition(" ")[0] for kind in ending.replies} != {"answered"}:
        ending.failures.append(f"not every running request was finished: {dict(ending.replies)}")
    return ending


def vllm_options(
    tensor: int = 1, pipeline: int = 1, cache_mib: int = CACHE_MIB, stop_seconds: int = STOP_TIMEOUT // 2
) -> tuple[str, ...]:
    """Arguments of `vllm serve`; `stop_seconds` is what SIGTERM leaves to running requests."""
    sizes = {"tensor": tensor, "pipeline": pipeline}
    parallel = [f"--{name}-parallel-size={size}" for name, size in sizes.items() if size > 1]
    cache = f"--kv-cache-memory-bytes={cache_mib << 20}"
    return (*OPTIONS, cache, f"--shutdown-timeout={stop_seconds}", *parallel)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The soak, and then the faults, each on the server that was started after the one before."""
    arguments = vllm_options(options.tensor_parallel_size, options.pipeline_parallel_size, options.cache_mib)
    result: dict[str, Any] = {"model": str(options.model), "options": arguments}
    failures: list[str] = []
    numbers = itertools.count(1)

    def note(what: str, outcome: Report | Ending) -> None:
        result[what] = outcome.as_json()
        failures.extend(f"{what}: {failure}" for failure in outcome.failures)

    with contextlib.ExitStack() as servers:

        def start() -> Server:
            log = options.logs / f"server_{next(numbers)}.log"
            server = servers.enter_context(Server(options.model, log, arguments, ENVIRONMENT))
            server.wait_until_healthy()
            return server

        server = start()
        questions = asyncio.run(ask_each_alone(server, make_prompts(options.prompts, options.seed), ANSWER_TOKENS))
        note("soak", asyncio.run(soak(server, questions, 60 * options.minutes, options.clients)))
        if options.faults:
            for victim in sorted(set(server.processes()) - {FRONT_END}):
                note(f"kill -9 {victim}", asyncio.run(kill_under_load(server, victim)))
                server = start()
                again = Report()
                asyncio.run(still_the_same(server, questions[:5], again, "after a restart"))
                failures.extend(again.failures)
            note("SIGTERM", asyncio.run(terminate_under_load(server)))
    return result | {"failures": failures}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=TOY, help="a checkpoint directory (default: the toy)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the load lasts")
    parser.add_argument("--clients", type=int, default=24, help="how many ask at once")
    parser.add_argument("--prompts", type=int, default=80, help="how many different prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-mib", type=int, default=CACHE_MIB, help="KV cache, for some 1,100 tokens of the model")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--no-faults", dest="faults", action="store_false", help="end after the load")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this directory")
    options = parser.parse_args(arguments)
    for name in ("minutes", "clients", "prompts", "tensor_parallel_size", "pipeline_parallel_size", "cache_mib"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be above 0")
    with tempfile.TemporaryDirectory() as scratch:
        options.logs = options.logs or Path(scratch)
        options.logs.mkdir(parents=True, exist_ok=True)
        result = run(options)
    print(json.dumps(result, indent=1))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
