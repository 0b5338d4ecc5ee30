"""Signals to the processes of a `vllm serve` that is at work, and what its clients and its log must see of it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import openai

from testing.client import FAILURE_TIMEOUT, MAX_MODEL_LEN, STOP_TIMEOUT, ask, client_of
from testing.server import FRONT_END, Server

FAULT_PROMPT = (0, 5, 6)
# A request that is finished after a SIGTERM: long enough to be under way when it comes.
LAST_TOKENS = 320
# vLLM gives the other workers 5 seconds, and 5 more after a SIGTERM; on a busy machine processes take long to end.
END_TIMEOUT = 60
ON_ITS_WAY = 1.0  # seconds in which an answer that was ready may still reach a client of a killed server


@dataclass
class Ending:
    """How a server under load ended. replies: how many of its running requests, by their ends.

    replied, seconds: from the signal to the last of these, and to the end of the last process.
    """

    status: int
    replied: float
    seconds: float
    replies: Counter[str]
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        times = {"replied": round(self.replied, 1), "seconds": round(self.seconds, 1)}
        return vars(self) | {"replies": dict(self.replies)} | times


async def end_under_load(
    server: Server, number: signal.Signals, victim: str = FRONT_END, tokens: int = LAST_TOKENS, clients: int = 8
) -> Ending:
    """Send a signal to one process of a server with running and waiting requests, and watch all of it end."""
    family = server.processes()
    replies: Counter[str] = Counter()
    started = float("inf")

    async def request(client: openai.AsyncOpenAI, begun: asyncio.Event | None) -> None:
        try:
            await ask(client, FAULT_PROMPT, tokens, begun is not None, begun)
            early = time.monotonic() < started + ON_ITS_WAY
            replies["answered before it could matter" if early else "answered"] += 1
        except openai.APIError as error:
            replies[type(error).__name__] += 1
        except AssertionError as error:
            replies[f"cut short: {error}"] += 1

    async with client_of(server) as client:
        # Streams come last, so that once all of them run the others do. Not by /metrics: on a busy machine all of these
        # may have ended before it is read. A request that comes with a SIGTERM may be dropped, and says nothing here.
        begun = [asyncio.Event() for _ in range(clients // 2)]
        running = [asyncio.create_task(request(client, event)) for event in [None] * (clients // 2) + begun]
        await asyncio.wait_for(asyncio.gather(*[event.wait() for event in begun]), FAILURE_TIMEOUT)
        started = time.monotonic()
        family[victim].send_signal(number)
        await asyncio.wait_for(asyncio.gather(*running), STOP_TIMEOUT)
        replied = time.monotonic() - started
    status = await asyncio.to_thread(server.wait_until_gone, list(family.values()), STOP_TIMEOUT)
    ending = Ending(status, replied, time.monotonic() - started, replies)
    if server.healthy():
        ending.failures.append("the server has ended, and something answers on its port")
    return ending


async def kill_under_load(server: Server, victim: str) -> Ending:
    """kill -9 of one process: every request fails within FAILURE_TIMEOUT, and the server says so and ends with 1."""
    # As many tokens as there can be: a request that ends before the kill says nothing.
    ending = await end_under_load(server, signal.SIGKILL, victim, MAX_MODEL_LEN - len(FAULT_PROMPT))
    finished = sum(count for kind, count in ending.replies.items() if kind.startswith("answered before"))
    wrong = ending.replies["answered"] or any(kind.startswith("cut short") for kind in ending.replies)
    if wrong or finished == ending.replies.total():
        ending.failures.append(f"requests ended as if nothing had happened: {dict(ending.replies)}")
    if ending.replied > FAILURE_TIMEOUT:
        ending.failures.append(f"it took {ending.replied:.0f} s until the last request had failed")
    if ending.seconds > END_TIMEOUT:
        ending.failures.append(f"it took {ending.seconds:.0f} s until the server had ended")
    if ending.status != 1:
        ending.failures.append(f"the exit status is {ending.status}, with --middleware FailWithEngine")
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
