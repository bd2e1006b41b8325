"""A proxy on loopback that does to HTTP what networks and servers do: cut, delay, damage, lie, refuse.

One request per connection.  For each one a plan, a function of the request line, says what goes wrong; None: nothing.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

CHUNK = 65536
_LINGER_NOT = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request; offsets count the bytes of the body.

    answer: sent in place of what the server would have said, after `answer_after` bytes of the request's body.
    reset: cuts are resets, not ends.  content_length: what the response claims.
    """

    cut_request_at: int | None = None
    cut_response_at: int | None = None
    flip_request_at: int | None = None
    flip_response_at: int | None = None
    delay_seconds: float = 0.0
    content_length: int | None = None
    answer: bytes | None = None
    answer_after: int = 0
    reset: bool = False


Plan = Callable[[str], Fault | None]


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    """A whole response."""
    lines = [f"HTTP/1.1 {status} Said So", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@dataclass
class FaultProxy:
    """A running proxy.  host: HOST:PORT.  seen: the request lines, oldest first.  sent_bytes: of all response bodies."""

    host: str
    upstream: str
    plan: Plan = lambda request: None
    seen: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    sent_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, client: socket.socket) -> None:
        """Handle one connection."""
        with client, contextlib.suppress(OSError):
            head, rest = _read_head(client)
            if not head:
                return
            line = head.split(b"\r\n", 1)[0].decode()
            with self.lock:
                self.seen.append(line)
                self.heads.append(head.decode())
                fault = self.plan(line) or Fault()
            time.sleep(fault.delay_seconds)
            length = int(_header(head, "content-length") or 0)
            if fault.answer is not None:
                _drain(client, rest, min(length, fault.answer_after))
                client.sendall(fault.answer)
                client.shutdown(socket.SHUT_WR)
                client.settimeout(1)
                while client.recv(CHUNK):
                    pass
                return
            host, _, port = self.upstream.rpartition(":")
            with socket.create_connection((host, int(port)), 30) as server:
                server.sendall(_closing(head))
                if _copy(_chunks(client, rest, length), server, fault.cut_request_at, fault.flip_request_at) is None:
                    _break(client, fault.reset)
                    return
                head, rest = _read_head(server)
                if fault.content_length is not None:
                    head = re.sub(rb"(?i)content-length: \d+", b"Content-Length: %d" % fault.content_length, head)
                client.sendall(head)
                sent = _copy(_chunks(server, rest, None), client, fault.cut_response_at, fault.flip_response_at)
                if sent is None:
                    _break(client, fault.reset)
                with self.lock:
                    self.sent_bytes += fault.cut_response_at or 0 if sent is None else sent


@contextlib.contextmanager
def running_fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy in front of HOST:PORT."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        proxy = FaultProxy(f"127.0.0.1:{listener.getsockname()[1]}", upstream)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=proxy.serve, args=(client,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def _read_head(stream: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        if not (chunk := stream.recv(CHUNK)):
            return b"", b""
        data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _header(head: bytes, name: str) -> str | None:
    found = re.search(rf"(?im)^{name}: *([^\r]*)", head.decode())
    return found[1] if found else None


def _closing(head: bytes) -> bytes:
    head = re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)
    return head[:-2] + b"Connection: close\r\n\r\n"


def _chunks(stream: socket.socket, rest: bytes, length: int | None) -> Iterator[bytes]:
    """Up to so many bytes, or until the end."""
    left = length
    while left is None or left > 0:
        chunk, rest = (rest, b"") if rest else (stream.recv(CHUNK), b"")
        if not chunk:
            return
        chunk = chunk if left is None else chunk[:left]
        left = None if left is None else left - len(chunk)
        yield chunk


def _copy(chunks: Iterator[bytes], sink: socket.socket, cut_at: int | None, flip_at: int | None) -> int | None:
    """Copy; returns the number of bytes, or None when they were cut."""
    done = 0
    for chunk in chunks:
        if flip_at is not None and done <= flip_at < done + len(chunk):
            at = flip_at - done
            chunk = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]  # noqa: PLW2901
        if cut_at is not None and done + len(chunk) > cut_at:
            sink.sendall(chunk[: cut_at - done])
            return None
        sink.sendall(chunk)
        done += len(chunk)
    return done


def _drain(stream: socket.socket, rest: bytes, count: int) -> None:
    for _ in _chunks(stream, rest, count):
        pass


def _break(client: socket.socket, reset: bool) -> None:
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    client.close()
