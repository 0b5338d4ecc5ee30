"""The console script: what it prints, its exit status, and that it needs no vLLM."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from testing.flash import FLASH, GPTQ_QUANTIZATION, NATIVE_QUANTIZATION, SMALL, gptq, native, write_checkpoint
from vllm_deepseek_v4flash import __version__
from vllm_deepseek_v4flash.inspect.cli import main, parse_size

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flash in int4, group 128, 46 shards."""
    path = tmp_path_factory.mktemp("flash")
    return write_checkpoint(path, FLASH, gptq(FLASH), GPTQ_QUANTIZATION, shards=46)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "small", SMALL, gptq(SMALL, act_order=True),
                            {**GPTQ_QUANTIZATION, "desc_act": True})  # fmt: skip


def test_text_for_people(flash: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(flash), "--gpus", "2", "--memory", "80GiB", "--kv-cache-dtype", "fp8"]) == 0
    out = capsys.readouterr().out
    assert "43 layers (2 window, 21 csa, 20 hca), 256 experts, hidden size 4096; quant_method gptq" in out
    row = next(line for line in out.splitlines() if line.startswith("layers.*.ffn.experts.*.w2 ")).split()
    assert row[1:] == ["int4", "sym", "I32", "128", "4096x2048", "11,008", "47.97", "GB"]
    assert "weights per GPU  69.82 GiB" in out
    assert "--tensor-parallel-size 2 --gpu-memory-utilization 0.92 --max-num-seqs 256 --max-num-batched-tokens" in out
    assert out.rstrip().endswith("This checkpoint can be served.")
    passed = next(line for line in out.splitlines() if "pass (*)" in line)
    assert passed.endswith("--kv-cache-dtype fp8")


def test_json_for_machines(flash: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", str(flash), "--json", "--gpus", "2", "--memory", "80GiB", "--index-cache-dtype", "fp4"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["servable"] is True
    assert found["reasons"] == found["problems"] == []
    assert found["layers"] == {"window": 2, "csa": 21, "hca": 20}
    assert sum(row["bytes"] for row in found["modules"]) == found["bytes"] == 149954677852
    capacity = found["capacity"]
    assert sum(capacity["weight_bytes_per_gpu_by_part"].values()) == capacity["weight_bytes_per_gpu"]
    assert capacity["kv_block_bytes"] == 898304
    assert capacity["kv_bytes_per_token"] == pytest.approx(898304 / 256)
    assert capacity["recommended"] in capacity["choices"]


def test_without_gpus_it_says_nothing_of_memory(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small)]) == 0
    assert "GPU" not in capsys.readouterr().out


def test_problems_make_the_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = native(SMALL)
    del declared["layers.1.attn_norm.weight"]
    write_checkpoint(tmp_path, SMALL, declared, NATIVE_QUANTIZATION)
    assert main(["inspect", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "problems: 1 missing\n  missing: layers.1.attn_norm.weight: should be [4096]" in out
    assert "cannot be served:\n  1 problems in" in out
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["servable"] is False
    assert found["problems"] == [{"kind": "missing", "name": "layers.1.attn_norm.weight", "text": "should be [4096]"}]


def test_a_long_list_of_problems_is_cut_in_text_and_whole_in_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = {name: value for name, value in native(SMALL).items() if ".w3." not in name or ".shared" in name}
    write_checkpoint(tmp_path, SMALL, declared, NATIVE_QUANTIZATION)
    missing = 3 * 8
    assert main(["inspect", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"problems: {missing} missing" in out
    assert f"... and {missing - 20} more missing" in out
    assert out.count("  missing: ") == 20
    main(["inspect", str(tmp_path), "--json"])
    assert len(json.loads(capsys.readouterr().out)["problems"]) == missing


@pytest.mark.parametrize("as_json", [False, True])
def test_what_cannot_be_read_is_a_sentence(tmp_path: Path, as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", str(tmp_path / "nowhere"), *(["--json"] if as_json else [])]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert "nowhere is not a directory" in out
    assert "Traceback" not in out + err
    if as_json:
        assert json.loads(out)["servable"] is False


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--gpus", "1", "--memory", "1GiB"], "it does not fit 1 x 1,073,741,824 bytes at .* 0.92: weights take"),
        (["--gpus", "1", "--gpu-memory-utilization", "0.01"], "--gpu-memory-utilization 0.01: weights take"),
        (["--gpus", "3"], "--gpus 3: num_attention_heads is 64, which 3 GPUs do not divide"),
        (["--gpus", "1", "--kv-cache-dtype", "int3"], "--kv-cache-dtype=int3: not a row format"),
        (["--gpus", "1", "--index-cache-dtype", "fp3"], "index_cache_dtype=fp3: not a row format"),
    ],
)
def test_what_does_not_fit_is_a_reason(
    small: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(small), "--memory", "80GiB", "--json", *options]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["servable"] is False
    assert re.search(reason, found["reasons"][0])


def test_act_order_does_not_go_with_tensor_parallelism(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small), "--gpus", "2", "--memory", "80GiB"]) == 1
    assert "layers.*.attn.wo_b is packed in activation order" in capsys.readouterr().out
    assert main(["inspect", str(small), "--gpus", "1", "--memory", "80GiB"]) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 << 30), ("80 GB", 80 * 10**9), ("81920MiB", 80 << 30), ("1.5TiB", 3 << 39), ("80gib", 80 << 30),
     ("80G", 80 * 10**9), ("80000000000", 80 * 10**9)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["80", "80K", "", "GiB", "-80GiB", "80 GiB free", "0GiB", "1e3GiB", "nan"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="80GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required"),
        (["inspect"], "MODEL"),
        (["inspect", ".", "--gpus", "2"], "--gpus and --memory go together"),
        (["inspect", ".", "--memory", "80GiB"], "--gpus and --memory go together"),
        (["inspect", ".", "--gpus", "0", "--memory", "80GiB"], "'0' is not a whole number"),
        (["inspect", ".", "--gpus", "2", "--memory", "80"], "'80' is not the memory of a GPU"),
        (["inspect", ".", "--gpu-memory-utilization", "92"], "'92' is not a share"),
        (["inspect", ".", "--gpu-memory-utilization", "most"], "'most' is not a share"),
    ],
)
def test_wrong_usage(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == __version__


def test_it_is_a_console_script() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"vllm-deepseek-v4flash": "vllm_deepseek_v4flash.inspect.cli:main"}


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads")
def test_a_process_of_its_own_needs_no_vllm_and_reads_headers_only(flash: Path, tmp_path: Path) -> None:
    """Of 150 GB it reads less than its own modules take."""
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['transformers'] = None\n"
        "from vllm_deepseek_v4flash.inspect.cli import main\n"
        f"status = main(['inspect', {str(flash)!r}, '--gpus', '2', '--memory', '80GiB'])\n"
        f"open({str(tmp_path / 'io')!r}, 'w').write(open('/proc/self/io').read())\n"
        "sys.exit(status)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    counters = dict(line.split(": ") for line in (tmp_path / "io").read_text().splitlines())
    assert int(counters["rchar"]) < 1 << 30


def test_a_reader_that_stops_early_sees_no_traceback(small: Path) -> None:
    """As with `| head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vllm_deepseek_v4flash.inspect.cli", "inspect", str(small), "--json"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (1, "")
