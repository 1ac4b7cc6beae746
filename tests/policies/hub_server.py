"""A Hugging Face Hub of one repository, on this machine, whose connection breaks once."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789012345678901234567890123456789"


class Hub(ThreadingHTTPServer):
    """folder: the repository. breaks: a file whose first download ends after two fifths.

    sent: bytes sent of each file. ranges: the first byte of every download that began later.
    """

    daemon_threads = True

    def __init__(self, folder: Path, breaks: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.breaks = folder, breaks
        self.sent: dict[str, int] = {}
        self.ranges: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        files = [f for f in self.server.folder.rglob("*") if f.is_file()]
        names = [f.relative_to(self.server.folder).as_posix() for f in files]
        if re.match(r"/api/models/someone/a-policy(/revision/\w+)?(\?|$)", self.path):
            siblings = [{"rfilename": name} for name in names]
            facts = {"id": "someone/a-policy", "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps({**facts, "private": False, "tags": []}).encode(), {}, body)
            return
        if re.match(r"/api/models/someone/a-policy/tree/", self.path):
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in zip(names, files, strict=True)
            ]
            self._send(json.dumps(tree).encode(), {}, body)
            return
        found = re.match(r"/someone/a-policy/resolve/\w+/([^?]+)", self.path)
        if found is None or found[1] not in names:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if found else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._file(found[1], body)

    def _file(self, name: str, body: bool) -> None:
        data = (self.server.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        first = 0
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and body:
            first = int(asked[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            if first:
                self.server.ranges.append(first)
        self._send(data[first:], headers, body, name, 206 if asked and body else 200)

    def _send(
        self, data: bytes, headers: dict[str, str], body: bool, name: str = "", code: int = 200
    ) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        broken = bool(name) and name == self.server.breaks and name not in self.server.sent
        part = data[: 2 * len(data) // 5] if broken else data
        self.wfile.write(part)
        self.server.sent[name] = self.server.sent.get(name, 0) + len(part)
        if broken:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub(folder: Path, breaks: str = "") -> Iterator[Hub]:
    """Serve while the body runs."""
    server = Hub(folder, breaks)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
