"""A Hub of one folder on 127.0.0.1, as far as huggingface_hub 1.33 asks: model info, files with ranges."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/tiny"


@dataclass
class FakeHub:
    """What the Hub holds (``folder``), what it sent (``served``: file -> bytes), and how it misbehaves:

    ``fault`` answers everything with an error; ``lie`` takes every revision for ``COMMIT`` and announces
    false sha256; without ``ranges`` it sends whole files. ``commit`` is what branch ``main`` is at.
    ``asked`` is told of every file that is wanted to its end.
    """

    folder: Path
    url: str = ""
    served: dict[str, int] = field(default_factory=dict)
    fault: str = ""
    lie: bool = False
    ranges: bool = True
    commit: str = COMMIT
    asked: Callable[[str], None] = lambda _: None


FAULTS = {
    "gated": (403, "GatedRepo"),
    "absent": (404, "RepoNotFound"),
    "refused": (403, ""),
    "broken": (500, ""),
}


class _Server(ThreadingHTTPServer):
    hub: FakeHub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Model info or a file."""
        hub = cast("_Server", self.server).hub
        path = self.path.partition("?")[0]
        info = re.fullmatch(rf"/api/(?:models|datasets)/{REPO}(?:/revision/(.+))?", path)
        file = re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path)
        if hub.fault:
            status, code = FAULTS[hub.fault]
            self._send(status, b"", {"X-Error-Code": code} if code else {})
        elif info and (hub.lie or info[1] in (None, "main", hub.commit)):
            self._send(200, json.dumps(_info(hub)).encode(), {"Content-Type": "application/json"})
        elif info:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif file and file[1] == hub.commit and (hub.folder / file[2]).is_file():
            self._send_file(hub, file[2])
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _send_file(self, hub: FakeHub, name: str) -> None:
        content = (hub.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": hub.commit}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "GET" and not (wanted and wanted[2]):
            hub.asked(name)
        if not wanted or not hub.ranges:
            return self._send(200, content, headers, name)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], headers, name)

    def _send(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            if name:
                served = cast("_Server", self.server).hub.served
                served[name] = served.get(name, 0) + len(body)
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


def _info(hub: FakeHub) -> dict[str, object]:
    siblings = []
    for path in sorted(path for path in hub.folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest = "f" * 64 if hub.lie else hashlib.sha256(content).hexdigest()
        lfs = {"sha256": digest, "size": len(content), "pointerSize": 100}
        large = {"lfs": lfs} if path.suffix == ".safetensors" else {}
        siblings.append(
            {
                "rfilename": path.relative_to(hub.folder).as_posix(),
                "size": len(content),
                "blobId": "0" * 40,
                **large,
            }
        )
    return {"id": REPO, "sha": hub.commit, "siblings": siblings}


@contextmanager
def serve(folder: Path) -> Iterator[FakeHub]:
    """A Hub that serves ``folder`` until the block ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = FakeHub(folder, f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
