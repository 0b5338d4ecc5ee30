"""A worker that dies and a SIGTERM, both while requests run: no request hangs, no process is left, a restart serves."""

from __future__ import annotations

import asyncio

from benchmarks.server import FRONT_END
from benchmarks.soak import Question, Report, kill_under_load, still_the_same, terminate_under_load
from tests.serving.conftest import Servers


def test_a_killed_worker_ends_the_server_and_a_restart_serves(servers: Servers, questions: list[Question]) -> None:
    """The exit status is not looked at: stock vLLM 0.32 ends with 0 here (docs/operations.md)."""
    server = servers.get()
    (worker,) = [name for name in server.processes() if name not in (FRONT_END, "EngineCore")]
    ending = asyncio.run(kill_under_load(server, worker))
    assert ending.failures == []
    assert sum(ending.replies.values()) == 8
    assert "died unexpectedly (exit code: -9)" in server.output()
    again = Report()
    asyncio.run(still_the_same(servers.get(), questions[:5], again, "after a restart"))
    assert again.failures == []


def test_sigterm_lets_running_requests_finish(servers: Servers) -> None:
    """With --shutdown-timeout, which this server has; `terminate_under_load` says what must hold."""
    ending = asyncio.run(terminate_under_load(servers.get()))
    assert ending.failures == []
