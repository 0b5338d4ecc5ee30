"""What a logger says: vLLM's loggers reach no root handler once vLLM has configured logging, nor pytest's caplog."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


class Recorder(logging.Handler):
    """Keeps the records and their lines, exceptions included."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.lines.append(self.format(record))


@contextlib.contextmanager
def recorded(name: str) -> Iterator[Recorder]:
    """Everything from INFO that the logger `name` and those below it say inside the block."""
    logger, recorder = logging.getLogger(name), Recorder()
    level = logger.level
    logger.addHandler(recorder)
    logger.setLevel(logging.INFO)
    try:
        yield recorder
    finally:
        logger.removeHandler(recorder)
        logger.setLevel(level)
