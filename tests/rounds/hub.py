"""A stand-in of the hub's API, on loopback: repositories are created and files committed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub:
    """What was asked of it, and what it holds."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.refuses = False
        self.endpoint = ""

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        if self.refuses:
            return 403, {"error": "You have no right to write here"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = asked
            return 200, {"url": f"{self.endpoint}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            kept = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **kept} for file in asked]}
        if "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            name = path.split("/api/models/")[1].split("/commit/")[0]
            url = f"{self.endpoint}/{name}/commit/0"
            return 200, {"commitUrl": url, "commitOid": "0" * 40, "success": True}
        return 404, {"error": f"nothing at {path}"}


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = hub.answer(self.path.split("?")[0], body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
