"""Where a checkpoint is read from: a directory, or a repository on the Hugging Face hub, whole or in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.counts import check_counts
from ..checkpoint.errors import CheckpointError
from ..checkpoint.headers import INDEX, TensorHeader, holds_weights, merge_headers, parse_index, read_headers
from ..config import DeepseekV4Config, parse_json
from .chat_files import ChatFiles, check_chat_files
from .guess import guess_headers
from .hub import HubFiles, is_hub_id

CONFIG = "config.json"
_SINGLE = "model.safetensors"
_MOST_GUESSED = 1_000_000

Basis = Literal["headers", "index", "config"]
"""What the tensors are known from: their headers; an index's names; config.json alone."""


@dataclass(frozen=True)
class Source:
    """What can be read of a checkpoint without its weights.

    Attributes:
        where: What messages call it.
        values: config.json.
        total_size: Bytes of all tensors that the index gives, if it was read.
    """

    where: str
    values: Mapping[str, Any]
    config: DeepseekV4Config
    headers: Sequence[TensorHeader]
    basis: Basis
    chat: ChatFiles
    total_size: int | None = None


def open_source(model: str | Path, revision: str | None = None) -> Source:
    """Read what there is of a directory or of a repository on the hub.

    Args:
        model: A directory, or OWNER/NAME.
        revision: A branch, tag or commit of the repository; None for its main branch.

    Raises:
        CheckpointError: there is nothing to read, or it contradicts itself: see `read_headers`.
    """
    if is_hub_id(str(model)):
        hub = HubFiles(str(model), revision)
        return _of_hub(hub) if hub.snapshot is None else _of_directory(hub.snapshot)
    if revision is not None:
        raise CheckpointError(f"--revision={revision}: {model} is not a repository on the hub. Leave --revision out.")
    return _of_directory(Path(model))


def quantization_config(values: Mapping[str, Any]) -> Any:
    """The quantisation config in config.json, under either of the keys that vLLM reads."""
    found = values.get("quantization_config")
    return values.get("compression_config") if found is None else found


def _of_directory(directory: Path) -> Source:
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory. Pass the one that holds {CONFIG} and the shards, or OWNER/NAME of the "
            f"Hugging Face hub."
        )
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {CONFIG}. Pass the directory of a downloaded checkpoint.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Put a readable file there.") from error
    values, config = _read_config(str(path), content)

    def read(name: str) -> bytes | None:
        try:
            return (directory / name).read_bytes() if (directory / name).is_file() else None
        except OSError as error:
            raise CheckpointError(f"{directory / name} cannot be read: {error.strerror}.") from error

    chat = check_chat_files(read, lambda name: (directory / name).is_file(), str(directory))
    index = directory / INDEX
    if any(directory.glob("*.safetensors")) or (holds_weights(directory) and not index.exists()):
        return Source(str(directory), values, config, list(read_headers(directory).values()), "headers", chat)
    content_of_index = read(INDEX)
    if content_of_index is None:
        return Source(str(directory), values, config, _guessed(config, values, None), "config", chat)
    named, total = parse_index(index, content_of_index)
    return Source(str(directory), values, config, _guessed(config, values, list(named)), "index", chat, total)


def _of_hub(hub: HubFiles) -> Source:
    if CONFIG not in hub.names:
        raise CheckpointError(f"{hub.where} has no {CONFIG}. Pass the repository of a DeepSeek-V4 checkpoint.")
    values, config = _read_config(f"{hub.where}: {CONFIG}", hub.read(CONFIG))
    chat = check_chat_files(
        lambda name: hub.read(name) if name in hub.names else None, hub.names.__contains__, hub.where
    )
    index: dict[str, str] = {}
    files = sorted(name for name in hub.names if name.endswith(".safetensors") and "/" not in name)
    if INDEX in hub.names:
        index, _ = parse_index(Path(hub.where) / INDEX, hub.read(INDEX))
        files = sorted(set(index.values()))
    missing = [name for name in files if name not in hub.names]
    if missing or not files:
        problem = f"{missing[0]}, which {INDEX} lists, is not" if missing else "no *.safetensors file is"
        raise CheckpointError(f"{hub.where}: {problem} in the repository. Pass another revision or repository.")
    headers = list(merge_headers(hub.where, index, hub.headers(files)).values())
    return Source(hub.where, values, config, headers, "headers", chat)


def _read_config(where: str, content: bytes) -> tuple[dict[str, Any], DeepseekV4Config]:
    try:
        values = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}. Download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is a JSON {type(values).__name__}, should be an object. Download it again.")
    try:
        return values, DeepseekV4Config.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _guessed(config: DeepseekV4Config, values: Mapping[str, Any], stored: list[str] | None) -> list[TensorHeader]:
    if stored is not None:
        # Before anything is made up for each layer and expert.
        check_counts(config, [TensorHeader("U8", (), name) for name in stored])
    elif config.num_hidden_layers * config.n_routed_experts > _MOST_GUESSED:
        raise CheckpointError(
            f"num_hidden_layers={config.num_hidden_layers}, n_routed_experts={config.n_routed_experts} in {CONFIG}: no "
            f"model has so many experts, and there are no tensors to compare with. Download the shards, or correct it."
        )
    return guess_headers(config, values, quantization_config(values), stored)
