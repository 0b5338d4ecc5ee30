"""Every tensor of a checkpoint by name, from the safetensors headers alone: seconds for 150 GB, and no torch.

A safetensors file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes, which the
header divides without gaps. Anything inconsistent is refused here, before a load that would fail.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import parse_json, printable, shown
from .errors import CheckpointError

INDEX = "model.safetensors.index.json"
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# What scales may be stored in, and what plain tensors may.
FLOAT_CODES = ("BF16", "F16", "F32")
PLAIN_CODES = (*FLOAT_CODES, "F64")

# safetensors' own limit; other files have an absurd length here.
_MAX_HEADER = 100_000_000
_LFS_POINTER = b"version https://git-lfs"
_LONGEST_NAME = 255  # bytes, in the file systems of Linux
_PICKLES = ("*.bin", "*.pt", "*.pth")
_MAX_LISTED = 5
_MAX_DIMENSIONS, _LARGEST = 64, 1 << 63


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a safetensors header says of one tensor.

    Attributes:
        dtype: safetensors' code: "BF16", "F8_E4M3", "I32", ...
        name: The stored name.
        file: The file that declares it; empty if only the tensor itself was seen.
        offsets: First byte and the one after the last, counted from the start of `file`.
    """

    dtype: str
    shape: tuple[int, ...]
    name: str = ""
    file: Path = Path()
    offsets: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def read_headers(directory: str | Path) -> dict[str, TensorHeader]:
    """All tensors in the shards that `model.safetensors.index.json` lists, or in every *.safetensors without one.

    Raises:
        CheckpointError: with the file and, if any, the tensor: no such directory, a pickle checkpoint, a shard that
            is missing, truncated or not a safetensors file, a tensor that is not in the shard where the index
            places it, a tensor in two shards.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory. Pass the directory that holds config.json and the shards."
        )
    index = read_index(directory)
    files = sorted(set(index.values())) if index is not None else _list_files(directory)
    missing = [file for file in files if not _is_file(directory / file)]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of the {len(files)} shards that {INDEX} lists are missing: "
            f"{_some(missing)}. Download them into this directory."
        )
    return merge_headers(directory, index or {}, (read_file_header(directory / file) for file in files))


def merge_headers(
    where: str | Path, index: Mapping[str, str], shards: Iterable[Iterable[TensorHeader]]
) -> dict[str, TensorHeader]:
    """The tensors of all shards by name.

    Raises:
        CheckpointError: a tensor is in two shards, or not in the shard where the index places it.
    """
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        for tensor in shard:
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{where}: tensor {tensor.name} is in {other.file.name} {list(other.shape)} and again in "
                    f"{tensor.file.name} {list(tensor.shape)}. Remove the shards that do not belong to this checkpoint."
                )
    _check_index(where, index, tensors)
    return tensors


def holds_weights(directory: str | Path) -> bool:
    """Whether `directory` is one, with an index, shards or pickles in it."""
    directory = Path(directory)
    return (directory / INDEX).exists() or any(
        True for pattern in ("*.safetensors", *_PICKLES) for _ in directory.glob(pattern)
    )


def read_file_header(file: Path) -> list[TensorHeader]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: see `read_headers`.
    """
    try:
        size, length, text = _read_header_text(file)
    except OSError as error:
        raise _unreadable(file, error) from error
    return parse_header(file, size, 8 + length, text)


def parse_header(file: Path, size: int, start: int, text: bytes) -> list[TensorHeader]:
    """The tensors that a header, `text`, describes, in the order of their bytes.

    Args:
        file: What messages call the file; it need not be on this machine.
        size: Of the whole file.
        start: Where the header ends and the tensors begin.

    Raises:
        CheckpointError: see `read_headers`.
    """
    try:
        header = parse_json(text)
    except ValueError as error:
        raise _broken(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(file, f"its header is a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    tensors = [_tensor(file, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: tensor.offsets)
    _check_extent(file, tensors, start, size)
    return tensors


def header_length(file: Path, size: int, start: bytes) -> int:
    """The length of a header, which the first 8 bytes of its file give; `start` holds at least as many as a file has.

    Raises:
        CheckpointError: see `read_headers`.
    """
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else _MAX_HEADER + 1
    if length > _MAX_HEADER:
        if start.startswith(_LFS_POINTER):
            raise CheckpointError(
                f"{file} is a Git LFS pointer of {size} bytes, not the tensors. Run `git lfs pull` in its directory."
            )
        raise _broken(file, f"its {size} bytes do not start with the length of a header up to {_MAX_HEADER} bytes")
    if 8 + length > size:
        raise _truncated(file, size, f"its header alone needs {8 + length}")
    return length


def _read_header_text(file: Path) -> tuple[int, int, bytes]:
    """The sizes of the file and of its header, and the header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8 + len(_LFS_POINTER))
        length = header_length(file, size, start)
        stream.seek(8)
        return size, length, stream.read(length)


def read_index(directory: Path) -> dict[str, str] | None:
    """Shard file by tensor name; None where there is no index.

    Raises:
        CheckpointError: it cannot be read, or is not an index of files of the same directory.
    """
    path = directory / INDEX
    if not path.exists():
        return None
    try:
        return parse_index(path, path.read_bytes())[0]
    except OSError as error:
        raise _unreadable(path, error) from error


def parse_index(path: Path, content: bytes) -> tuple[dict[str, str], int | None]:
    """Shard file by tensor name, and the bytes of all tensors where the index gives them.

    Raises:
        CheckpointError: see `read_index`.
    """
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Download it again.") from error
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor names to shard files. Download it again.")
    good: set[str] = set()
    for name, file in weight_map.items():
        # vLLM looks for shards in the checkpoint's own directory only.
        if not isinstance(file, str) or file not in good:
            if not isinstance(file, str) or not _is_file_name(file) or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path} places tensor {printable(name)} in {shown(file)}: it must be a *.safetensors file of the "
                    f"same directory. Download the index again."
                )
            good.add(file)
    metadata = parsed.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, total if type(total) is int and total > 0 else None


def _is_file_name(name: str) -> bool:
    """Whether a file of the same directory can have this name."""
    return Path(name).name == name and name.isprintable() and len(name.encode()) <= _LONGEST_NAME


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from error


def _list_files(directory: Path) -> list[str]:
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds pickled weights only ({_some(pickles)}), which are not loaded: a pickle can run any "
            f"code when it is read. Use a safetensors copy, or convert them if you trust their source."
        )
    raise CheckpointError(f"{directory} has no *.safetensors file. Download the checkpoint's shards into it.")


def _tensor(file: Path, name: str, entry: Any, start: int) -> TensorHeader:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = DTYPE_BITS.get(dtype)
        numbers_are_sane = all(type(number) is int and 0 <= number < _LARGEST for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(file, f"tensor {printable(name)} is described as {shown(entry)}") from error
    if bits is None:
        raise CheckpointError(
            f"{file}: tensor {printable(name)} has dtype {shown(dtype)}, which is not known. Use a checkpoint with "
            f"dtypes of {', '.join(DTYPE_BITS)}."
        )
    if not name.isprintable():
        raise _broken(file, f"the name of tensor {printable(name)} has characters that no name has")
    if len(shape) > _MAX_DIMENSIONS or not numbers_are_sane or (end - begin) * 8 != math.prod(shape) * bits:
        text = f"tensor {name}, {dtype} {shown(list(shape))}, does not fill its bytes {shown(begin)} to {shown(end)}"
        raise _broken(file, text)
    return TensorHeader(dtype, shape, name, file, (start + begin, start + end))


def _check_extent(file: Path, tensors: list[TensorHeader], start: int, size: int) -> None:
    """The tensors, sorted, must fill the file from `start` to `size`, byte for byte."""
    position = start
    for tensor in tensors:
        if tensor.offsets[0] != position:
            what = "overlaps the tensor before it" if tensor.offsets[0] < position else "leaves a gap before it"
            raise _broken(file, f"tensor {tensor.name} at byte {tensor.offsets[0]} {what}, which ends at {position}")
        position = tensor.offsets[1]
    if position > size:
        cut = [tensor.name for tensor in tensors if tensor.offsets[1] > size]
        raise _truncated(file, size, f"it should have {position}; {len(cut)} tensors are cut off, first {cut[0]}")
    if position < size:
        raise _broken(file, f"it has {size} bytes, but its tensors end at {position}")


def _check_index(where: str | Path, index: Mapping[str, str], tensors: dict[str, TensorHeader]) -> None:
    for name, file in index.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.file.name != file:
            found = f"; it is in {tensor.file.name}" if tensor is not None else " nor in any other listed shard"
            raise CheckpointError(
                f"{where}: {INDEX} places tensor {printable(name)} in {file}, but it is not there{found}. The "
                f"index and the shards come from different revisions: download both again."
            )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror}. Put a readable file there, or download it again.")


def _truncated(file: Path, size: int, should: str) -> CheckpointError:
    return CheckpointError(f"{file} is truncated: it has {size} bytes, {should}. Download it again.")


def _broken(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a valid safetensors file: {what}. Download it again.")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
