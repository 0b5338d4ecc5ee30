"""Parts that a test makes up: modules of this name stand in for those of `checks.gpu_check`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from checks.gpu_check.results import FailedError, NotRunError, Recorder


def good(recorder: Recorder) -> None:
    recorder.attempt("one", lambda: "found it")
    table = recorder.table("Times", ["what", "ms"])
    table.rows.append(["a step", recorder.figure(12.345, ".2f")])


def bad(recorder: Recorder) -> None:
    def wrong() -> str:
        raise FailedError("3 is not 4")

    recorder.attempt("wrong", wrong)
    recorder.attempt("right", lambda: "still tried")


def hanging(recorder: Recorder) -> None:
    recorder.attempt("first", lambda: "")
    # A grandchild, as vLLM's engines are: it must not outlive the part.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["GRANDCHILD"]).write_text(str(child.pid))

    def forever() -> str:
        time.sleep(600)
        return ""

    recorder.attempt("forever", forever)


def crashing(recorder: Recorder) -> None:
    recorder.attempt("first", lambda: "")
    print("about to fall")
    raise RuntimeError("fell over")


def dying(recorder: Recorder) -> None:
    recorder.attempt("abort", os.abort)


def impossible(recorder: Recorder) -> None:
    raise NotRunError("no such kernels here")


def slow(recorder: Recorder) -> None:
    recorder.attempt("needs too long", lambda: "", needs=1e6)
    recorder.attempt("fits", lambda: "")
