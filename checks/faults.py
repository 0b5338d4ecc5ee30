"""Signals to the processes of a `vllm serve` that is at work, and what its clients and its log must see of it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import openai

from testing.client import FAILURE_TIMEOUT, REQUEST_TIMEOUT, STOP_TIMEOUT, ask, client_of, wait_for_prompts
from testing.server import FRONT_END, Server

FAULT_PROMPT = (0, 5, 6)
FAULT_TOKENS = 320
CLIENTS = 8
# vLLM gives the other workers 5 seconds, and 5 more after a SIGTERM; on a busy machine processes take long to end.
END_TIMEOUT = 240


@dataclass
class Ending:
    """How a server under load ended. replies: the clients by how their last requests ended.

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


async def end_under_load(server: Server, number: signal.Signals, victim: str, until_it_fails: bool) -> Ending:
    """Send a signal to one process of a server that works on requests of CLIENTS clients, and watch all of it end.

    Half of the clients stream. The signal is sent when every client's first request has begun.

    Args:
        until_it_fails: a client that gets an answer asks again, so that at the signal, however late, each has a request
            under way; else each asks once.
    """
    family = server.processes()
    replies: Counter[str] = Counter()

    async def work(client: openai.AsyncOpenAI, begun: asyncio.Event | None) -> None:
        try:
            await ask(client, FAULT_PROMPT, FAULT_TOKENS, begun is not None, begun)
            while until_it_fails:
                await ask(client, FAULT_PROMPT, FAULT_TOKENS, begun is not None)
            replies["answered"] += 1
        except openai.APIError as error:
            replies[type(error).__name__] += 1
        except AssertionError as error:
            replies[f"cut short: {error}"] += 1
        finally:
            if begun is not None:
                begun.set()

    begun = [asyncio.Event() for _ in range(CLIENTS // 2)]
    prompts = server.metrics()["vllm:prompt_tokens_total"] + len(FAULT_PROMPT) * (CLIENTS - len(begun))
    async with client_of(server) as client, asyncio.TaskGroup() as running:
        for _ in range(CLIENTS - len(begun)):
            running.create_task(work(client, None))
        # A request that arrives together with a SIGTERM may be dropped, which is not what is tested here.
        await wait_for_prompts(server, prompts)
        for event in begun:
            running.create_task(work(client, event))
        async with asyncio.timeout(REQUEST_TIMEOUT):
            for event in begun:
                await event.wait()
        started = time.monotonic()
        family[victim].send_signal(number)
    replied = time.monotonic() - started
    status = await asyncio.to_thread(server.wait_until_gone, list(family.values()), STOP_TIMEOUT)
    ending = Ending(status, replied, time.monotonic() - started, replies)
    if server.healthy():
        ending.failures.append("the server has ended, and something answers on its port")
    return ending


async def kill_under_load(server: Server, victim: str) -> Ending:
    """kill -9 of one process: every request fails within FAILURE_TIMEOUT, and the server ends with status 1."""
    ending = await end_under_load(server, signal.SIGKILL, victim, until_it_fails=True)
    if ending.replies.total() != CLIENTS or any(kind.startswith("cut short") for kind in ending.replies):
        ending.failures.append(f"requests did not fail: {dict(ending.replies)}")
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
    ending = await end_under_load(server, signal.SIGTERM, FRONT_END, until_it_fails=False)
    if ending.status:
        ending.failures.append(f"the exit status is {ending.status}")
    if ending.replies != Counter(answered=CLIENTS):
        ending.failures.append(f"not every running request was finished: {dict(ending.replies)}")
    return ending
