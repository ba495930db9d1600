"""A hub on this machine: as much of the HuggingFace hub's HTTP interface as downloading takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories.

    Args:
        repositories: folders by `datasets/organisation/name` or `models/organisation/name`.
    """

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {
            name: {
                str(path.relative_to(folder)): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            for name, folder in repositories.items()
        }
        self.made: dict[str, Any] = {}
        """What was asked for of each repository that a client made."""
        self.pushed: dict[str, dict[str, bytes]] = {}
        """Files that were uploaded to each repository."""
        self.served: list[str] = []
        """`repository/file` of every file that was sent."""

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables with which the hub's clients come here, and keep what they get in `cache`."""
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer({})

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            return self._make(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            return self._send_json({"files": files})
        if path.endswith("/commit/main"):
            return self._commit(
                path.removeprefix("/api/models/").removesuffix("/commit/main"), body
            )
        if "json" in self.headers.get("Content-Type", ""):
            self._answer(json.loads(body))
        else:
            self._answer(parse_qs(body.decode()))

    def _answer(self, form: Mapping[str, Any]) -> None:
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        for repository, files in self.server.files.items():
            if path == f"api/{repository}" or path.startswith(f"api/{repository}/"):
                return self._tell(path.removeprefix(f"api/{repository}"), repository, files, form)
            place = repository.removeprefix("models/") + "/resolve/"
            if path.startswith(place):
                return self._send_file(
                    path.removeprefix(place).partition("/")[2], repository, files
                )
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _make(self, asked: Mapping[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.headers.get("Authorization"):
            return self._send(401, b"", {"X-Error-Message": "Invalid username or password."})
        self.server.made[name] = dict(asked)
        self.server.pushed.setdefault(name, {})
        return self._send_json({"url": f"http://127.0.0.1/{name}", "name": name, "id": name})

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                content = base64.b64decode(part["value"]["content"])
                self.server.pushed[name][part["value"]["path"]] = content
        address = f"http://127.0.0.1/{name}/commit/{COMMIT}"
        return self._send_json({"commitUrl": address, "commitOid": COMMIT, "hookOutput": ""})

    def _tell(
        self, what: str, repository: str, files: Mapping[str, bytes], form: Mapping[str, Any]
    ) -> None:
        kind, _, rest = what.removeprefix("/").partition("/")
        if kind in ("", "revision"):
            facts = {
                "id": repository.partition("/")[2],
                "sha": COMMIT,
                "private": False,
                "tags": [],
            }
            return self._send_json({**facts, "siblings": [{"rfilename": name} for name in files]})
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _object_id(data)}
            for name, data in files.items()
        ]
        folder = rest.partition("/")[2]
        if kind == "tree" and not folder:
            return self._send_json(entries)
        if kind == "paths-info":
            return self._send_json([e for e in entries if e["path"] in form["paths"]])
        return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _send_file(self, name: str, repository: str, files: Mapping[str, bytes]) -> None:
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.served.append(f"{repository}/{name}")
        headers = {"ETag": f'"{_object_id(files[name])}"', "X-Repo-Commit": COMMIT}
        return self._send(200, files[name], headers)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _object_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """A hub that serves these folders until the block ends."""
    with Hub(repositories) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
