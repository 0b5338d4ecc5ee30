"""Each way in which a checkpoint can be broken ends in an error with the file and the tensor.

Every case starts from a good checkpoint. What headers show is refused while vLLM builds its config; what only values
show is refused during the load. Neither waits for the server to open its port (`test_the_server_does_not_start`).
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from testing import tiny
from testing.engine import make_llm
from testing.fixtures import unpacked
from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError

SHARD = "model.safetensors"
Break = Callable[[Path], None]


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / SHARD)
    edit(tensors)
    save_file(tensors, directory / SHARD)


def edit_config(directory: Path, edit: Callable[[dict], None]) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def stored_name(tensors: dict[str, torch.Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def put(ending: str, value: float) -> Break:
    """Overwrite the first value of the first tensor of that name."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[stored_name(tensors, ending)].view(-1)[0] = value

    return lambda directory: edit_tensors(directory, edit)


def truncate(directory: Path) -> None:
    shard = directory / SHARD
    shard.write_bytes(shard.read_bytes()[:-1000])


def lose_a_shard(directory: Path) -> None:
    names = list(load_file(directory / SHARD))
    index = {name: SHARD if i else "model-00002-of-00002.safetensors" for i, name in enumerate(names)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def pickle_instead(directory: Path) -> None:
    torch.save(load_file(directory / SHARD), directory / "pytorch_model.bin")
    (directory / SHARD).unlink()


def drop(ending: str) -> Break:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[stored_name(tensors, ending)]

    return lambda directory: edit_tensors(directory, edit)


@dataclass(frozen=True)
class Case:
    fixture: str
    break_it: Break
    message: str
    """A pattern that the error matches: the file, the tensor and what is wrong."""


IGNORED = "layers.0.attn.wq_a"
HEADER_CASES = {
    "truncated shard": Case("ar_sym", truncate, r"model\.safetensors.*(truncated|bytes)"),
    "missing shard": Case("ar_sym", lose_a_shard, r"model-00002-of-00002\.safetensors"),
    "pickle": Case("ar_sym", pickle_instead, r"pytorch_model\.bin"),
    "wrong group size": Case(
        "gm_gptq_desc_act", lambda d: edit_config(d, lambda q: q.update(group_size=64)), r"layers\..*(scales|g_idx)"
    ),
    "packed tensor under an ignored module": Case(
        "llmc_rtn_g32_asym", lambda d: edit_config(d, lambda q: q["ignore"].append(IGNORED)), rf"{IGNORED}.*ignore"
    ),
    "a scale is missing": Case("ar_sym", drop("wq_a.scales"), r"wq_a.*scales"),
    "other bits": Case("ar_sym", lambda d: edit_config(d, lambda q: q.update(bits=3)), r"3.*4"),
}
VALUE_CASES = {
    "NaN scale": Case("ar_sym", put("wq_a.scales", float("nan")), r"model\.safetensors.*wq_a.*scales.*(NaN|nan)"),
    "infinite scale": Case(
        "llmc_rtn_g32_asym",
        put("experts.1.w2.weight_scale", float("inf")),
        r"model\.safetensors.*w2.*weight_scale.*inf",
    ),
    "g_idx out of range": Case("gm_gptq_desc_act", put("q_a_proj.g_idx", 99), r"model\.safetensors.*wq_a.*g_idx.*99"),
    "zero point out of range": Case("ar_sym", put("wq_a.qzeros", 0), r"model\.safetensors.*wq_a.*qzeros"),
}


@contextlib.contextmanager
def broken(case: Case, directory: Path) -> Iterator[Path]:
    path = directory / "checkpoint"
    shutil.copytree(unpacked() / case.fixture, path)
    case.break_it(path)
    yield path


@pytest.mark.parametrize("name", HEADER_CASES)
def test_headers_are_refused_before_anything_is_built(name: str, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    case = HEADER_CASES[name]
    with broken(case, tmp_path) as path, pytest.raises(ValueError) as error:  # noqa: PT011 - matched below
        EngineArgs(model=str(path), dtype="float32", skip_tokenizer_init=True).create_engine_config()
    assert re.search(case.message, str(error.value), re.DOTALL), error.value


PLAIN_CASES: dict[str, tuple[Break, str]] = {
    "truncated shard": (truncate, r"model\.safetensors is truncated"),
    "missing shard": (lose_a_shard, r"missing: model-00002-of-00002\.safetensors"),
    "pickle": (pickle_instead, r"pytorch_model\.bin.*pickle can run any code"),
    "missing tensor": (
        drop("0.attn.wq_a.weight"),
        r"1 missing\n  missing: layers\.0\.attn\.wq_a\.weight: should be \[",
    ),
    "two problems": (
        lambda d: edit_tensors(d, lambda t: t.update({"head.weight": torch.zeros(5, 5), "x": torch.zeros(1)})),
        r"mis-shaped: head\.weight: has \[5, 5\] F32.*unexpected: x: has \[1\] F32",
    ),
}


@pytest.mark.parametrize("name", PLAIN_CASES)
def test_unquantised_headers_are_refused_before_anything_is_built(name: str, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    break_it, message = PLAIN_CASES[name]
    path = tiny.write_checkpoint(tmp_path / "checkpoint", tiny.CONFIGS["mixed"])
    arguments = EngineArgs(model=str(path), dtype="float32", skip_tokenizer_init=True, max_model_len=512)
    assert arguments.create_engine_config().quant_config is None
    break_it(path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - matched below
        arguments.create_engine_config()
    assert re.search(message, str(error.value), re.DOTALL), error.value


@pytest.mark.parametrize("name", VALUE_CASES)
def test_values_are_refused_while_loading(name: str, tmp_path: Path) -> None:
    case = VALUE_CASES[name]
    with broken(case, tmp_path) as path, pytest.raises(CheckpointError) as error:
        make_llm(path)
    assert re.search(case.message, str(error.value), re.DOTALL), error.value


def test_the_server_does_not_start(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with broken(VALUE_CASES["NaN scale"], tmp_path) as path:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
        command += ["--port", str(port), "--host", "127.0.0.1", "--skip-tokenizer-init", "--dtype", "float32"]
        # Without a size vLLM needs most of the machine's memory to be free, and fails for that reason first.
        command += ["--kv-cache-memory-bytes", str(64 << 20)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert re.search(VALUE_CASES["NaN scale"].message, printed), printed[-3000:]
    assert "Application startup complete" not in printed
