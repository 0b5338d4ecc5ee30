"""The benchmark of the API server runs, on short lengths."""

from __future__ import annotations

import re

from benchmarks import serving


def test_one_line_for_each_length(capsys):
    serving.main(["--lengths", "100", "200", "--stock"])
    time = r"\d+\.\d\d s"
    line = rf"{{}} characters: whole {time}; streamed {time}; vLLM's, whole {time}; vLLM's, streamed {time}; "
    body = rf"body of \d+ MB {time}\n"
    assert re.fullmatch("".join(line.format(length) + body for length in (100, 200)), capsys.readouterr().out)


def test_the_argument_is_read_as_it_was_written():
    reply = serving.whole(serving.ours(), serving.reply_of(300), serving.TOOLS)
    assert len(reply.arguments[0]["text"]) == 300
