"""Thousands of mixed requests to one `vllm serve`, every answer checked, and then faults.

    python -m checks.soak [DIR] [--minutes 10] [--clients 24] [--tensor-parallel-size 2] [--no-faults]

Clients ask for random numbers of tokens after prompts of random lengths, many with a shared beginning. Half of them
stream, a fifth hang up before the end, three in ten have a seed and up to three choices, priorities differ, and the
cache holds only a few prompts. Checked are:

- every answer is the one that the same request had alone, with nothing cached;
- requests were preempted, and prefixes found in the cache, so that the first check means something;
- the resident memory of each process is flat after the warm-up;
- afterwards no KV block is in use, and the answers are still the same;
- kill -9 of the engine core, and of a worker, under load: every request fails at once, the log gives the cause, no
  process is left, the exit status is 1 (by our middleware FailWithEngine), and a restarted server answers; SIGTERM
  under load: running requests finish, and the exit status is 0.

Prints one JSON object. The exit status is 1 if a check failed; `failures` lists them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from checks.faults import Ending, kill_under_load, terminate_under_load
from testing.client import (
    CACHE_MIB,
    ENVIRONMENT,
    Question,
    Sampling,
    all_blocks_free,
    ask,
    ask_choices,
    ask_each_alone,
    client_of,
    make_prompts,
    vllm_options,
)
from testing.server import FRONT_END, Server

TOY = Path(__file__).resolve().parent.parent / "examples" / "toy"
ANSWER_TOKENS = 64
ABORTED_SHARE, LONG_SHARE, STREAMED_SHARE, SEEDED_SHARE = 0.2, 0.3, 0.5, 0.3
MAX_CHOICES, PRIORITIES = 3, 3
# Of aborted and of long requests: enough that they need further blocks while they decode and none are free.
LONG_TOKENS = 160
# The load ends after this many failures.
MAX_FAILURES = 20
# Bytes by which a process may grow after the warm-up. A leak of a request's token ids and parameters, 12 KiB, reaches
# this in the 1,350 requests between the two measurements of a 10-minute run. A worker's heap moved by 4 MiB in one.
GROWTH = 16 << 20


@dataclass(frozen=True)
class Length:
    """How long a load lasts: for some seconds or, independent of the machine's speed, for a number of requests."""

    seconds: float = math.inf
    requests: float = math.inf


@dataclass
class Report:
    """What a soak saw. memory: resident bytes of each process, from `Load.memory`."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    blocks_in_use: float = 0.0
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"counts": dict(self.counts), "seconds": round(self.seconds, 1)}


def draw_sampling(draw: random.Random) -> Sampling:
    """How one request of the load samples."""
    priority = draw.randrange(PRIORITIES)
    if draw.random() >= SEEDED_SHARE:
        return Sampling(priority=priority)
    return Sampling(draw.randint(1, MAX_CHOICES), draw.getrandbits(32), priority)


class Load:
    """Random questions of several clients at once; wrong answers become failures of `report`."""

    def __init__(self, server: Server, questions: Sequence[Question], length: Length, report: Report) -> None:
        self.server, self.questions, self.length, self.report = server, questions, length, report
        self.started, self.asked, self.ended = time.monotonic(), 0, 0
        self._processes = server.processes()
        self._samples: list[tuple[float, dict[str, int]]] = []

    async def run(self, clients: int) -> None:
        await asyncio.gather(*[self._work(seed) for seed in range(clients)])
        self.report.seconds = time.monotonic() - self.started

    def share(self, requests: int) -> float:
        """How much of the load is done after so many requests, from 0 to 1."""
        return max((time.monotonic() - self.started) / self.length.seconds, requests / self.length.requests)

    async def _work(self, seed: int) -> None:
        """One client. Its first request is a long one: on a slow machine these alone preempt each other."""
        draw, first = random.Random(seed), True
        async with client_of(self.server) as client:
            while first or (self.share(self.asked) < 1 and len(self.report.failures) < MAX_FAILURES):
                self.asked += 1
                await self._ask(client, draw, first)
                self.ended += 1
                self._sample()
                first = False

    async def _ask(self, client: openai.AsyncOpenAI, draw: random.Random, first: bool) -> None:
        question, stream = draw.choice(self.questions), draw.random() < STREAMED_SHARE
        hang_up = not first and draw.random() < ABORTED_SHARE
        tokens = draw.randint(1, len(question.answer))
        if hang_up or first or draw.random() < LONG_SHARE:
            tokens = LONG_TOKENS
        sampling = draw_sampling(draw)
        begun = asyncio.Event()
        request = asyncio.create_task(ask_choices(client, question.prompt, tokens, sampling, stream, begun))
        try:
            if hang_up and await self._hung_up(request, begun if stream else None, draw.uniform(0, 3)):
                self.report.counts["aborted"] += 1
                return
            found = await request
        except (openai.APIError, AssertionError) as error:
            self.report.failures.append(f"a request failed: {error!r} {error.__cause__!r}")
            return
        self.report.counts["answered"] += 1
        self.report.counts["with a seed"] += sampling.seed is not None
        self.report.counts["with several choices"] += sampling.choices > 1
        self.report.counts["tokens"] += tokens * sampling.choices
        for ids in found:
            self._compare(question, ids)

    def _compare(self, question: Question, ids: Sequence[int]) -> None:
        length = min(len(ids), len(question.answer))
        if tuple(ids[:length]) != question.answer[:length]:
            self.report.failures.append(
                f"a prompt of {len(question.prompt)} tokens was answered {list(ids[:length])}, "
                f"and alone {list(question.answer[:length])}"
            )

    async def _hung_up(
        self, request: asyncio.Task[list[list[int]]], begun: asyncio.Event | None, seconds: float
    ) -> bool:
        """Leave a stream at its first token, and another request after some seconds; False if it has ended by then."""
        leave = asyncio.create_task(begun.wait() if begun else asyncio.sleep(seconds))
        await asyncio.wait((request, leave), return_when=asyncio.FIRST_COMPLETED)
        leave.cancel()
        if request.done():
            return False
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        return True

    def _sample(self) -> None:
        sizes = {name: process.memory_info().rss for name, process in self._processes.items()}
        self._samples.append((self.share(self.ended), sizes))

    def memory(self) -> dict[str, dict[str, int]]:
        """The least of each process in the sixth of the load after a warm-up of a third, and in the last sixth.

        In the warm-up caches fill, and the pages of the KV cache are touched for the first time. The least, because
        the tensors of a step come and go. Empty if no request ended within one of these.
        """
        after = [sizes for share, sizes in self._samples if 1 / 3 <= share < 1 / 2]
        end = [sizes for share, sizes in self._samples if share >= 5 / 6]
        if not after or not end:
            return {}
        return {
            name: {
                "after warm-up": min(sizes[name] for sizes in after),
                "at the end": min(sizes[name] for sizes in end),
                "at most": max(sizes[name] for _, sizes in self._samples),
            }
            for name in self._processes
        }


async def still_the_same(server: Server, questions: Sequence[Question], report: Report, when: str) -> None:
    """Ask again, one after another."""
    async with client_of(server) as client:
        for question in questions:
            found = await ask(client, question.prompt, len(question.answer))
            if tuple(found) != question.answer:
                report.failures.append(f"{when}, a prompt of {len(question.prompt)} tokens is answered {found}")


async def soak(server: Server, questions: Sequence[Question], length: Length, clients: int) -> Report:
    """The load and all checks of it on a running server."""
    report, before = Report(), server.metrics()
    load = Load(server, questions, length, report)
    await load.run(clients)
    report.memory = load.memory()
    if not report.memory:
        report.failures.append(f"the load of {report.seconds:.0f} s is too short to compare the processes' memory")
    report.blocks_in_use = await all_blocks_free(server)
    after = server.metrics()
    report.preemptions = int(after["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"])
    report.prefix_hit_tokens = int(after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"])
    await still_the_same(server, questions[:10], report, "after the load")
    judge(report)
    return report


def judge(report: Report) -> None:
    """Add to the failures of `report` what is wrong with its numbers."""
    for name, memory in report.memory.items():
        growth = memory["at the end"] - memory["after warm-up"]
        if growth > GROWTH:
            report.failures.append(f"{name} grew by {growth / 2**20:.1f} MiB, more than {GROWTH >> 20}")
    if report.blocks_in_use:
        report.failures.append(f"{report.blocks_in_use:.1%} of the KV blocks are in use though nothing runs")
    for what, seen in (
        ("request was answered", report.counts["answered"]),
        ("request was aborted", report.counts["aborted"]),
        ("request with a seed was answered", report.counts["with a seed"]),
        ("request with several choices was answered", report.counts["with several choices"]),
        ("request was preempted", report.preemptions),
        ("prefix was found in the cache", report.prefix_hit_tokens),
    ):
        if not seen:
            report.failures.append(f"no {what}: this load was too light to test anything")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The soak, and then the faults, each on a new server."""
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
        note("soak", asyncio.run(soak(server, questions, Length(seconds=60 * options.minutes), options.clients)))
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
