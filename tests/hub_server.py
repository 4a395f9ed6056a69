"""A local, in-memory hub: the HTTP calls with which huggingface_hub publishes or downloads a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_ofThisTestOnlyAndNoOther"
COMMIT = "0" * 40


@dataclass
class Hub:
    """The content of the server, and how it behaves."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by path
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS objects by SHA-256
    asked: list[str] = field(default_factory=list)
    drops: str | None = None  # requests whose path contains this are cut off


@contextmanager
def local_hub() -> Iterator[Hub]:
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        do_PUT = do_POST
        do_HEAD = do_GET

        def _answer(self, body: bytes | None) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            if hub.drops is not None and hub.drops in self.path:
                self.close_connection = True
                self.connection.close()
                return
            path = self.path.partition("?")[0]
            if not path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(401, {"error": "Invalid username or password."})
                return
            code, value = self._reply(path, body)
            self._send(code, value)

        def _reply(self, path: str, body: bytes | None) -> tuple[int, Any]:
            if path == "/api/whoami-v2":
                return 200, {"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}}
            if path == "/api/repos/create":
                asked = json.loads(body or b"{}")
                name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
                known = name in hub.repositories
                hub.repositories.setdefault(name, {})
                hub.private.setdefault(name, bool(asked.get("private") or asked.get("visibility") == "private"))
                return (409 if known else 200), {"url": f"{hub.address}/{name}", "name": name}
            if path.startswith("/api/datasets/"):
                name = "/".join(path.split("/")[3:5])
                files = hub.repositories[name]
                if "/tree/" in path:
                    return 200, [{"type": "file", "path": file, "size": len(content), "oid": "1" * 40}
                                 for file, content in files.items()]  # fmt: skip
                return 200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            if path.startswith("/datasets/"):
                _, _, owner, name, _, _, file = path.split("/", 6)
                return 200, hub.repositories[f"{owner}/{name}"][file]
            if path == "/api/validate-yaml":
                return 200, {"errors": [], "warnings": []}
            if path.startswith("/objects/"):
                content, name = body or b"", path.removeprefix("/objects/")
                assert hashlib.sha256(content).hexdigest() == name
                hub.objects[name] = content
                return 200, {}
            if path.endswith(".git/info/lfs/objects/batch"):
                wanted = json.loads(body or b"{}")["objects"]
                actions = {"upload": lambda oid: {"href": f"{hub.address}/objects/{oid}"}}
                return 200, {
                    "transfer": "basic",
                    "objects": [{**file, "actions": {name: action(file["oid"]) for name, action in actions.items()}}
                                for file in wanted],
                }  # fmt: skip
            parts = path.split("/")
            if path.startswith("/api/models/") and len(parts) >= 7:
                name, what = f"{parts[3]}/{parts[4]}", parts[5]
                if what == "preupload":
                    return 200, {"files": [_mode(file) for file in json.loads(body or b"{}")["files"]]}
                if what == "commit":
                    self._commit(hub.repositories[name], (body or b"").splitlines())
                    return 200, {"commitUrl": f"{hub.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True}
                if what == "revision":
                    return 200, {"id": name, "sha": COMMIT, "siblings": []}
            return 404, {"error": f"no such path: {path}"}

        def _commit(self, files: dict[str, bytes], lines: list[bytes]) -> None:
            for line in lines:
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]

        def _send(self, code: int, value: Any) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if isinstance(value, bytes):
                self.send_header("ETag", f'"{hashlib.sha256(value).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _mode(asked: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if asked["path"].endswith(".safetensors") else "regular"
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
