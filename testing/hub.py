"""A Hugging Face hub of one repository on this machine: what `huggingface_hub` asks for, from a directory's files."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


@dataclass
class Hub:
    """What the server serves, and what it was asked for."""

    repository: str
    directory: Path
    token: str | None = None
    """Without it in a request, the repository is not there."""
    gated: bool = False
    """Whether its terms were not accepted."""
    ranges: bool = True
    """Whether range requests are answered as such."""
    endpoint: str = ""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes by file."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` at `hub.endpoint`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args: Any) -> None:
        """Nothing: the tests' output is theirs."""

    def _answer(self, body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        info = re.fullmatch(rf"/api/models/{hub.repository}(?:/revision/(.+))?", path)
        file = re.fullmatch(rf"/{hub.repository}/resolve/([^/]+)/(.+)", path)
        allowed = hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"
        if not allowed or not (info or file):
            self._refuse(401, "RepoNotFound")
        elif hub.gated:
            self._refuse(403, "GatedRepo")
        elif (info or file)[1] not in (*REVISIONS, None):  # type: ignore[index]
            self._refuse(404, "RevisionNotFound")
        elif info:
            names = [str(each.relative_to(hub.directory)) for each in hub.directory.rglob("*") if each.is_file()]
            siblings = [{"rfilename": name} for name in sorted(names)]
            self._send(200, json.dumps({"id": hub.repository, "sha": COMMIT, "siblings": siblings}).encode(), {})
        else:
            assert file is not None
            self._file(file[2], body)

    def _file(self, name: str, body: bool) -> None:
        path = self.hub.directory / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        size = path.stat().st_size
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.hub.ranges else None
        if wanted and int(wanted[1]) >= size:
            self._send(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        begin, end = (int(wanted[1]), min(int(wanted[2]) + 1, size)) if wanted else (0, size)
        if wanted:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        content = b""
        if body and end - begin < 1 << 24:
            with path.open("rb") as stream:
                stream.seek(begin)
                content = stream.read(end - begin)
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(content)
        self._send(206 if wanted else 200, content, headers, end - begin)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
