import json
import math
import types
from typing import Any

import pytest
import torch

from benchmarks import report, roofline
from benchmarks.report import Peaks, Report, Row
from benchmarks.roofline import Aim, Bench, Case, Peer, UnavailableError, Work, WrongResultError
from vllm_deepseek_v4flash.ops.rms_norm import rms_norm

GPU = Bench(torch.device("cpu"), dry=False, l2_bytes=50 << 20, memory_bytes=80 << 30)
DRY = Bench(torch.device("cpu"), dry=True)
PEAKS = Peaks(copy_gb_per_s=3000.0, matmul_tflop_per_s=800.0)


def case(name="op", work=None, error=None, size=3_000_000, flops=0, aims=()):
    def build(bench):
        if error is not None:
            raise error
        return work or Work([lambda: None], lambda: "equal")

    return Case(name, "shape", size, flops, build, aims)


def a_report(peaks=PEAKS):
    return Report("Title", {"device": "made up"}, peaks)


@pytest.fixture
def timed(monkeypatch):
    """Calls are as long as the microseconds that they return; synchronising does nothing."""
    monkeypatch.setattr(roofline, "time_us", lambda calls: calls[0]())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def run(cases, bench=GPU, budget=None, clock=lambda: 0.0, written=None):
    found = a_report()
    roofline.run(cases, bench, found, budget=budget, write=(lambda: None) if written is None else written, clock=clock)
    return found


@pytest.mark.parametrize(
    ("size", "flops", "bound_by", "percent", "bandwidth"),
    [
        # 3 GB/ms and 800 GFLOP/ms: 2 us of bytes, 1 us of operations, in 4 us.
        (6_000_000, 800_000_000, "bandwidth", 50, 50),
        # 1 us of bytes, 3 us of operations.
        (3_000_000, 2_400_000_000, "matmul", 75, 25),
    ],
)
def test_shares_are_of_what_bounds_the_case(size, flops, bound_by, percent, bandwidth):
    row = Row("op", "shape", size, flops, us=4.0)
    roofline.fill_rates(row, PEAKS)
    assert row.bound_by == bound_by
    assert row.percent == pytest.approx(percent)
    assert row.bandwidth_percent == pytest.approx(bandwidth)
    assert row.gb_per_s == pytest.approx(size / 4.0 / 1000)
    assert row.tflop_per_s == pytest.approx(flops / 4.0 / 1e6)


def test_copies_outgrow_the_l2():
    assert [GPU.copies(size) for size in (1, 1 << 20, 60 << 20, 1 << 30)] == [roofline.MOST_COPIES, 200, 4, 1]
    assert DRY.copies(1 << 30) == 2


def test_samples_hold_the_first_and_the_last():
    assert roofline.sampled(3) == [0, 1, 2]
    assert roofline.sampled(8192) == [0, 1170, 2340, 3510, 4680, 5850, 7020, 8191]


def test_compare_finds_one_wrong_row():
    expected = torch.ones(5, 4)
    near = expected.clone()
    near[3, 0] += 0.02  # 0.01 of the row's length
    assert roofline.compare("x", near, expected, 0.0101) == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(WrongResultError, match=r"x is off by 1\.00e-02 of a row, allowed are 9\.90e-03"):
        roofline.compare("x", near, expected, 0.0099)
    near[3, 0] = math.nan
    with pytest.raises(WrongResultError, match="off by inf"):
        roofline.compare("x", near, expected, 1.0)
    with pytest.raises(WrongResultError, match=r"x is \(4, 4\), the reference \(5, 4\)"):
        roofline.compare("x", near[:4], expected, 1.0)


class FakeCuda:
    """Streams, events and graphs that only keep account. `ms`: what each call takes."""

    def __init__(self, monkeypatch, ms):
        self.now, self.ms, self.graph, self.replays = 0.0, ms, None, 0
        self.recorded: list[int] = []
        names = {
            "Stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: types.SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: self, "Event": lambda enable_timing: FakeEvent(self),
            "synchronize": lambda: None, "CUDAGraph": lambda: self, "graph": lambda graph: Recording(self),
        }  # fmt: skip
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def call(self, number):
        if isinstance(self.graph, list):
            self.graph.append(number)
        else:
            self.now += self.ms

    def replay(self):
        self.replays += 1
        # The first replay is slow, as when memory is touched first.
        self.now += self.ms * len(self.recorded) * (10 if self.replays == 1 else 1)


class Recording:
    def __init__(self, cuda):
        self.cuda = cuda

    def __enter__(self):
        self.cuda.graph = []

    def __exit__(self, *_):
        self.cuda.recorded, self.cuda.graph = self.cuda.graph, None


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def test_time_is_that_of_one_call_in_a_graph_of_all_copies(monkeypatch):
    cuda = FakeCuda(monkeypatch, ms=0.5)
    calls = [lambda n=n: cuda.call(n) for n in range(3)]
    assert roofline.time_us(calls) == pytest.approx(500)
    # 1.5 ms for all three: four rounds to fill a replay, each copy in turn.
    assert cuda.recorded == [0, 1, 2] * math.ceil(roofline.REPLAY_MS / 1.5)
    assert cuda.replays == roofline.WARM_REPLAYS + roofline.REPLAYS


def test_rows_have_ratio_and_aims(timed):
    peers = [
        Peer("slow", lambda: Work([lambda: 9.0], lambda: "")),
        Peer("fast", lambda: Work([lambda: 6.0], lambda: "")),
        Peer("absent", lambda: unavailable("no such kernel")),
    ]
    work = Work([lambda: 4.0], lambda: "1e-3 of 2e-3", peers, note="shared")
    aims = [
        Aim("under 3 µs", lambda row: row.us is not None and row.us < 3),
        Aim("level", lambda row: row.ratio is not None and row.ratio >= 1),
        Aim("?", lambda _: None),
    ]
    found = run([case(work=work, aims=aims)])
    (row,) = found.rows
    assert (row.us, row.peer, row.peer_us, row.ratio) == (4.0, "fast", 6.0, 1.5)
    assert row.peers_not_run == ["absent: no such kernel"]
    assert row.aims == ["under 3 µs: missed", "level: met"]
    assert (row.checked, row.note) == ("1e-3 of 2e-3", "shared")
    text = found.as_markdown()
    line = next(line for line in text.splitlines() if line.startswith("| op "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "op", "shape", "4.00", "750", "0.0", "25 (bandwidth)", "fast", "6.00", "1.50",
        "under 3 µs: missed; level: met", "1e-3 of 2e-3",
    ]  # fmt: skip
    assert "- absent: no such kernel — op (shape)" in text
    assert "- measured copy bandwidth: 3000 GB/s" in text


def unavailable(reason):
    raise UnavailableError(reason)


def wrong(reason):
    raise WrongResultError(reason)


def test_a_peer_that_is_wrong_or_raises_is_not_timed(timed):
    peers = [
        Peer("wrong", lambda: Work([lambda: 1.0], lambda: wrong("off by 1"))),
        Peer("raises", lambda: Work([lambda: 1.0], lambda: str(torch.zeros(2) @ torch.zeros(3)))),
    ]
    found = run([case(work=Work([lambda: 4.0], lambda: "", peers))])
    (row,) = found.rows
    assert (row.us, row.peer, row.ratio, found.failures) == (4.0, "", None, [])
    assert row.peers_not_run[0] == "wrong: not timed, its result is wrong: off by 1"
    assert row.peers_not_run[1].startswith("raises: raised RuntimeError: ")


def test_what_is_wrong_is_not_timed_and_fails(timed, capsys):
    late = Work([lambda: pytest.fail("timed")], lambda: wrong("the result is off"))
    cases = [case("bad", late), case("broken", error=ValueError("no")), case("absent", error=UnavailableError("why"))]
    found = run([*cases, case("good", Work([lambda: 2.0], lambda: ""))])
    assert found.failures == ["bad (shape): the result is off", "broken (shape): ValueError: no"]
    assert [row.reason for row in found.rows] == [
        "FAILED: the result is off", "FAILED: ValueError: no", "not run: why", ""
    ]  # fmt: skip
    assert [row.us for row in found.rows] == [None, None, None, 2.0]
    assert "- FAILED: bad (shape): the result is off" in found.as_markdown()
    assert "ValueError: no" in capsys.readouterr().err


def test_nothing_runs_on_a_lost_device(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: unavailable_device())
    found = run([case("bad", error=RuntimeError("CUDA error: illegal access")), case("next")])
    assert found.rows[1].reason == "not run: the device is lost since bad (shape): CUDA error: again"


def unavailable_device():
    raise RuntimeError("CUDA error: again\nmore")


def test_a_peer_that_loses_the_device_leaves_the_time_of_ours(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: unavailable_device())
    peer = Peer("bad", lambda: Work([lambda: 1.0], lambda: str(torch.zeros(2) @ torch.zeros(3))))
    found = run([case(work=Work([lambda: 4.0], lambda: "", [peer])), case("next")])
    assert found.rows[0].us == 4.0
    assert found.failures == ["op (shape): RuntimeError: CUDA error: again"]
    assert "the device is lost" in found.rows[1].reason


def test_a_case_that_may_outlast_the_budget_is_not_started(timed):
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock, written = Clock(), []

    def build(bench):
        clock.now += 4.0
        return Work([lambda: 1.0], lambda: "")

    cases = [Case(name, "shape", 1, 0, build) for name in "abcd"]
    found = run(cases, budget=10.0, clock=clock, written=lambda: written.append(1))
    # At 8 s a third case of 4 s would end at 12.
    assert [row.us for row in found.rows] == [1.0, 1.0, None, None]
    assert found.rows[3].reason == "not run: the budget of 10 s is spent"
    assert found.failures == []
    assert len(written) == 4


def test_inputs_that_stay_in_the_l2_are_noted(timed):
    calls = [lambda: 1.0] * roofline.MOST_COPIES
    small, large = (run([case(work=Work(calls, lambda: ""), size=size)]).rows[0] for size in (1000, 1 << 20))
    assert small.note == "its inputs stay in the L2, as between layers"
    assert large.note == ""


def test_main_writes_both_reports_and_fails_where_a_case_does(tmp_path, capsys):
    def cases(dry):
        assert dry
        return [case("good"), case("bad", Work([lambda: None], lambda: wrong("off")))]

    options: dict[str, Any] = {"name": "made-up", "title": "Made up", "cases": cases}
    assert roofline.main(["--dry-run", "--out", str(tmp_path), "--commit", "abc"], **options) == 1
    assert "FAILED: bad (shape): off" in capsys.readouterr().err
    found = json.loads((tmp_path / "made-up.json").read_text())
    assert found["device"]["commit"] == "abc"
    assert set(found["device"]) == {"device", "torch", "triton", "vllm", "commit", "date"}
    assert [row["reason"] for row in found["rows"]] == ["dry run: not timed", "FAILED: off"]
    assert (tmp_path / "made-up.md").read_text().startswith("# Made up\n")
    assert roofline.main(["--dry-run", "--only", "good"], **options) == 0


def test_main_refuses_what_it_cannot_do(capsys, monkeypatch):
    options: dict[str, Any] = {"name": "x", "title": "X", "cases": lambda dry: [case("a"), case("b")]}
    with pytest.raises(SystemExit) as ended:
        roofline.main(["--dry-run", "--only", "c"], **options)
    assert ended.value.code == 2
    assert "--only c: there is no such kernel. Use: a, b" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        roofline.main([], **options)
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_report_says_what_could_not_be_found_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = report._nvidia_smi("GPU-1")
    assert set(found) == set(report._SMI)
    assert all(value.startswith("unknown: ") for value in found.values())
    assert report.git_commit().startswith("unknown: ")


def test_a_kernel_is_compared_with_the_reference():
    kernel, reference = roofline.kernel_and_reference("rms_norm")
    assert kernel.__module__.endswith("ops.triton.rms_norm")
    assert reference is rms_norm.reference
