"""Headers are read as safetensors writes them, and no file that would fail to load gets through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from testing.flash import write_file
from vllm_deepseek_v4flash.checkpoint.errors import CheckpointError
from vllm_deepseek_v4flash.checkpoint.headers import INDEX, read_headers
from vllm_deepseek_v4flash.checkpoint.loader import CheckpointError as LoadersError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Two shards of two tensors each, with an index; `a` comes first in its file."""
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.int32)}, tmp_path / ONE)
    save_file({"c": torch.ones(3, dtype=torch.bfloat16), "d": torch.zeros(2, 0)}, tmp_path / TWO)
    _index(tmp_path, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    return tmp_path


def _index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _rewrite_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def test_every_tensor_with_its_dtype_shape_file_and_bytes(good: Path) -> None:
    tensors = read_headers(good)
    assert {name: (t.dtype, t.shape, t.file.name, t.nbytes) for name, t in tensors.items()} == {
        "a": ("F32", (2, 3), ONE, 24),
        "b": ("I32", (4,), ONE, 16),
        "c": ("BF16", (3,), TWO, 6),
        "d": ("F32", (2, 0), TWO, 0),
    }
    start, end = tensors["a"].offsets
    assert torch.frombuffer(bytearray((good / ONE).read_bytes()[start:end]), dtype=torch.float32).tolist() == list(
        range(6)
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint8, torch.int64, torch.float16])
def test_dtype_codes_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": torch.zeros(2, 5).to(dtype)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        code = file.get_slice("x").get_dtype()
    tensor = read_headers(tmp_path)["x"]
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (code, (2, 5), 10 * dtype.itemsize)


def test_without_an_index_every_safetensors_file_counts(good: Path) -> None:
    (good / INDEX).unlink()
    assert set(read_headers(good)) == {"a", "b", "c", "d"}


def test_with_an_index_other_files_do_not(good: Path) -> None:
    (good / "consolidated.safetensors").write_bytes(b"not read")
    assert set(read_headers(good)) == {"a", "b", "c", "d"}


def test_a_pickle_next_to_safetensors_is_ignored(good: Path) -> None:
    (good / "optimizer.pt").write_bytes(b"pickle")
    assert set(read_headers(good)) == {"a", "b", "c", "d"}


def test_shards_may_be_links(good: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The hub's cache holds links to blobs."""
    snapshot = tmp_path_factory.mktemp("snapshot")
    for name in (ONE, TWO, INDEX):
        (snapshot / name).symlink_to(good / name)
    assert set(read_headers(snapshot)) == {"a", "b", "c", "d"}


def _truncate(directory: Path) -> None:
    os.truncate(directory / ONE, (directory / ONE).stat().st_size - 5)


def _truncate_header(directory: Path) -> None:
    os.truncate(directory / ONE, 20)


def _lengthen(directory: Path) -> None:
    with (directory / ONE).open("ab") as file:
        file.write(b"123")


def _dangling_link(directory: Path) -> None:
    (directory / TWO).unlink()
    (directory / TWO).symlink_to(directory / "blobs" / "gone")


def _pickles(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")


def _empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


def _lfs(directory: Path) -> None:
    (directory / TWO).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")


def _twice(directory: Path) -> None:
    save_file({"c": torch.ones(3, dtype=torch.bfloat16), "a": torch.zeros(1)}, directory / TWO)
    _index(directory, {"a": ONE, "b": ONE, "c": TWO})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, rf"{ONE} is truncated: it has \d+ bytes, it should have \d+; 1 tensors .*first b"),
    "truncated in its header": (_truncate_header, rf"{ONE} is truncated: it has 20 bytes, its header alone needs \d+"),
    "too long": (_lengthen, rf"{ONE} is not a valid safetensors file: it has \d+ bytes, but its tensors end at"),
    "empty file": (lambda d: (d / ONE).write_bytes(b""), rf"{ONE} .*its 0 bytes do not start with the length"),
    "another format": (lambda d: (d / ONE).write_bytes(b"PK\3\4 zip archive"), rf"{ONE} is not a valid safetensors"),
    "header not JSON": (lambda d: (d / ONE).write_bytes(b"\3" + b"\0" * 7 + b"{]}"), rf"{ONE} .*header is not JSON"),
    "header a list": (lambda d: (d / ONE).write_bytes(b"\2" + b"\0" * 7 + b"[]"), rf"{ONE} .*JSON list, not an object"),
    "unknown dtype": (lambda d: _rewrite_header(d / ONE, lambda h: h["b"].update(dtype="F7")), r"b has dtype 'F7'"),
    "no dtype": (lambda d: _rewrite_header(d / ONE, lambda h: h["b"].pop("dtype")), rf"{ONE}.*tensor b is described"),
    "shape not the bytes": (
        lambda d: _rewrite_header(d / ONE, lambda h: h["b"].update(shape=[5])),
        rf"{ONE}.*tensor b, I32 \[5\], does not fill its bytes",
    ),
    "negative size": (
        lambda d: _rewrite_header(d / ONE, lambda h: h["b"].update(shape=[-2, -2])),
        rf"{ONE}.*tensor b, I32 \[-2, -2\]",
    ),
    "overlap": (
        lambda d: _rewrite_header(d / ONE, lambda h: h["b"].update(data_offsets=[8, 24])),
        rf"{ONE}.*tensor b at byte \d+ overlaps",
    ),
    "gap": (
        lambda d: _rewrite_header(d / ONE, lambda h: h["b"].update(data_offsets=[32, 48])),
        rf"{ONE}.*tensor b at byte \d+ leaves a gap",
    ),
    "missing shard": (lambda d: (d / TWO).unlink(), rf"1 of the 2 shards that {INDEX} lists are missing: {TWO}"),
    "dangling link": (_dangling_link, rf"missing: {TWO}"),
    "git lfs": (_lfs, rf"{TWO} is a Git LFS pointer .*git lfs pull"),
    "tensor in no shard": (lambda d: _index(d, {"a": ONE, "e": TWO}), f"places tensor e in {TWO}, .*nor in any other"),
    "tensor elsewhere": (lambda d: _index(d, {"a": ONE, "b": TWO}), f"tensor b in {TWO}, but .*it is in {ONE}"),
    "twice": (_twice, rf"tensor a is in {ONE} \[2, 3\] and again in {TWO} \[1\]"),
    "index not JSON": (lambda d: (d / INDEX).write_text("{"), f"{INDEX} is not JSON"),
    "index without map": (lambda d: (d / INDEX).write_text("{}"), f"{INDEX} has no weight_map"),
    "index leaves": (lambda d: _index(d, {"a": f"../{ONE}"}), r"tensor a in '\.\./.*of the same directory"),
    "index names a pickle": (lambda d: _index(d, {"a": "model.bin"}), r"'model\.bin'.*\.safetensors"),
    "pickles only": (_pickles, r"pickled weights only \(pytorch_model\.bin\).*run any code"),
    "nothing": (_empty, r"no \*\.safetensors file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_loaded_is_named(good: Path, case: str) -> None:
    breaks, message = BROKEN[case]
    breaks(good)
    with pytest.raises(CheckpointError, match=message):
        read_headers(good)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is not a directory"):
        read_headers(tmp_path / "nowhere")


def test_the_loader_raises_the_same_error() -> None:
    assert LoadersError is CheckpointError


def test_reading_headers_needs_no_torch(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", {"x": ("BF16", (4, 4))})
    code = (
        "import sys; from vllm_deepseek_v4flash.checkpoint.headers import read_headers\n"
        f"assert read_headers({str(tmp_path)!r})['x'].nbytes == 32\n"
        "assert not {'torch', 'safetensors', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
