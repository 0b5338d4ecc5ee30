"""Processor time of the API server for one long string argument and for one long request, by their length.

    python -m benchmarks.serving [--lengths 16000 64000 256000] [--stock]

Prints one line for each length: the argument parsed when it is complete, streamed four tokens at a time, and, with
--stock, the same by vLLM's own parsers; and the body of a request read in chunks of 64 KiB by StrictRequests. All of
these run on the event loop that serves every client, so they must not grow faster than the length.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable
from typing import Any

from testing.serving.messages import tool
from testing.serving.parsing import Parsers, ours, stock, streamed, whole
from vllm_deepseek_v4flash.serving.middleware import CHAT, StrictRequests

LENGTHS = (16_000, 64_000, 256_000)
BODY_BYTES_PER_CHARACTER = 250  # 64 MB next to 256,000 characters
CHUNK = 1 << 16
TOOLS = [tool("write_file", "Writes a file.", text={"type": "string"})]


def reply_of(length: int, seed: int = 0) -> str:
    """A call with one string of `length` characters that are hard on a parser: brackets, quotes, escapes."""
    text = "".join(random.Random(seed).choices('abcdefgh \n<>|{}"\\', k=length))
    call = (
        f'<｜DSML｜invoke name="write_file">\n<｜DSML｜parameter name="text" string="true">{text}</｜DSML｜parameter>'
    )
    return f"R</think>\n\n<｜DSML｜tool_calls>\n{call}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"


def body_of(size: int) -> bytes:
    """A chat request of about `size` bytes."""
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * size}]}).encode()


def read_body(content: bytes) -> None:
    """Have StrictRequests read and judge a body that comes in chunks."""
    starts = iter(range(0, len(content), CHUNK))

    async def receive() -> dict[str, Any]:
        start = next(starts)
        return {
            "type": "http.request",
            "body": content[start : start + CHUNK],
            "more_body": start + CHUNK < len(content),
        }

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(StrictRequests(app)(scope, receive, None))  # type: ignore[arg-type]


def seconds(function: Callable[[], Any]) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(length: int, with_stock: bool) -> dict[str, float]:
    """Processor seconds by what was done, for an argument of `length` characters."""
    text = reply_of(length)
    parsers: dict[str, Parsers] = {"": ours()} | ({"vLLM's, ": stock()} if with_stock else {})
    found = {}
    for name, pair in parsers.items():
        found[f"{name}whole"] = seconds(lambda pair=pair: whole(pair, text, TOOLS))  # type: ignore[misc]
        found[f"{name}streamed"] = seconds(lambda pair=pair: streamed(pair, text, TOOLS, step=4))  # type: ignore[misc]
    content = body_of(length * BODY_BYTES_PER_CHARACTER)
    return found | {f"body of {len(content) / 1e6:.0f} MB": seconds(lambda: read_body(content))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="characters of the argument")
    parser.add_argument("--stock", action="store_true", help="also vLLM's parsers, which take minutes")
    options = parser.parse_args(arguments)
    whole(ours(), "R</think>A", TOOLS)  # what is loaded once
    read_body(body_of(1))
    for length in options.lengths:
        found = measure(length, options.stock)
        print(
            f"{length} characters: " + "; ".join(f"{name} {value:.2f} s" for name, value in found.items()), flush=True
        )


if __name__ == "__main__":
    main()
