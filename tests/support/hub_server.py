"""A Hugging Face Hub on loopback: the part of its HTTP interface that huggingface_hub and datasets use to read repositories.

Every request is kept in `requests`, so that a test can say what was never asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """kind: "models" or "datasets".  commits: commit → files.  refs: branch or tag → commit."""

    kind: str
    name: str
    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False


@dataclass
class Hub:
    """status: what every request is answered with instead.  cut: how many bytes of a file arrive before the line breaks."""

    url: str
    repositories: list[Repository] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    status: int | None = None
    cut: int | None = None

    def add(self, kind: str, name: str, files: dict[str, bytes], **settings: Any) -> str:
        """A repository with one commit on main; returns the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()
        self.repositories.append(Repository(kind, name, {commit: files}, {"main": commit}, **settings))
        return commit

    def fetched(self) -> set[str]:
        """Paths of the files whose bytes were asked for."""
        return {path.split("/", 5)[-1] for method, path in self.requests if method == "GET" and "/resolve/" in path}

    def environment(self, home: Path) -> dict[str, str]:
        """For a child process that is to use this Hub, with an empty or an earlier home."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        return own | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub without repositories on a free port, stopped at the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: the requests are kept."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        if hub.status is not None:
            return self._send(hub.status)
        parts = path.strip("/").split("/")
        if parts[0] == "api" and parts[1:2] in (["models"], ["datasets"]):
            return self._api(hub, parts[1], parts[2:], body)
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file(hub, kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._send(404)

    def _api(self, hub: Hub, kind: str, parts: list[str], body: bytes) -> None:
        """/api/KIND/ORG/NAME/VERB/REVISION[/FOLDER]"""
        name, verb, revision, folder = "/".join(parts[:2]), *parts[2:4], "/".join(parts[4:])
        found = self._find(hub, kind, name, revision)
        if found is None:
            return None
        repository, commit = found
        files = repository.commits[commit]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})
        entries = _entries(files)
        if verb == "paths-info":
            return self._json([entries[path] for path in json.loads(body)["paths"] if path in entries])
        if folder and folder not in entries:
            return self._send(404, {"X-Error-Code": "EntryNotFound"})
        recursive = "recursive=true" in self.path.lower()
        return self._json(
            [
                entry
                for path, entry in entries.items()
                if path.rpartition("/")[0] == folder or (recursive and (not folder or path.startswith(f"{folder}/")))
            ]
        )

    def _file(self, hub: Hub, kind: str, name: str, revision: str, path: str) -> None:
        found = self._find(hub, kind, name, revision)
        if found is None:
            return None
        repository, commit = found
        data = repository.commits[commit].get(path)
        if data is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"ETag": f'"{_blob_id(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start, _, stop = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(start) : int(stop) + 1 if stop else len(data)]
        if "Range" in self.headers:
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
        return self._send(206 if "Range" in self.headers else 200, headers, part)

    def _find(self, hub: Hub, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and commit asked for; None when the answer has been sent already."""
        for repository in hub.repositories:
            if (repository.kind, repository.name) == (kind, name):
                commit = repository.refs.get(revision, revision)
                if repository.gated:
                    return self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
                if commit not in repository.commits:
                    return self._send(404, {"X-Error-Code": "RevisionNotFound"})
                return repository, commit
        # As the Hub answers who has not logged in: it does not tell missing from private.
        return self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str] | None = None, data: bytes = b"") -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        self.send_response(status, HTTPStatus(status).phrase)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.cut is not None and "/resolve/" in self.path:
            self.wfile.write(data[: hub.cut])
            self.close_connection = True
        else:
            self.wfile.write(data)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _entries(files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Files and folders as the Hub describes them, by path."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    entries = {path: {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)}
    return entries | {
        path: {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)} for path, data in files.items()
    }
