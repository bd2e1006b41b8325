"""The part of GitHub's REST interface that reads and writes comments of a pull request, on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from loopback import serving

BOT = "github-actions[bot]"


@dataclass
class GitHub:
    """comments: as the interface shows them.  refused: method → status that it is answered with instead."""

    url: str
    token: str = "ghs_token"
    comments: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    forgotten: set[int] = field(default_factory=set)

    def add(self, body: str, login: str = BOT) -> dict[str, Any]:
        """A comment on pull request 7 of org/models."""
        number = len(self.comments) + 1
        comment = {"id": number, "body": body, "user": {"login": login}, "html_url": f"{self.url}/comment/{number}"}
        self.comments.append(comment)
        return comment


@contextmanager
def running_github() -> Iterator[GitHub]:
    """Serve until the block ends."""
    github = GitHub("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def do_PATCH(self) -> None:
            self._serve("PATCH")

        def _serve(self, method: str) -> None:
            github.requests.append((method, self.path))
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            parts = urlsplit(self.path)
            if self.headers["Authorization"] != f"Bearer {github.token}":
                return self._answer(401, {"message": "Bad credentials"})
            if method in github.refused:
                return self._answer(github.refused[method], {"message": "Resource not accessible by integration"})
            if parts.path == "/repos/org/models/issues/7/comments" and method == "GET":
                query = {name: int(values[0]) for name, values in parse_qs(parts.query).items()}
                size, page = query.get("per_page", 30), query.get("page", 1)
                return self._answer(200, github.comments[(page - 1) * size : page * size])
            if parts.path == "/repos/org/models/issues/7/comments" and method == "POST":
                return self._answer(201, github.add(body["body"]))
            named = re.fullmatch(r"/repos/org/models/issues/comments/(\d+)", parts.path)
            if method == "PATCH" and named and int(named[1]) not in github.forgotten:
                comment = github.comments[int(named[1]) - 1]
                comment["body"] = body["body"]
                return self._answer(200, comment)
            return self._answer(404, {"message": "Not Found"})

        def _answer(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            del format, args

    with serving(Handler) as server:
        github.url = server.url
        yield github
