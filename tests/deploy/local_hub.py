"""A stand-in for the Hugging Face Hub on this machine: what its client asks when bundles are pushed and pulled."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local_token_for_tests"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: commits by their hash, the newest last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        """Of a repository -> the header of its card."""
        self.asked: list[str] = []
        """Method and path of every request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str) -> dict[str, bytes]:
        return list(self.commits[repository].values())[-1]

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        body = json.dumps({k: hashlib.sha256(v).hexdigest() for k, v in files.items()}, sort_keys=True)
        sha = hashlib.sha1(f"{len(self.commits[repository])}{body}".encode()).hexdigest()
        self.commits[repository][sha] = files
        return sha


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def _answer(
        self, status: int, value: Any = None, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> None:
        body = body or (b"" if value is None else json.dumps(value).encode())
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str = "RepoNotFound") -> None:
        self._answer(404, {"error": "not found"}, {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _path(self) -> list[str]:
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        return [unquote(part) for part in path.strip("/").split("/")]

    def _revision(self, repository: str, name: str) -> str | None:
        commits = self.server.commits.get(repository)
        if not commits:
            return None
        return list(commits)[-1] if name == "main" else name if name in commits else None

    def do_GET(self) -> None:
        parts, hub = self._path(), self.server
        if parts[:2] == ["api", "models"]:
            repository = "/".join(parts[2:4])
            if repository not in hub.commits:
                return self._missing()
            sha = self._revision(repository, parts[5] if len(parts) > 5 else "main")
            if sha is None and hub.commits[repository]:
                return self._missing("RevisionNotFound")
            names = hub.commits[repository].get(sha or "", {})
            siblings = [{"rfilename": name} for name in names]
            return self._answer(
                200,
                {
                    "_id": "0",
                    "id": repository,
                    "sha": sha,
                    "siblings": siblings,
                    "private": hub.private[repository],
                },
            )
        if len(parts) > 4 and parts[2] == "resolve":
            repository, name = "/".join(parts[:2]), "/".join(parts[4:])
            sha = self._revision(repository, parts[3])
            if sha is None:
                return self._missing()
            data = hub.commits[repository][sha].get(name)
            if data is None:
                return self._missing("EntryNotFound")
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            return self._answer(
                200, headers={"X-Repo-Commit": sha, "ETag": etag, "Content-Length": str(len(data))}, body=data
            )
        return self._missing()

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self) -> None:
        (_, oid), data = self._path(), self._body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.large[oid] = data
        self._answer(200)

    def do_POST(self) -> None:
        parts, body, hub = self._path(), self._body(), self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            if repository in hub.commits:
                return self._answer(409, {"url": f"{hub.url}/{repository}"})
            hub.commits[repository] = {}
            hub.private[repository] = asked.get("visibility") == "private" or bool(asked.get("private"))
            return self._answer(200, {"url": f"{hub.url}/{repository}", "id": repository})
        if parts == ["api", "validate-yaml"]:
            content = json.loads(body)["content"]
            hub.headers[""] = content.split("---\n")[1]
            return self._answer(200, {"errors": [], "warnings": []})
        if parts[-2:-1] == ["preupload"]:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".onnx")) else "regular",
                }
                for one in files
            ]  # fmt: skip
            return self._answer(200, {"files": modes})
        if parts[-2:] == ["objects", "batch"]:
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer(
                200,
                {"transfer": "basic", "objects": objects},
                {"Content-Type": "application/vnd.git-lfs+json"},
            )
        if parts[-2:-1] == ["commit"]:
            repository = "/".join(parts[2:4])
            files = dict(self.server.files(repository)) if hub.commits[repository] else {}
            for line in body.splitlines():
                one = json.loads(line)
                value = one["value"]
                if one["key"] == "file":
                    assert value["encoding"] == "base64"
                    files[value["path"]] = base64.b64decode(value["content"])
                elif one["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                elif one["key"] == "deletedFile":
                    del files[value["path"]]
            sha = hub.commit(repository, files)
            return self._answer(200, {"commitUrl": f"{hub.url}/{repository}/commit/{sha}", "commitOid": sha})
        return self._missing()


@contextmanager
def local_hub() -> Iterator[Hub]:
    """The stand-in, answering in the background."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
