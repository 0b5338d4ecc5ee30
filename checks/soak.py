"""Thousands of mixed requests to one `vllm serve`, every answer checked, and then the faults.

    python -m checks.soak [DIR] [--minutes 10] [--clients 24] [--tensor-parallel-size 2] [--no-faults]

Clients ask for random numbers of tokens after prompts of random lengths, many of which share a beginning; half of
them stream, a fifth hang up before the end, and the cache holds only a few prompts. What is checked:

- every answer is the one that the same request had alone, with nothing cached;
- requests were preempted, and prefixes found in the cache, so that the first check means something;
- the resident memory of each process is flat after the warm-up;
- afterwards no KV block is in use, and the answers are still the same;
- kill -9 of the engine core, and of a worker, under load: every request fails at once, the log says why, no process
  is left, the exit status is 1 (by our middleware FailWithEngine), and a restart serves; SIGTERM under load: running
  requests end, and the exit status is 0.

Prints one JSON object. The exit status is 1 where a check failed, which `failures` then names.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
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

from checks.faults import Ending, kill_under_load, terminate_under_load
from testing.client import (
    CACHE_MIB,
    ENVIRONMENT,
    Question,
    all_blocks_free,
    ask,
    ask_each_alone,
    client_of,
    make_prompts,
    vllm_options,
)
from testing.server import FRONT_END, Server

TOY = Path(__file__).resolve().parent.parent / "examples" / "toy"
ANSWER_TOKENS = 64
ABORTED_SHARE, LONG_SHARE, STREAMED_SHARE = 0.2, 0.3, 0.5
# Of aborted and of long requests: enough to need further blocks while they decode, when there are none.
LONG_TOKENS = 160
SAMPLE_SECONDS = 0.5
# One cause has many effects; the first ones tell it.
MAX_FAILURES = 20
# Bytes by which a process may grow after the warm-up: a leak of 12 KiB a request, as of its token ids and parameters,
# over the 1,350 requests between the two measurements of a 10-minute run. There a worker's heap moved by 4 MiB.
GROWTH = 16 << 20


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
    """`clients` at once ask random questions until `seconds` are over; wrong answers become failures.

    All begin with a long one: a machine too slow to preempt anything later has done so then.
    """
    until = time.monotonic() + seconds

    async def one(client: openai.AsyncOpenAI, draw: random.Random, first: bool) -> None:
        question, stream = draw.choice(questions), draw.random() < STREAMED_SHARE
        hang_up = not first and draw.random() < ABORTED_SHARE
        tokens = draw.randint(1, len(question.answer))
        if hang_up or first or draw.random() < LONG_SHARE:
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
            await one(client, draw, first=True)
            while time.monotonic() < until and len(report.failures) < MAX_FAILURES:
                await one(client, draw, first=False)

    await asyncio.gather(*[work(seed) for seed in range(clients)])


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
