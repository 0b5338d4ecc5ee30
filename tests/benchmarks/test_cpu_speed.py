"""The CPU benchmark: how it attributes time and writes its tables, and a small real run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cpu_speed
from testing.tiny import CONFIGS, write_checkpoint
from vllm_deepseek_v4flash.ops import dispatch
from vllm_deepseek_v4flash.ops.rms_norm import rms_norm
from vllm_deepseek_v4flash.ops.swiglu import swiglu

ROOT = Path(__file__).parents[2]
REPORT = {
    "model": "toy", "dtype": "float32", "threads": 2, "clock": "wall", "cpu": "one", "torch": "2", "date": "today",
    "prompt": 64, "new_tokens": 128, "compile": {"first": 21.4, "later": 0.81},
    "transformers": {"1": 20.0, "16": 100.0}, "ours": {"1": 50.0, "16": 850.0}, "vllm": {"1": 700.0, "16": 9000.4},
    "steps": {"1024": 0.004, "32768": 0.005}, "prefill": {"1024": 5000.4, "32768": 1200.0},
    "profile": {"1 streams": {"vLLM": 0.25, "route": 0.004}, "16 streams": {"vLLM": 0.5, "route": 0.006}},
}  # fmt: skip


def test_tables():
    lines = cpu_speed.markdown(REPORT).splitlines()
    assert "| 1 | 50 | 20 | 2.5 |" in lines
    assert "| 16 | 850 | 100 | 8.5 |" in lines
    assert "| 1024 | 4.00 | 1.00 | 5000 |" in lines
    assert "| 32768 | 5.00 | 1.25 | 1200 |" in lines
    assert "| vLLM | 25 | 50 |" in lines
    assert any("computes nothing generates 700 and 9000 tokens/s." in line for line in lines)
    assert not any("route" in line for line in lines), "less than 1 % everywhere"
    assert any("21 s at the first start; reading them 0.8 s later." in line for line in lines)
    assert not any("at the first start" in line for line in cpu_speed.markdown(REPORT | {"compile": {}}).splitlines())


def test_wrong_options_are_named(tmp_path, capsys):
    (tmp_path / "no-mark.md").write_text("text\n")
    for options, message in (
        (["--clock", "process", "--threads", "2"], "Use --threads 1"),
        (["--write", str(tmp_path / "no-mark.md")], "there is no line <!-- written by benchmarks.cpu_speed -->"),
    ):
        with pytest.raises(SystemExit):
            cpu_speed.main(options)
        assert message in capsys.readouterr().err


class Model(nn.Module):
    """Takes 7 of a clock's ticks itself, 1 before, 2 between and 4 after two ops that take 10 and 100."""

    def forward(self, tick):
        tick(1)
        rms_norm(torch.zeros(1), None, 1.0)
        tick(2)
        swiglu(torch.zeros(1), torch.zeros(1), None)
        tick(4)


def test_time_is_attributed_to_the_innermost_op():
    now = [0.0]

    def tick(n):
        now[0] += n

    def slow_swiglu(gate, up, limit):
        tick(90)
        rms_norm(gate, None, 1.0)  # 10 of its own

    ops = {"rms_norm": lambda *arguments: tick(10), "swiglu": slow_swiglu}
    model = Model()
    with dispatch.wrap(lambda name, function: ops[name]):
        with cpu_speed.timed(model, lambda: now[0]) as seconds:
            model(tick)
        assert dict(seconds) == {"rms_norm": 20, "swiglu": 90, "model": 117}
        model(tick)
        assert dict(seconds) == {"rms_norm": 20, "swiglu": 90, "model": 117}, "the patches are gone"


def test_a_small_run(tmp_path):
    spec = CONFIGS["topk"]
    model, document = write_checkpoint(tmp_path / "model", spec), tmp_path / "speed.md"
    document.write_text(f"About.\n\n{cpu_speed.MARK}old tables\n")
    options = ["--streams", "1", "2", "--new-tokens", "3", "--contexts", "256", "512", "--threads", "1", "--no-compile"]
    # CPU time: a difference of wall-clock times could be negative on a busy machine.
    options += ["--clock", "process"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_speed", "--model", str(model), "--write", str(document), *options],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=2400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for part, keys in (
        ("ours", "12"),
        ("vllm", "12"),
        ("transformers", "12"),
        ("steps", ["256", "512"]),
        ("prefill", ["256", "512"]),
    ):
        assert list(report[part]) == list(keys)
        assert all(value > 0 for value in report[part].values())
    for shares in report["profile"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert {"mhc_post_pre", "merged_linear", "vLLM"} < shares.keys()
    assert "indexer_topk" in report["profile"]["step at 512"]
    written = document.read_text()
    assert written.startswith("About.\n")
    assert "| decode step" not in written.partition(cpu_speed.MARK)[0]
    assert "old tables" not in written
    assert cpu_speed.markdown(report) in written
