"""examples/serve_and_ask.py on the toy: it starts a server, asks in each mode, and leaves no process running."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "serve_and_ask.py"
TIMEOUT = 2400  # seconds; a start takes 25 on idle cores


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In its own session, so that processes that it leaves running can be found."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        pytest.fail(f"not done after {TIMEOUT} s:\n{output}\n{errors}")
    left = [other for other in psutil.process_iter() if is_of_session(other, process.pid)]
    _, alive = psutil.wait_procs(left, timeout=TIMEOUT)
    assert alive == []
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def is_of_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session
    except ProcessLookupError:  # ended since it was listed
        return False


def test_it_serves_and_asks_in_every_mode() -> None:
    done = run("--question", "Reverse yysoha", "--", "--dtype", "float32", "--max-model-len", "1024")
    assert done.returncode == 0, done.stderr[-4000:]
    parts = done.stdout.split("\n\n")
    assert [part.splitlines()[0] for part in parts[1:4]] == [f"[{m}] Reverse yysoha" for m in ("none", "high", "max")]
    none, high = (part.splitlines()[1:] for part in parts[1:3])
    assert none == ["  ahosyy"]
    assert high == ["  thinks: y y s o h a", "  ahosyy"]
    assert parts[-1] == "stopped\n"


def test_a_server_that_does_not_start_is_shown(tmp_path: Path) -> None:
    example = runpy.run_path(str(SCRIPT), run_name="serve_and_ask")
    log = tmp_path / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", "print('no such checkpoint'); exit(3)"], stdout=stream)
    with pytest.raises(example["ServeError"], match=r"ended with status 3:\nno such checkpoint"):
        # No server listens on this port.
        example["wait_until_healthy"](process, "http://127.0.0.1:9/health", log)


def test_options_of_vllm_serve_need_the_dashes() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dtype", "float32"],
        capture_output=True, text=True, check=False, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "unrecognized arguments: --dtype" in done.stderr
