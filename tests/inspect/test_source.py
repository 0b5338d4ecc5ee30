"""`inspect` before the download: a repository on the hub, an index, config.json alone; and without torch."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from testing.flash import (
    GPTQ_QUANTIZATION,
    NATIVE_QUANTIZATION,
    PACKED_QUANTIZATION,
    SMALL,
    Declared,
    gptq,
    mtp,
    native,
    pack_quantized,
    write_checkpoint,
)
from testing.hub import COMMIT, Hub, serving
from testing.serving.tokenizer import write_encoder
from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError
from vllm_deepseek_v4flash.inspect.cli import main
from vllm_deepseek_v4flash.inspect.contents import Report, inspect_checkpoint
from vllm_deepseek_v4flash.serving.modes import Generation

REPOSITORY = "someone/DeepSeek-V4-Flash-Int4"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small")
    write_checkpoint(path, SMALL, gptq(SMALL, act_order=True), {**GPTQ_QUANTIZATION, "desc_act": True}, shards=3)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95}))
    write_encoder(path, Generation.JULY)
    return path


@pytest.fixture
def hub(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(REPOSITORY, small)) as running:
        # As a process of its own would find them in HF_ENDPOINT and HF_HOME.
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def linked(directory: Path, target: Path, without: str = "") -> Path:
    """A copy whose files are links: copied holes would take gigabytes."""
    ignored = shutil.ignore_patterns(without) if without else None
    return shutil.copytree(directory, target, ignore=ignored, copy_function=os.symlink)


def content(report: Report) -> tuple[Any, ...]:
    """What does not depend on where a checkpoint is."""
    return report.rows, report.problems, report.resident, report.nbytes, report.skipped_bytes, report.tensors


# ---- the hub


def test_a_repository_is_read_like_its_directory(hub: Hub, small: Path) -> None:
    report, expected = inspect_checkpoint(REPOSITORY, "v1"), inspect_checkpoint(small)
    assert content(report) == content(expected)
    assert (report.basis, report.chat) == ("headers", expected.chat)
    assert report.directory == f"{REPOSITORY} at {COMMIT[:12]}"
    # Headers and small files only; the tensors are gigabytes.
    assert sum(hub.sent.values()) < 8 << 20 < expected.nbytes
    assert "tokenizer.json" not in hub.sent


def test_a_header_longer_than_the_first_request(hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_deepseek_v4flash.inspect.hub._FIRST_BYTES", 100)
    assert content(inspect_checkpoint(REPOSITORY)) == content(inspect_checkpoint(small))


def test_a_private_repository_takes_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(CheckpointError, match=r"no such repository.*HF_TOKEN"):
        inspect_checkpoint(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert inspect_checkpoint(REPOSITORY).problems == ()


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/else", None, "someone/else: no such directory here, and no such repository"),
        (REPOSITORY, "v2", f"{REPOSITORY} at v2: no such revision"),
    ],
)
def test_what_the_hub_does_not_have(hub: Hub, name: str, revision: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(name, revision)


def test_a_hub_without_range_requests_sends_no_shard(hub: Hub) -> None:
    hub.ranges = False
    with pytest.raises(CheckpointError, match=r"does not answer range requests \(status 200\)"):
        inspect_checkpoint(REPOSITORY)


def test_no_hub_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match=r"the hub did not answer: .*HF_ENDPOINT"):
        inspect_checkpoint(REPOSITORY)


def test_a_shard_that_is_not_in_the_repository(hub: Hub, small: Path, tmp_path: Path) -> None:
    hub.directory = linked(small, tmp_path / "copy", without="*-00003-*")
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.safetensors, which .* lists, is not in the repository"):
        inspect_checkpoint(REPOSITORY)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (struct.pack("<Q", 1000) + b"{", "it has 9 bytes, its header alone needs 1008"),
        (b"1234", "its 4 bytes do not start with the length of a header"),
        (b"", "its 0 bytes do not start with the length of a header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a Git LFS pointer"),
    ],
)
def test_a_truncated_shard_of_a_repository(hub: Hub, small: Path, tmp_path: Path, shard: bytes, message: str) -> None:
    hub.directory = linked(small, tmp_path / "copy", without="*-00003-*")
    (hub.directory / "model-00003-of-00003.safetensors").write_bytes(shard)
    with pytest.raises(CheckpointError, match=rf"00003-of-00003\.safetensors.*{message}"):
        inspect_checkpoint(REPOSITORY)


def test_a_repository_without_an_index(hub: Hub, small: Path, tmp_path: Path) -> None:
    """Its shards are those in it, as they are for vLLM; what they lack is missing."""
    hub.directory = linked(small, tmp_path / "copy", without="model.safetensors.index.json")
    assert content(inspect_checkpoint(REPOSITORY)) == content(inspect_checkpoint(small))
    (hub.directory / "model-00003-of-00003.safetensors").unlink()
    assert "missing" in {problem.kind for problem in inspect_checkpoint(REPOSITORY).problems}


def test_a_repository_without_a_model(hub: Hub, tmp_path: Path) -> None:
    hub.directory = tmp_path
    with pytest.raises(CheckpointError, match=rf"{REPOSITORY} at {COMMIT[:12]} has no config.json"):
        inspect_checkpoint(REPOSITORY)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file is in the repository"):
        inspect_checkpoint(REPOSITORY)


def test_a_repository_whose_terms_were_not_accepted(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(CheckpointError, match=r"access is restricted\. Accept its terms"):
        inspect_checkpoint(REPOSITORY)


def test_without_the_hubs_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install -U huggingface_hub"):
        inspect_checkpoint(REPOSITORY)


def test_offline_it_reads_the_cache(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and the cache does not have it"):
        inspect_checkpoint(REPOSITORY)
    cached = tmp_path / f"models--{REPOSITORY.replace('/', '--')}"
    linked(small, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    assert content(inspect_checkpoint(REPOSITORY)) == content(inspect_checkpoint(small))


def test_a_process_without_torch_and_vllm(small: Path, tmp_path: Path) -> None:
    """The environment's variables reach the hub's client, and the text is the same as with torch."""
    with serving(Hub(REPOSITORY, small, token="hf_secret")) as hub:
        code = (
            "import sys; sys.modules |= dict.fromkeys(('torch', 'vllm', 'transformers', 'numpy'))\n"
            "from vllm_deepseek_v4flash.inspect.cli import main\n"
            f"sys.exit(main(['inspect', {REPOSITORY!r}, '--json', '--gpus', '1', '--memory', '80G']))"
        )
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    expected = inspect_checkpoint(small)
    assert found["servable"] is True
    assert (found["tensors"], found["bytes"]) == (expected.tensors, expected.nbytes)
    assert found["chat"]["generation"] == "0731"
    assert found["capacity"]["recommended"]["max_model_len"] > 0


# ---- an index, or config.json alone

WRITTEN: dict[str, tuple[Declared, dict[str, Any]]] = {
    "gptq": (gptq(SMALL), GPTQ_QUANTIZATION),
    "act order": (gptq(SMALL, act_order=True), {**GPTQ_QUANTIZATION, "desc_act": True}),
    "packed": (pack_quantized(SMALL), PACKED_QUANTIZATION),
    "native": (native(SMALL), NATIVE_QUANTIZATION),
    "draft": ({**native(SMALL), **mtp(SMALL)}, NATIVE_QUANTIZATION),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_an_index_is_enough_for_an_estimate(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared, quantization = WRITTEN[case]
    path = write_checkpoint(tmp_path, SMALL, declared, quantization, shards=2)
    expected = inspect_checkpoint(path)
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    report = inspect_checkpoint(path)
    assert report.basis == "index"
    assert content(report) == content(expected)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "estimate: no shard is here" in out
    assert "exactly the bytes that the index gives" in out
    assert out.rstrip().endswith("Inspect it again once its shards are here.")


def test_an_index_of_another_size_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path, SMALL, gptq(SMALL, group=64), GPTQ_QUANTIZATION, shards=2)
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    assert main(["inspect", str(path)]) == 0
    assert "bytes, and the index gives" in capsys.readouterr().out


def test_the_names_of_an_index_are_compared(tmp_path: Path) -> None:
    declared = gptq(SMALL)
    del declared["model.layers.1.input_layernorm.weight"]
    declared["rotary.inv_freq"] = "F32", (32,)
    path = write_checkpoint(tmp_path, SMALL, declared, GPTQ_QUANTIZATION, shards=2)
    for shard in path.glob("*.safetensors"):
        shard.unlink()
    found = {(problem.kind, problem.name) for problem in inspect_checkpoint(path).problems}
    assert found == {("missing", "layers.1.attn_norm.weight"), ("unexpected", "rotary.inv_freq")}


@pytest.mark.parametrize("case", ["packed", "native", "gptq"])
def test_config_json_alone_is_enough_for_an_estimate(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared, quantization = WRITTEN[case]
    path = write_checkpoint(tmp_path, SMALL, declared, quantization)
    expected = inspect_checkpoint(path)
    (path / "model.safetensors").unlink()
    report = inspect_checkpoint(path)
    assert report.basis == "config"
    assert content(report) == content(expected)
    assert main(["inspect", str(path), "--gpus", "1", "--memory", "80GB"]) == 0
    assert "estimate: there are neither shards nor an index" in capsys.readouterr().out


def test_a_config_of_more_experts_than_any_model_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "n_routed_experts": 2**30}))
    with pytest.raises(CheckpointError, match=r"n_routed_experts=1073741824 in config.json: no model has so many"):
        inspect_checkpoint(tmp_path)


def test_a_partial_download_is_refused(small: Path, tmp_path: Path) -> None:
    path = linked(small, tmp_path / "copy", without="*-00003-*")
    with pytest.raises(CheckpointError, match="1 of the 3 shards"):
        inspect_checkpoint(path)


def test_a_revision_is_the_hubs(small: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--revision=v1: .* is not a repository on the hub"):
        inspect_checkpoint(small, "v1")


# ---- what a chat needs


def test_the_files_of_a_chat(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tokenizer: tokenizer.json" in lines
    assert "sampling defaults: temperature 0.6, top_p 0.95, of generation_config.json" in lines
    assert "chat encoding: 0731's, by encoding/encoding_dsv4.py" in lines


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("tokenizer.json", None, "has no tokenizer.json, which vLLM needs"),
        ("generation_config.json", "{", "generation_config.json is not JSON"),
        ("generation_config.json", "[]", "generation_config.json is a JSON list, should be an object"),
    ],
)
def test_a_chat_that_cannot_be_served(
    name: str, text: str | None, reason: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = linked(small, tmp_path / "copy")
    (path / name).unlink()
    if text is not None:
        (path / name).write_text(text)
    assert main(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert "This checkpoint cannot be served:" in out
    assert reason in out


def test_without_an_encoder_it_says_what_is_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path, SMALL, native(SMALL), NATIVE_QUANTIZATION)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "sampling defaults: vLLM's own" in out
    assert "for weights of 0731 pass --tokenizer-mode deepseek_v4_0731" in out
