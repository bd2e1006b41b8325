"""An OpenAI-compatible endpoint on loopback that answers as a test wants: in time or late, whole or broken in a known way.

It says when it wrote each event, on the clock that time.perf_counter() reads in every process of this machine (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from loopback import serving


@dataclass(frozen=True)
class Reply:
    """One answer.

    first, gap: seconds before the first chunk and between chunks.  tokens: chunks, each of `per_chunk` tokens.
    cut: chunks after which the connection is closed.  raw: an event's data in place of the second chunk.  ends: finish_reason and [DONE] come.
    cached: prompt tokens out of a cache.  status: an error in place of a stream, with a body.
    """

    tokens: int = 4
    per_chunk: int = 1
    first: float = 0.0
    gap: float = 0.0
    usage: bool = True
    cut: int | None = None
    raw: str | None = None
    ends: bool = True
    cached: int = 0
    status: int = 200
    body: str = ""
    content_type: str = "text/event-stream"


@dataclass
class Endpoint:
    """url: with /v1.  reply: what request number n (from 0, the trials too) is answered with.  models: what GET /models lists.

    closes_idle: a second request on a connection finds it closed.
    """

    url: str
    reply: Callable[[int], Reply] = field(default=lambda number: Reply())
    models: tuple[str, ...] = ("tiny",)
    models_status: int = 200
    closes_idle: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    written: list[list[float]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def running_endpoint() -> Iterator[Endpoint]:
    """An endpoint on a free port, stopped at the end."""

    class Handler(_Handler):
        pass

    with serving(Handler) as server:
        Handler.endpoint = Endpoint(f"{server.url}/v1")
        yield Handler.endpoint


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    endpoint: Endpoint
    served = False

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: the requests are kept."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            return self._error(404, "no such path")
        self._whole(
            self.endpoint.models_status,
            json.dumps({"data": [{"id": name} for name in self.endpoint.models]}),
        )
        return None

    def do_POST(self) -> None:
        endpoint = self.endpoint
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:  # The client was stopped.
            return None
        body = json.loads(data)
        if endpoint.closes_idle and self.served:
            self.close_connection = True
            return None
        self.served = True
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            return self._error(404, "no such path")
        with endpoint.lock:
            reply = endpoint.reply(len(endpoint.bodies))
            endpoint.bodies.append(body)
            endpoint.headers.append(dict(self.headers))
            written: list[float] = []
            endpoint.written.append(written)
            endpoint.at_once += 1
            endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
        try:
            # A client that has lost patience is gone.
            with suppress(BrokenPipeError, ConnectionResetError):
                self._answer(reply, body, written)
        finally:
            with endpoint.lock:
                endpoint.at_once -= 1
        return None

    def _answer(self, reply: Reply, body: dict[str, Any], written: list[float]) -> None:
        time.sleep(reply.first)
        if reply.status != 200:
            return self._error(reply.status, reply.body)
        self.send_response(200)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for position in range(reply.tokens):
            if position:
                time.sleep(reply.gap)
            if reply.cut == position:
                self.close_connection = True
                return None
            if reply.raw is not None and position == 1:
                self._event(reply.raw)
                continue
            self._event(json.dumps({"choices": [_choice(body, "x " * reply.per_chunk)]}))
            written.append(time.perf_counter())
        if reply.ends:
            last: dict[str, Any] = {"choices": [_choice(body, "") | {"finish_reason": "length"}]}
            if reply.usage and body.get("stream_options", {}).get("include_usage"):
                last["usage"] = {
                    "prompt_tokens": _prompt_tokens(body),
                    "completion_tokens": reply.tokens * reply.per_chunk,
                    "prompt_tokens_details": {"cached_tokens": reply.cached},
                }
            self._event(json.dumps(last))
            self._event("[DONE]")
        self._chunk(b"")
        return None

    def _event(self, data: str) -> None:
        self._chunk(f"data: {data}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _error(self, status: int, message: str) -> None:
        self._whole(status, json.dumps({"error": {"message": message}}))

    def _whole(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _choice(body: dict[str, Any], text: str) -> dict[str, Any]:
    return {"delta": {"content": text}} if "messages" in body else {"text": text}


def _prompt_tokens(body: dict[str, Any]) -> int:
    """Three characters to a token, and ten tokens around a chat message."""
    if "messages" in body:
        return sum(len(message["content"]) // 3 + 10 for message in body["messages"])
    return len(body["prompt"]) // 3
