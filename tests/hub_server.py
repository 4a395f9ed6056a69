"""A local, in-memory hub: the HTTP calls with which huggingface_hub publishes or downloads a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

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
    licences: tuple[str, ...] = ("apache-2.0", "cc-by-4.0", "other")  # that it accepts in model cards

    def clear(self) -> None:
        """Forget everything but the address."""
        self.__init__(self.address)  # type: ignore[misc]

    def add(self, name: str, folder: Path) -> None:
        """Add the files of a folder as a repository."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.repositories[name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


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
            is_open = path.startswith("/objects/") or path == "/api/validate-yaml"
            if not is_open and self.headers.get("Authorization") != f"Bearer {TOKEN}":
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
            download = self._download(path)
            if download is not None:
                return download
            if path == "/api/validate-yaml":
                licence = yaml.safe_load(json.loads(body or b"{}")["content"].split("---")[1]).get("license")
                if licence in (None, *hub.licences):
                    return 200, {"errors": [], "warnings": []}
                return 400, f'"license" must be one of {", ".join(hub.licences)}'.encode()
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
            if len(parts) > 5 and parts[3] == "resolve":
                file = hub.repositories.get("/".join(parts[1:3]), {}).get("/".join(parts[5:]))
                return (404, {"error": f"no such file: {path}"}) if file is None else (200, file)
            if path.startswith("/api/models/") and len(parts) >= 7:
                name, what = f"{parts[3]}/{parts[4]}", parts[5]
                if what == "preupload":
                    return 200, {"files": [_mode(file) for file in json.loads(body or b"{}")["files"]]}
                if what == "commit":
                    self._commit(hub.repositories[name], (body or b"").splitlines())
                    return 200, {"commitUrl": f"{hub.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True}
            return 404, {"error": f"no such path: {path}"}

        def _download(self, path: str) -> tuple[int, Any] | None:
            """Answer a request for a repository's list of files, or for one of them; None for other requests."""
            listed = re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/.*)?", path)
            if listed and listed[1] in hub.repositories:
                files = hub.repositories[listed[1]]
                if listed[2] == "tree":
                    return 200, [{"type": "file", "path": file, "size": len(content), "oid": "1" * 40}
                                 for file, content in files.items()]  # fmt: skip
                siblings = [{"rfilename": file} for file in files]
                return 200, {"id": listed[1], "sha": _commit_of(path), "siblings": siblings}
            file = re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
            if file and file[2] in hub.repositories.get(file[1], {}):
                return 200, hub.repositories[file[1]][file[2]]
            return None

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
                self.send_header("X-Repo-Commit", _commit_of(self.path))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _commit_of(path: str) -> str:
    """Return the commit that a path asks for, by itself or as the newest of its repository."""
    asked = re.search(r"/(?:revision|resolve)/([0-9a-f]{40})\b", path)
    return asked[1] if asked else COMMIT


def _mode(asked: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if asked["path"].endswith(".safetensors") else "regular"
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
