"""Requests for examples/offline_batch.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "offline_batch.py"


def line(custom_id: str, content: str = "14+36?", **body: Any) -> dict[str, Any]:
    """One line of the input, as an object."""
    return {"custom_id": custom_id, "body": {"messages": [{"role": "user", "content": content}], **body}}
