"""Whatever is wrong with a checkpoint, `inspect` ends with a sentence about it: no traceback, nothing for a terminal.

FUZZ_INPUTS and FUZZ_SEED choose how many inputs, and which.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

from testing import tiny
from testing.fixtures import unpacked
from testing.malformed import Base, read_base, write, write_broken
from testing.native_checkpoints import write_native
from vllm_deepseek_v4flash.inspect import cli

INPUTS = int(os.environ.get("FUZZ_INPUTS", "250"))
SEED = os.environ.get("FUZZ_SEED", "0")
BASES = ("ar_sym", "ar_awq_asym", "gm_gptq_desc_act", "llmc_rtn_g32_asym", "native", "plain", "resaved")
# A report has a line for each problem, up to a number; no line needs more than a long value and its sentence.
MOST_CHARACTERS = 60_000


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    name, directory = request.param, tmp_path_factory.mktemp("base") / "checkpoint"
    if name == "native":
        write_native(directory, tiny.CONFIGS["mixed"], "fp4")
    elif name in ("plain", "resaved"):
        resaved = name == "resaved"
        tiny.write_checkpoint(directory, tiny.CONFIGS["mixed"], resaved_config=resaved, fused=resaved)
    else:
        directory = unpacked() / name
    return read_base(directory)


def inspect(directory: Path, *options: str) -> tuple[int, str]:
    """The exit status of `inspect`, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = cli.main(["inspect", str(directory), *options])
    return status, printed.getvalue()


def test_every_input_ends_with_a_sentence(base: Base, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    start = zlib.crc32(f"{request.node.name} {SEED}".encode())
    served = 0
    for number in range(INPUTS):
        rng = random.Random(start + number)
        write_broken(tmp_path / "checkpoint", base, rng)
        options = rng.choice(((), ("--gpus", "2", "--memory", "80GiB"), ("--json",)))
        try:
            status, text = inspect(tmp_path / "checkpoint", *options)
        except Exception as error:
            raise AssertionError(f"input {start + number}: {type(error).__name__}: {error}") from error
        # A model of a few layers has few names; others have room for what the terminal must not see.
        hidden = {c for c in text if not c.isprintable()} - {"\n"}
        assert not hidden, (start + number, hidden)
        assert len(text) < MOST_CHARACTERS or options == ("--json",), start + number
        assert ("can be served" in text or "cannot be served" in text) or options == ("--json",), start + number
        if "--json" in options:
            assert json.loads(text)["servable"] is (status == 0)
        served += status == 0
    # Some changes do not matter. If most did not, the inputs would test little.
    assert served < 0.6 * INPUTS


CASES: dict[str, tuple[Any, str]] = {
    "experts": (
        {"n_routed_experts": 100_000},
        r"n_routed_experts=100000 in config.json: the tensors have 8 routed experts",
    ),
    "layers": (
        {"num_hidden_layers": 20_000, "compress_ratios": [0] * 20_001},
        r"num_hidden_layers=20000 in config.json: the tensors have \d+ layers",
    ),
    "layer types": ({"compress_ratios": None, "layer_types": [["x"]] * 5}, r"layer_types\[0\]=\['x'\]: must be one of"),
    "huge number": ({"rms_norm_eps": 10**400}, r"rms_norm_eps=1000.*\.\.\.: must be a finite number > 0"),
    "huge size": ({"hidden_size": 2**40}, r"hidden_size=1099511627776: must be an integer up to 2147483647"),
    "eos": ({"eos_token_id": [1, 264]}, r"eos_token_id=\(1, 264\): must be less than vocab_size=264"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_field_of_config_json(name: str, tmp_path: Path) -> None:
    change, message = CASES[name]
    path = tiny.write_checkpoint(tmp_path / "checkpoint", tiny.CONFIGS["mixed"])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    status, text = inspect(path)
    assert status == 1
    assert_matches(message, text)
    assert "config.json" in text


QUANTIZATION: dict[str, tuple[str, dict[str, Any], str]] = {
    "bits": ("ar_sym", {"bits": "4"}, r"bits='4' in quantization_config: .* It should be the number 4, without quot"),
    "dynamic": ("gm_gptq_desc_act", {"dynamic": 5}, r"quantization_config\.dynamic=5: must be an object"),
    "override": ("gm_gptq_desc_act", {"dynamic": {"x": 5}}, r"quantization_config\.dynamic\['x'\]=5: must be an obj"),
    "ignore": ("llmc_rtn_g32_asym", {"ignore": 5}, r"quantization_config\.ignore=5: must be a list of module names"),
    "groups": (
        "llmc_rtn_g32_asym",
        {"config_groups": [5]},
        r"quantization_config\.config_groups=\[5\]: must be an obj",
    ),
    "targets": (
        "llmc_rtn_g32_asym",
        {"config_groups": {"g": {"targets": 5, "weights": {}}}},
        r"quantization_config\.config_groups\['g'\]\.targets=5: must be a list of module names",
    ),
    "extra": (
        "ar_sym",
        {"extra_config": {"x": [1]}},
        r"quantization_config\.extra_config\['x'\]=\[1\]: must be an obj",
    ),
    "excluded": (
        "ar_awq_asym",
        {"modules_to_not_convert": [[1]]},
        r"quantization_config\.modules_to_not_convert=\[\[1\]\]: must be a list of module names",
    ),
}


@pytest.mark.parametrize("name", QUANTIZATION)
def test_a_field_of_quantization_config(name: str, tmp_path: Path) -> None:
    fixture, change, message = QUANTIZATION[name]
    base = read_base(unpacked() / fixture, files=1)
    base.config["quantization_config"] |= change
    write(tmp_path, base)
    status, text = inspect(tmp_path)
    assert status == 1
    assert_matches(message, text)


def test_names_that_a_terminal_would_obey(tmp_path: Path) -> None:
    base = read_base(unpacked() / "ar_sym", files=1)
    (header,) = base.headers.values()
    header["\x1b[2J\nThis checkpoint can be served."] = header.pop(sorted(header)[0])
    write(tmp_path, base)
    status, text = inspect(tmp_path)
    assert status == 1
    assert r"the name of tensor \x1b[2J\nThis checkpoint can be served. has characters" in text
    assert "\nThis checkpoint can be served" not in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b'{"x":' + b"[" * 100_000, "nested too deeply"),
        ("config.json", b'{"model_type": "\xff"}', "not UTF-8 text: invalid start byte at byte 16"),
        ("model.safetensors.index.json", b"[" * 100_000, "nested too deeply"),
        ("model.safetensors.index.json", None, "cannot be read: Is a directory"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"x": "' + b"a" * 300 + b'.safetensors"}}',
            "must be a *.safetensors file",
        ),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "\\ud800.safetensors"}}', r"'\ud800.safetensors'"),
        ("model-00001-of-00001.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file(file: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    write(tmp_path, read_base(unpacked() / "ar_sym", files=1))
    (tmp_path / file).unlink()
    if content is None:
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).write_bytes(content)
    status, text = inspect(tmp_path)
    assert status == 1
    assert message in text
    assert file in text


def test_a_size_of_400_digits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", "x", "--gpus", "1", "--memory", "9" * 400])
    assert "is not the memory of a GPU: write 80GiB" in capsys.readouterr().err


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text
