"""Every kernel compiles for every supported GPU within its bounds, and the tool that says so can say otherwise.

The tool runs in processes of its own, because this one interprets kernels. Its second run is of `MADE_UP`, kernels that
break one bound each and one that breaks none.
"""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import vllm_deepseek_v4flash.ops.triton as kernels
from benchmarks.flash_cases import CASES, Case
from checks import compile_report, compile_table, cuda_usage
from checks.compile_report import ARCHS, Row, Usage, violations
from vllm_deepseek_v4flash.ops.triton.launch import launch

ROOT = Path(__file__).parents[2]
FILES = sorted(p.stem for p in Path(kernels.__file__).parent.glob("*.py") if re.search(r"\blaunch\(", p.read_text()))


@triton.jit
def _modest(x, out, count):
    n = tl.arange(0, 128)
    if count is None:
        tl.store(out + n, tl.load(x + n))
    else:
        tl.store(out + n, tl.load(x + n, mask=n < count, other=0.0), mask=n < count)


@triton.jit
def _spilling(x, out, N: tl.constexpr):
    n = tl.arange(0, N)
    values = tl.load(x + n)
    # All values wait for the sum: far more than one warp has registers for.
    tl.store(out + n, values / tl.sum(values))


@triton.jit
def _sprawling(x, out, count, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.zeros((N, N), tl.float32)
    for step in range(count):
        at = x + step * N * K
        total = tl.dot(tl.load(at + m * K + k[None, :]), tl.load(at + k[:, None] * N + n), total)
    tl.store(out + m * N + n, total)


@triton.jit
def _modern(x, out):
    n = tl.arange(0, 128)
    tl.store(out + n, tl.load(x + n).to(tl.float8e4nv).to(tl.uint8, bitcast=True))


def floats(count):
    return torch.empty(count, device="meta")


def halves(count):
    return torch.empty(count, device="meta", dtype=torch.bfloat16)


def modest(count):
    launch(_modest, (1,), floats(128), floats(128), count)


MADE_UP = [
    *(Case("modest", {"count": count}, partial(modest, count)) for count in (1, 5, 7, 16, 32)),
    Case("modest", {"count": "5, misaligned"}, lambda: launch(_modest, (1,), floats(129)[1:], floats(128), 5)),
    Case("wide", {}, lambda: launch(_modest, (1, 65536), floats(128), floats(128), None)),
    Case("spilling", {}, lambda: launch(_spilling, (1,), floats(1 << 14), floats(1 << 14), N=1 << 14, num_warps=1)),
    Case(
        "sprawling", {},
        lambda: launch(_sprawling, (1,), halves(1 << 20), floats(1 << 14), 8, N=128, K=256, num_warps=8, num_stages=4),
    ),
    Case("modern", {}, lambda: launch(_modern, (1,), floats(128), torch.empty(128, device="meta", dtype=torch.uint8))),
]  # fmt: skip


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def kernels_in(table):
    """(kernel, configuration) of every line of a printed or written table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "|" in line]
    return {(cells[0], cells[1]) for cells in lines if len(cells) > 4 and cells[0].strip("- ") not in ("", "kernel")}


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    output = tmp_path_factory.mktemp("table") / "table.md"
    return run("-m", "checks.compile_table", "--common", "--output", str(output)), output


@pytest.fixture(scope="module")
def made_up():
    code = f"import sys; from {__name__} import *; sys.exit(compile_table.main(sys.argv[1:], MADE_UP))"
    return run("-c", code, "--arch", "80", "90", "120")


def test_every_kernel_fits_every_gpu(flash):
    result, _ = flash
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_every_configuration_fits_every_gpu():
    """Also other dtypes than bf16, more ranks, other batches: a quarter of an hour where nothing is cached."""
    result = run("-m", "checks.compile_table")
    assert result.returncode == 0, result.stderr


def test_every_file_with_a_kernel_is_in_the_table(flash):
    result, output = flash
    assert "launch" in FILES  # the file that defines it is no kernel
    printed = {kernel.partition(":")[0] for kernel, _ in kernels_in(result.stdout)}
    own = {f"csrc/{source.stem}" for source in cuda_usage.SOURCES} if cuda_usage.nvcc() else set()
    assert printed == (set(FILES) - {"launch"}) | own
    assert kernels_in(output.read_text()) == kernels_in(result.stdout)


def test_the_table_in_the_docs_has_every_kernel(flash):
    """Registers depend on the version of Triton; the kernels do not."""
    written = (ROOT / "docs" / "compile-table.md").read_text()
    result, _ = flash
    missing = {kernel for kernel, _ in kernels_in(result.stdout)} - {kernel for kernel, _ in kernels_in(written)}
    assert not missing, "docs/compile-table.md is out of date: run make compile-table"


@pytest.mark.parametrize(
    ("kernel", "archs", "what"),
    [
        ("spilling", (80, 90, 120), r"spills \d+ bytes per thread"),
        ("sprawling", (80, 90, 120), r"needs \d+ bytes of shared memory, there are \d+"),
        ("modern", (80,), r"does not compile: .*fp8e4nv"),
        ("modest", (80, 90, 120), r"the grid \(1, 65536\) .* is larger"),
    ],
)
def test_a_broken_bound_is_reported(made_up, kernel, archs, what):
    assert made_up.returncode == 1
    for arch in (80, 90, 120):
        reports = re.findall(rf"^sm_{arch}, test_compile_table: {kernel} \([^\n]*", made_up.stderr, re.M)
        assert len(reports) == (arch in archs), made_up.stderr
        assert all(re.search(what, report) for report in reports), reports


def test_launches_are_specialised_as_triton_would(made_up):
    """1 becomes a constant, multiples of 16 and misaligned pointers are kernels of their own."""
    counts = {configuration for kernel, configuration in kernels_in(made_up.stdout) if kernel.endswith(": modest")}
    assert counts == {"count 1", "count 5/7", "count 16/32", "count 5, misaligned", "op wide"}


@pytest.mark.parametrize(("arch", "kilobytes"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_bounds(arch, kilobytes):
    assert arch in ARCHS
    assert violations(Usage(255, kilobytes * 1024, 0), arch) == []
    assert len(violations(Usage(255, kilobytes * 1024 + 1, 0), arch)) == 1
    assert len(violations(Usage(16, 0, 4), arch)) == 1


def test_a_listed_spill_is_a_bound_for_its_kernel_and_architecture():
    for (kernel, arch), spilled in compile_report.SPILLS.items():
        assert violations(Usage(255, 0, spilled), arch, kernel) == []
        assert len(violations(Usage(255, 0, spilled + 1), arch, kernel)) == 1
        assert len(violations(Usage(255, 0, spilled), arch, "another")) == 1
        other = next(other for other in ARCHS if (kernel, other) not in compile_report.SPILLS)
        assert len(violations(Usage(255, 0, spilled), other, kernel)) == 1


def test_a_cell_has_a_value_for_each_triton_where_they_differ(tmp_path):
    rows = [
        Row("a", "", 80, Usage(10, 1024, 0), (), "3.7.1"), Row("a", "", 80, Usage(12, 1024, 0), (), "3.8.0"),
        Row("b", "", 80, Usage(10, 0, 0), (), "3.7.1"), Row("b", "", 80, Usage(10, 0, 0), (), "3.8.0"),
        Row("c", "", 80, Usage(10, 0, 8), ("spills",), "3.8.0"),
        Row("d", "", 80, None, ("does not compile",), "3.7.1"), Row("d", "", 80, Usage(9, 0, 0), (), "3.8.0"),
        Row("csrc/e: e", "weight fp4", 80, Usage(20, 2048, 0), ()),
    ]  # fmt: skip
    compile_report.write_rows(rows, tmp_path / "rows.json")
    assert compile_report.read_rows(tmp_path / "rows.json") == rows
    table = compile_report.as_table(rows, [80])
    cells = [line.split("|")[3].strip() for line in table.splitlines()[2:]]
    assert cells == [
        "10/12 · 1.0 KB", "10 · 0.0 KB", "-/10 · -/0.0 KB · 8 B SPILLED", "20 · 2.0 KB", "FAILS/9 · FAILS/0.0 KB",
    ]  # fmt: skip
    page = compile_report.document(rows, [80], common=True)
    assert "with Triton 3.7.1 and 3.8.0, which compiles" in page
    assert "a value for each, in this order" in page
    assert "in this order" not in compile_report.document(rows[-1:] + rows[:1], [80], common=True)


def test_versions_of_triton_run_in_processes_of_their_own(monkeypatch, tmp_path, capsys):
    """With two folders that are on the path and hold nothing, this process's Triton compiles both times."""
    script = tmp_path / "versions.py"
    script.write_text("import sys; print(f'/nowhere/{sys.argv[2]}')")
    monkeypatch.setattr(compile_table, "VERSIONS", script)
    monkeypatch.delenv("TRITON_INTERPRET")
    chosen = ["--arch", "80", "--kernel", "swiglu", "--common"]
    rows = compile_table.rows_of_versions(["a", "b"], chosen)
    assert [row.kernel for row in rows] == ["swiglu", "swiglu"]
    assert {(row.triton, row.arch, row.broken) for row in rows} == {(triton.__version__, 80, ())}
    assert compile_table.main([*chosen, "--triton", "a"]) == 0
    assert "| swiglu | all " in capsys.readouterr().out


def test_an_op_without_a_case_is_missing():
    assert compile_table.without_cases(CASES) == []
    assert compile_table.without_cases([c for c in CASES if c.op != "qnorm_rope_kv_insert"]) == ["qnorm_rope_kv_insert"]


def test_interpreting_and_unknown_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        compile_table.main([])
    assert "unset it" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        compile_table.main(["--kernel", "no_such_op"])
    assert "no cases for no_such_op; there are: " in capsys.readouterr().err
