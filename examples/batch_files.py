"""The files of offline_batch.py: requests are read and checked before anything runs, results are appended."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

URL = "/v1/chat/completions"
LINE_KEYS = ("custom_id", "method", "url", "body")
CHAT_KEYS = ("messages", "tools", "reasoning_effort", "chat_template_kwargs")
INTEGER, NUMBER = "an integer of at most 64 bits", "a number"
# vLLM checks ranges, but not all types: a seed that is a text would end the engine, with all requests in it.
SAMPLING = {
    "max_tokens": INTEGER, "min_tokens": INTEGER, "temperature": NUMBER, "top_p": NUMBER, "top_k": INTEGER,
    "min_p": NUMBER, "seed": INTEGER, "stop": "a text or a list of texts", "ignore_eos": "true or false",
    "presence_penalty": NUMBER, "frequency_penalty": NUMBER, "repetition_penalty": NUMBER,
    "thinking_token_budget": INTEGER,
}  # fmt: skip
# `max_completion_tokens` is OpenAI's newer name of `max_tokens`.
TYPES = SAMPLING | {"max_completion_tokens": INTEGER}
BODY_KEYS = ("model", *CHAT_KEYS, *TYPES)  # `model` is accepted, but --model decides.


class BatchError(Exception):
    """An error that is shown to the user without a traceback."""


@dataclass(frozen=True)
class Request:
    """One line of the input."""

    custom_id: str
    body: dict[str, Any]

    @cached_property
    def id(self) -> str:
        """The id of the result, which depends on the body: another body with the same custom_id has another id."""
        return f"batch_req_{hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()[:16]}"


def result(request: Request, **content: Any) -> dict[str, Any]:
    return {"id": request.id, "custom_id": request.custom_id, **content}


def encode(row: dict[str, Any]) -> bytes:
    """`row` as JSON. A lone surrogate, which UTF-8 does not have, becomes the escape that JSON has for it."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def read_requests(path: Path) -> list[Request]:
    """All lines of the input; BatchError with the first line that is not a request."""
    try:
        # Not splitlines, which also splits at characters that JSON text may contain.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BatchError(f"{path} cannot be read: {error}") from error
    requests: dict[str, Request] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = parse_request(line)
            if request.custom_id in requests:
                raise ValueError(f"custom_id {request.custom_id!r} was there before: each must be used once")
        except RecursionError as error:
            raise BatchError(f"{path}, line {number} is nested too deeply") from error
        except ValueError as error:
            raise BatchError(f"{path}, line {number}: {error}") from error
        requests[request.custom_id] = request
    return list(requests.values())


def parse_request(line: str) -> Request:
    """The request of one line; ValueError with what is wrong and what is allowed."""
    row = json.loads(line, parse_float=finite, parse_constant=finite)
    if not isinstance(row, dict):
        raise ValueError(f"the line is {type(row).__name__}, and must be an object with {', '.join(LINE_KEYS)}")
    custom_id, body = row.get("custom_id"), row.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id is {custom_id!r}, and must be a text that is not empty")
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ValueError("body must be an object with a list of messages that is not empty")
    if row.get("url", URL) != URL:
        raise ValueError(f"url is {row['url']!r}; only {URL} is answered")
    unknown = sorted([*row.keys() - set(LINE_KEYS), *(f"body.{key}" for key in body.keys() - set(BODY_KEYS))])
    if unknown:
        raise ValueError(f"{', '.join(unknown)} would be ignored; allowed in body: {', '.join(BODY_KEYS)}")
    for key, wanted in TYPES.items():
        if body.get(key) is not None and not fits(body[key], wanted):
            raise ValueError(f"body.{key} is {body[key]!r}, and must be {wanted}")
    request = Request(custom_id, body)
    _ = request.id  # fails here, and not later, if `body` is too deep for json.dumps
    return request


def finite(text: str) -> float:
    """A number of the input; ValueError for NaN and Infinity, which are not JSON, and for what overflows to them."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def fits(value: Any, wanted: str) -> bool:
    if wanted == INTEGER:
        return type(value) is int and -(2**63) <= value < 2**63
    if wanted == NUMBER:
        return type(value) is float or fits(value, INTEGER)
    if wanted == SAMPLING["ignore_eos"]:
        return isinstance(value, bool)
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


class Results:
    """The output file: a whole line for each finished request and nothing else, whenever the run ends.

    A line counts when its line break is on disk. What follows the last line break is what a killed run was writing;
    `check` cuts it off, when every line is known to be of this batch. Until then the file is only read. Two runs cannot
    have the same file open. Every OSError becomes a BatchError.
    """

    def __init__(self, path: Path, source: Path | None = None) -> None:
        """Open and read `path`, which must not be `source`, the input."""
        self.path = path
        self.ids: dict[str, str] = {}
        self.refused = 0
        self._whole = 0  # bytes up to and including the last line break
        self._torn = b""
        try:
            # Opening a pipe or a device could wait or have an effect.
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):
                raise BatchError(f"{path} is no regular file: give another output file")
            if source is not None and path.exists() and path.samefile(source):
                raise BatchError(f"{path} is the input: give another output file")
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise BatchError(f"{path} cannot be written: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
            sync_directory(path.resolve().parent)  # the file's name must be on disk, too
        except BlockingIOError:
            self.close()
            raise BatchError(f"another run is writing {path}: wait for it, or give another output file") from None
        except OSError as error:
            self.close()
            raise BatchError(f"{path} cannot be used: {error}") from error
        except BatchError:
            self.close()
            raise

    def _read(self) -> None:
        with open(self._file, "rb", closefd=False) as stream:
            for number, line in enumerate(stream, 1):
                if not line.endswith(b"\n"):
                    self._torn = line
                    break
                try:
                    row = json.loads(line)
                    if row["custom_id"] in self.ids:
                        raise ValueError(f"custom_id {row['custom_id']!r} was there before")
                    self._count(row)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise BatchError(
                        f"{self.path}, line {number} is no result of this program ({describe(error)}): "
                        "give another output file"
                    ) from error
                self._whole += len(line)

    def _count(self, row: dict[str, Any]) -> None:
        self.refused += row["error"] is not None
        self.ids[row["custom_id"]] = row["id"]

    def check(self, requests: Sequence[Request]) -> None:
        """Cut off a torn last line; BatchError if the file has anything else than results of these requests."""
        expected = {request.custom_id: request.id for request in requests}
        for custom_id, found in self.ids.items():
            if expected.get(custom_id) != found:
                what = "whose body was another one" if custom_id in expected else "which the input does not have"
                raise BatchError(
                    f"{self.path} has a result of custom_id {custom_id!r}, {what}: give another output file"
                )
        if not self._torn:
            return
        # After a power cut some file systems have zeros where the data were to be.
        torn = self._torn.rstrip(b"\0")
        heads = (encode(result(request))[:-1] + b", " for request in requests if request.custom_id not in self.ids)
        # Without a whole line the file is known by an id of these requests: "{" or zeros may be anyone's.
        known = self._whole > 0 or len(torn) >= len('{"id": "batch_req_0123456789abcdef')
        if not known or not any(head.startswith(torn) or torn.startswith(head) for head in heads):
            raise BatchError(
                f"{self.path} ends with {torn[:80]!r}, which is no result of these requests and has no line break: "
                "give another output file"
            )
        try:
            os.ftruncate(self._file, self._whole)
        except OSError as error:
            raise BatchError(f"{self.path} cannot be written: {error}") from error

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows; returns when they are on disk. BatchError if they cannot be, and then whole lines are kept."""
        data, written = b"".join(encode(row) + b"\n" for row in rows), 0
        try:
            if not os.path.samestat(os.fstat(self._file), self.path.stat()):
                raise FileNotFoundError(errno.ENOENT, "it was replaced by another file")
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            self._whole += data[:written].rfind(b"\n") + 1
            with suppress(OSError):  # then the next run cuts the torn line off
                os.ftruncate(self._file, self._whole)
            raise BatchError(
                f"{self.path} cannot be written: {error}. The results in it are whole; the same command continues."
            ) from error
        self._whole += len(data)
        for row in rows:
            self._count(row)

    def close(self) -> None:
        os.close(self._file)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such operation
            raise
    finally:
        os.close(descriptor)
