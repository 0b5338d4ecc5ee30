"""Checkpoint directories with something wrong in them: any JSON value changed to any other, any bytes to others.

`write_broken(directory, base, rng)` writes one. Headers are those of a checkpoint, tensors are holes in the files: a
directory takes a few kilobytes.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, INDEX = "config.json", "model.safetensors.index.json"

# A value of every type, at the edges of what is allowed and far beyond; what terminals and file systems obey; pieces of
# the formats' own spellings.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 8, 128, 255, 256, 100_000, 2**31, 2**63, 2**64, 10**30, 10**400, -(2**63),
    0.0, -0.0, 0.5, 4.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"),
    "", "4", "0", "x", "a" * 300, "a" * 5000, "\ud800", "\x1b[2J\x1b[31mred\r\n", "\u202e", "\x00", "é", "../x", ".",
    "/", "re:.*", "re:(", "re:", "-:.*", "+:(", "(", "*", "Linear", "float", "int", "group", "128x128", "axb", "BF16",
    "I32", "F8_E4M3", "F4", "F6_E2M3", "C64", "gptq", "awq", "auto-round", "compressed-tensors", "fp8", "yarn",
    "default", "csa", "sliding_attention", "mtp.0.x", "model.layers.0.attn.wq_a.qweight", "x.safetensors",
    [], [None], [[]], [0], [-1, -1], ["x"], [["x"]], [{}], [1, 2, 3, 4, 5], [0] * 100, [128, 128], [0, 4], ["re:("],
    {}, {"x": None}, {"x": {}}, {"": ""}, {"weights": 4, "targets": 5}, {"bits": "4"}, {"type": {}}, {"main": {}},
)  # fmt: skip
# Written as text, because Python cannot.
RAW = (
    '"' + "[" * 3,
    "[" * 100_000,
    '{"x":' * 100_000,
    "9" * 5000,
    "-",
    "nul",
    "",
    "\x00",
    '"\\ud800"',
    "[1,]",
    "{}" * 2,
)


@dataclass(frozen=True)
class Base:
    """A good checkpoint: its config.json, and its headers by file."""

    config: dict[str, Any]
    headers: dict[str, dict[str, Any]]
    index: dict[str, Any]


def read_base(directory: Path, files: int = 2) -> Base:
    """A checkpoint of one file, its tensors divided over `files`."""
    content = (directory / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__", None)
    names, headers, index = sorted(header), {}, {}
    for number in range(files):
        position, entries = 0, {}
        for name in names[number::files]:
            begin, end = header[name]["data_offsets"]
            entries[name] = {**header[name], "data_offsets": [position, position + end - begin]}
            position += end - begin
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        headers[file] = entries
        index.update(dict.fromkeys(entries, file))
    config = json.loads((directory / CONFIG).read_text())
    return Base(config, headers, {"metadata": {}, "weight_map": index})


def write(
    directory: Path, base: Base, texts: Mapping[str, Callable[[str], str]] | None = None, index: bool = True
) -> None:
    """Write `base` in an empty directory of this name.

    Args:
        texts: changes to the JSON of files, by name.
        index: whether to write one.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    _write(directory / "tokenizer.json", "{}")
    texts = texts or {}
    _write(directory / CONFIG, texts.get(CONFIG, _same)(json.dumps(base.config)))
    if index:
        _write(directory / INDEX, texts.get(INDEX, _same)(json.dumps(base.index)))
    for file, header in base.headers.items():
        size = max((_end(entry) for entry in header.values()), default=0)
        _write_shard(directory / file, texts.get(file, _same)(json.dumps(header)), size)


def write_broken(directory: Path, base: Base, rng: random.Random) -> None:
    """`write` with one to three things changed."""
    base = copy.deepcopy(base)
    config, headers, index = base.config, base.headers, base.index
    quantization = config.get("quantization_config") or config
    texts: dict[str, Callable[[str], str]] = {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        file = rng.choice(sorted(headers))
        targets = (config, config, quantization, quantization, index, headers[file])
        target = rng.choice(targets)
        if rng.random() < 0.12:
            name = CONFIG if target in (config, quantization) else INDEX if target is index else file
            texts[name] = rng.choice((_cut, _replaced, _flipped))(rng)
        else:
            change(target, rng)
    write(directory, base, texts, index=rng.random() < 0.9)
    _break_a_file(directory, rng)


def change(value: Any, rng: random.Random) -> None:
    """Change something somewhere in a JSON object or array: replaced, removed, added, exchanged or renamed."""
    while value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        kind = rng.random()
        if kind < 0.6:
            value[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind < 0.75:
            del value[key]
        elif kind < 0.85:
            other = rng.choice(keys)
            value[key], value[other] = value[other], value[key]
        elif isinstance(value, dict):
            name = rng.choice([text for text in VALUES if isinstance(text, str)])
            value[name] = value.pop(key) if kind < 0.95 else copy.deepcopy(rng.choice(VALUES))
        else:
            value.append(copy.deepcopy(rng.choice(VALUES)))
        return


def _same(text: str) -> str:
    return text


def _cut(rng: random.Random) -> Callable[[str], str]:
    return lambda text: text[: rng.randrange(len(text) + 1)]


def _replaced(rng: random.Random) -> Callable[[str], str]:
    """One of the values of the text becomes one that Python would not write."""

    def replaced(text: str) -> str:
        places = [i for i, c in enumerate(text) if c == ":"]
        at = rng.choice(places) + 1 if places else 0
        return text[:at] + rng.choice(RAW) + (text[at + 1 :] if rng.random() < 0.5 else "}")

    return replaced


def _flipped(rng: random.Random) -> Callable[[str], str]:
    def flipped(text: str) -> str:
        at = rng.randrange(len(text) + 1)
        return text[:at] + chr(rng.choice((0, 10, 27, 34, 92, 123, 125, 0xFF, 0xD800))) + text[at + 1 :]

    return flipped


def _write(path: Path, text: str) -> None:
    # A lone surrogate becomes bytes that are no UTF-8.
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _end(entry: Any) -> int:
    try:
        end = entry["data_offsets"][1]
        return end if 0 <= end < 1 << 30 else 0
    except (TypeError, KeyError, IndexError):
        return 0


def _write_shard(path: Path, header: str, size: int) -> None:
    text = header.encode("utf-8", "surrogatepass")
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + size)


def _break_a_file(directory: Path, rng: random.Random) -> None:
    """Now and then a file is empty, cut, a directory, a link to nothing, or not there."""
    if rng.random() > 0.06:
        return
    path = rng.choice(sorted(directory.iterdir()))
    kind = rng.choice(("empty", "cut", "directory", "link", "gone", "length"))
    if kind == "length":
        with path.open("r+b") as stream:
            stream.write(rng.choice((b"\xff" * 8, b"\0" * 8, b"{", (10**9).to_bytes(8, "little"))))
        return
    content = path.read_bytes()[: 1 << 16]
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(directory / "nothing")
