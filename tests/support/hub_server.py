"""A Hugging Face Hub on loopback: the part of its HTTP interface that huggingface_hub and datasets use to read repositories,
and that huggingface_hub uses to make them, to commit to them (regular files and LFS, no xet) and to tag commits.

Every request is kept in `requests`, so that a test can say what was never asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import serving


@dataclass
class Repository:
    """kind: "models" or "datasets".  commits: commit → files, oldest first.  refs: branch or tag → commit.

    large: LFS objects by SHA-256; a file with such bytes is an LFS file.
    """

    kind: str
    name: str
    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False
    large: dict[str, bytes] = field(default_factory=dict)

    def last_commit(self, path: str, commit: str) -> str:
        """The last commit up to this one that changed a file."""
        found, before = "", None
        for number, files in self.commits.items():
            if files.get(path) != before:
                found, before = number, files.get(path)
            if number == commit:
                break
        return found

    def commit(self, parent: str, files: dict[str, bytes]) -> str:
        """Put a commit on main."""
        commit = _commit_id(files, f"{parent}{len(self.commits)}")
        self.commits[commit] = files
        self.refs["main"] = commit
        return commit


@dataclass
class Hub:
    """status: what every request is answered with instead.  cut: how many bytes of a file arrive before the line breaks.

    breaks: the same for single files that are not Assay's own, one entry per answer.  before: called with method and path of
    each request; a status that it returns is the answer.  after: the same for requests to the API, when they were carried
    out.  token: who has it is the user "org", of the organization "team", and may write; without one everybody may.
    crumb: how many bytes of a file arrive with each answer, which ends well.  lock: held while a request to the API is answered.
    """

    url: str
    repositories: list[Repository] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    status: int | None = None
    cut: int | None = None
    breaks: list[int] = field(default_factory=list)
    crumb: int | None = None
    before: Callable[[str, str], int | None] | None = None
    after: Callable[[str, str], int | None] | None = None
    token: str | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def find(self, name: str, kind: str = "models") -> Repository:
        """A repository by name."""
        return next(found for found in self.repositories if (found.kind, found.name) == (kind, name))

    def add(self, kind: str, name: str, files: dict[str, bytes], **settings: Any) -> str:
        """A repository with one commit on main; returns the commit."""
        commit = _commit_id(files)
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

    class Handler(_Handler):
        pass

    with serving(Handler) as server:
        Handler.hub = Hub(server.url)
        yield Handler.hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: the requests are kept."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def do_DELETE(self) -> None:
        self._answer()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, body: bytes = b"") -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        status = hub.status or (hub.before and hub.before(self.command, path))
        if status:
            return self._send(status)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            with hub.lock:
                return self._api_root(hub, parts[1:], body)
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        if len(parts) > 4 and parts[2] == "resolve":
            return self._file(hub, kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._lfs_batch(hub, "/".join(parts[:2]).removesuffix(".git"), json.loads(body))
        if parts[0] == "lfs-store" and self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != parts[3]:
                return self._send(400)
            hub.find("/".join(parts[1:3])).large[parts[3]] = body
            return self._send(200)
        return self._send(404)

    def _api_root(self, hub: Hub, parts: list[str], body: bytes) -> None:
        writes = self.command in ("PUT", "DELETE") or parts[-2:-1] in (["commit"], ["tag"], ["preupload"])
        if (writes or parts in (["repos", "create"], ["whoami-v2"])) and not self._knows_us(hub):
            return self._send(401, {"X-Error-Message": "Invalid username or password."})
        if parts == ["whoami-v2"]:
            return self._json({"type": "user", "name": "org", "orgs": [{"name": "team"}]})
        if parts == ["validate-yaml"]:
            return self._json({"warnings": [{"message": "empty or missing yaml metadata in repo card"}], "errors": []})
        if parts == ["repos", "create"]:
            asked = json.loads(body)
            return self._create(hub, f"{asked['organization']}/{asked['name']}", asked.get("visibility") == "private")
        if parts == ["models"]:
            author = parse_qs(urlsplit(self.path).query)["author"][0]
            return self._json([_about(found) for found in hub.repositories if found.name.startswith(f"{author}/")])
        if parts[0] in ("models", "datasets"):
            return self._api(hub, parts[0], parts[1:], body)
        return self._send(404)

    def _knows_us(self, hub: Hub) -> bool:
        return hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"

    def _create(self, hub: Hub, name: str, private: bool) -> None:
        url = {"url": f"{hub.url}/{name}"}
        if any(found.name == name for found in hub.repositories):
            return self._json(url, 409)
        hub.add(
            "models", name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, private=private
        )
        return self._json(url)

    def _lfs_batch(self, hub: Hub, name: str, asked: dict[str, Any]) -> None:
        large = hub.find(name).large
        objects = [
            item
            if item["oid"] in large
            else item | {"actions": {"upload": {"href": f"{hub.url}/lfs-store/{name}/{item['oid']}"}}}
            for item in asked["objects"]
        ]
        return self._json({"transfer": "basic", "objects": objects})

    def _write(self, hub: Hub, found: Repository, verb: str, parts: list[str], body: bytes) -> None:
        """/preupload/REVISION, /commit/REVISION, /tag/COMMIT (POST), /tag/TAG (DELETE)"""
        if verb == "preupload":
            files = found.commits[found.refs[parts[0]]]
            return self._json({"files": [_upload_mode(found, files, item) for item in json.loads(body)["files"]]})
        if verb == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            head = found.refs[parts[0]]
            if lines[0]["value"].get("parentCommit", head) != head:
                return self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            files = dict(found.commits[head])
            for line in lines[1:]:
                _apply(found, files, line["key"], line["value"])
            commit = found.commit(head, files)
            return self._json({"commitUrl": f"{hub.url}/{found.name}/commit/{commit}", "commitOid": commit})
        if self.command == "DELETE":
            gone = found.refs.pop(parts[0], None)
            return self._send(200) if gone else self._send(404, {"X-Error-Code": "RevisionNotFound"})
        tag = json.loads(body)["tag"]
        if tag in found.refs:
            return self._send(409)
        found.refs[tag] = found.refs.get(parts[0], parts[0])
        return self._send(200)

    def _api(self, hub: Hub, kind: str, parts: list[str], body: bytes) -> None:
        """/api/KIND/ORG/NAME/VERB/REVISION[/FOLDER]"""
        name, verb, revision, folder = "/".join(parts[:2]), *[*parts[2:4], "main", "main"][:2], "/".join(parts[4:])
        if verb in ("preupload", "commit", "tag", "refs"):
            found = self._find(hub, kind, name, "main")
            if found and verb == "refs":
                refs = {
                    ref: {"name": ref, "ref": f"refs/{ref}", "targetCommit": commit}
                    for ref, commit in found[0].refs.items()
                }
                tags = [value for ref, value in refs.items() if ref != "main"]
                return self._json({"branches": [refs["main"]], "converts": [], "tags": tags})
            return self._write(hub, found[0], verb, parts[3:], body) if found else None
        found = self._find(hub, kind, name, revision)
        if found is None:
            return None
        repository, commit = found
        files = repository.commits[commit]
        if verb == "revision":
            return self._json(_about(repository, commit))
        entries = _entries(files, repository.large)
        if verb == "paths-info":
            asked = parse_qs(body.decode()) if b"paths=" in body else json.loads(body)
            for path in asked["paths"]:
                last = repository.last_commit(path, commit)
                entries.get(path, {})["lastCommit"] = {"id": last, "title": "", "date": "2026-01-01T00:00:00.000Z"}
            return self._json([entries[path] for path in asked["paths"] if path in entries])
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
            if (repository.kind, repository.name) == (kind, name) and (not repository.private or self._knows_us(hub)):
                commit = repository.refs.get(revision, revision)
                if repository.gated:
                    return self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
                if commit not in repository.commits:
                    return self._send(404, {"X-Error-Code": "RevisionNotFound"})
                return repository, commit
        # As the Hub answers who has not logged in: it does not tell missing from private.
        return self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: dict[str, str] | None = None, data: bytes = b"") -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        if hub.after and path.startswith("/api/") and (instead := hub.after(self.command, path)):
            status, headers, data = instead, {}, b""
        if hub.crumb and self.command == "GET" and "/resolve/" in path and "/.assay/" not in path:
            data = data[: hub.crumb]
            headers = {key: value for key, value in (headers or {}).items() if key != "Content-Length"}
        self.send_response(status, HTTPStatus(status).phrase)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = hub.cut
        if hub.breaks and "/resolve/" in path and "/.assay/" not in path:
            cut = hub.breaks.pop(0)
        if cut is not None and "/resolve/" in path:
            self.wfile.write(data[:cut])
            self.close_connection = True
        else:
            self.wfile.write(data)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _commit_id(files: dict[str, bytes], salt: str = "") -> str:
    return hashlib.sha1((salt + repr(sorted(files.items()))).encode(), usedforsecurity=False).hexdigest()


def _about(repository: Repository, commit: str = "") -> dict[str, Any]:
    commit = commit or repository.refs["main"]
    siblings = [{"rfilename": path} for path in repository.commits[commit]]
    about = {"id": repository.name, "sha": commit, "private": repository.private, "tags": [], "siblings": siblings}
    return about | {"_id": "0" * 24, "modelId": repository.name}


def _upload_mode(repository: Repository, files: dict[str, bytes], item: dict[str, Any]) -> dict[str, Any]:
    """As the Hub decides: by .gitattributes, size, and whether it looks like text."""
    path, sample = item["path"], base64.b64decode(item["sample"])
    is_large = path.endswith(".safetensors") or item["size"] > 10_000_000 or b"\0" in sample
    answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
    if (data := files.get(path)) is not None:
        sha256 = hashlib.sha256(data).hexdigest()
        answer["oid"] = sha256 if sha256 in repository.large else _blob_id(data)
    return answer


def _apply(repository: Repository, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
    """One line of a commit."""
    if key == "file":
        files[value["path"]] = base64.b64decode(value["content"])
    elif key == "lfsFile":
        files[value["path"]] = repository.large[value["oid"]]
    else:
        del files[value["path"]]


def _entries(files: dict[str, bytes], large: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Files and folders as the Hub describes them, by path."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    entries = {path: {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)}
    for path, data in files.items():
        entries[path] = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
        if (sha256 := hashlib.sha256(data).hexdigest()) in large:
            entries[path]["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return entries
