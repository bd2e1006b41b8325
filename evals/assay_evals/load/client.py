"""One streaming request: sent, timed chunk by chunk, and, when it fails, its failure named by kind.

The kinds: `unreachable` (no connection), `timeout`, `cut` (the stream ended before it was complete), `malformed` (an answer that is not the
API's), `error event` (the server reported an error within the stream), `empty` (a complete answer without any output), and `HTTP nnn`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from httpx2 import EventSource

from assay_evals.load.records import Answer, Failure
from assay_evals.load.wire import (
    DONE,
    PATHS,
    Api,
    ErrorEventError,
    Event,
    MalformedEventError,
    clipped,
    error_message,
    read_event,
)

UNREACHABLE, TIMEOUT = "unreachable", "timeout"
_CONNECT_SECONDS = 10.0
# Below the 5 seconds after which common servers close an idle connection: a request must not meet a connection that is being closed.
_IDLE_SECONDS = 1.0
HTTP_ADVICE = {
    401: "the endpoint wants another API key: name the variable that holds it with --api-key-env",
    403: "this API key may not use it",
    404: "is the path right (most servers want …/v1), and is the model's name?",
    429: "the endpoint limits the rate; lower --concurrency or --rate",
}


@dataclass(frozen=True)
class Target:
    """Where requests go.  url: without a slash at its end, and without credentials, because messages quote it.

    timeout: seconds for a whole request.
    """

    url: str
    api: Api
    timeout: float

    @property
    def address(self) -> str:
        return self.url + PATHS[self.api]


@dataclass(frozen=True)
class Credentials:
    """What is sent and kept nowhere.  login: name and password, for a gateway that wants them."""

    api_key: str | None = None
    login: tuple[str, str] | None = None


class Client:
    """Sends requests to one target; its clock starts at 0 when it is made."""

    def __init__(self, target: Target, http: httpx2.AsyncClient) -> None:
        self.target, self._http, self._started = target, http, time.perf_counter()

    def now(self) -> float:
        return round(time.perf_counter() - self._started, 6)

    async def models(self) -> list[str]:
        """Names that GET /models lists; httpx2's errors, or MalformedEventError for what is no such list."""
        response = await self._http.get(f"{self.target.url}/models", timeout=self.target.timeout)
        response.raise_for_status()
        try:
            return [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise MalformedEventError(f"not a list of models: {clipped(response.text)}") from error

    async def ask(self, body: dict[str, Any]) -> Answer:
        """Send one request and follow its stream to the end. Failures are in the answer, never raised."""
        stream = _Stream(self.now())
        failure = await self._follow(stream, body)
        return stream.answer(self.now(), failure)

    async def _follow(self, stream: _Stream, body: dict[str, Any]) -> Failure | None:
        try:
            async with asyncio.timeout(self.target.timeout):
                if refused := await self._exchange(stream, body):
                    return refused
        except TimeoutError:
            if not stream.done:
                seen = f"{len(stream.chunks)} chunks had come" if stream.chunks else "nothing had come"
                return Failure(kind=TIMEOUT, message=f"not finished after {self.target.timeout:g} s; {seen}")
        except MalformedEventError as error:
            return Failure(kind="malformed", message=f"event {stream.events + 1} is malformed: {error}")
        except httpx2.SSEError as error:
            return Failure(kind="malformed", message=f"event {stream.events + 1} cannot be read: {reason_of(error)}")
        except httpx2.DecodingError as error:
            return Failure(kind="malformed", message=f"the answer cannot be decoded: {error}")
        except ErrorEventError as error:
            return Failure(kind="error event", message=f"the server reports in event {stream.events + 1}: {error}")
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            return Failure(kind=UNREACHABLE, message=f"no connection to {self.target.url}: {reason_of(error)}")
        except httpx2.TransportError as error:
            return Failure(kind="cut", message=f"the connection broke after {stream.events} events: {reason_of(error)}")
        return stream.missing()

    async def _exchange(self, stream: _Stream, body: dict[str, Any]) -> Failure | None:
        """Send, and read to the end; a refusal is returned, what breaks is raised.

        A kept connection that the server has just closed is no failure: the request goes out again (RFC 9112, section 9.3.1), and its
        latency counts from the first time.
        """
        while True:
            fresh, answered = False, False

            async def trace(event: str, _: dict[str, Any]) -> None:
                nonlocal fresh
                fresh |= event.startswith("connection.connect")

            try:
                async with self._http.stream(
                    "POST", self.target.address, json=body, extensions={"trace": trace}
                ) as response:
                    answered = True
                    if response.status_code != 200:
                        await response.aread()
                        return self._refused(response)
                    kind = response.headers.get("Content-Type", "nothing known")
                    if not kind.startswith("text/event-stream"):
                        await response.aread()
                        message = f"an answer of {kind} in place of the event stream that was asked for: "
                        return Failure(kind="malformed", message=message + error_message(response.text))
                    async for event in EventSource(response):
                        stream.take(event.data, self.now())
                    return None
            except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
                if fresh or answered:
                    raise

    def _refused(self, response: httpx2.Response) -> Failure:
        status = response.status_code
        parts = (error_message(response.text) or "it says no more", HTTP_ADVICE.get(status))
        return Failure(
            kind=f"HTTP {status}", message=f"{self.target.address}: {'; '.join(part for part in parts if part)}"
        )


@asynccontextmanager
async def open_client(target: Target, credentials: Credentials) -> AsyncGenerator[Client]:
    """A client without a limit of its own on connections, which follows no redirects: they would be measured too."""
    headers = {"Authorization": f"Bearer {credentials.api_key}"} if credentials.api_key else {}
    async with httpx2.AsyncClient(
        headers=headers,
        auth=credentials.login,
        timeout=httpx2.Timeout(None, connect=min(_CONNECT_SECONDS, target.timeout)),
        limits=httpx2.Limits(keepalive_expiry=_IDLE_SECONDS),
    ) as http:
        yield Client(target, http)


class _Stream:
    """What has come of one answer so far."""

    def __init__(self, sent: float) -> None:
        self.chunks: list[float] = []
        self.events = 0
        self.done = False
        self._sent = sent
        self._ended: float | None = None
        self._finish_reason: str | None = None
        self._usage = Event(False, None)

    def take(self, data: str, now: float) -> None:
        if data == DONE:
            self.done, self._ended = True, now
            return
        event = read_event(data)
        self.events += 1
        if event.has_output:
            self.chunks.append(now)
        if event.output_tokens is not None:
            # Some servers count along; the last count is the whole.
            self._usage = event
        self._finish_reason = event.finish_reason or self._finish_reason

    def missing(self) -> Failure | None:
        """What a stream that ended by itself lacks."""
        if not self.done and self._finish_reason is None:
            message = f"the stream ended after {self.events} events, without finish_reason and {DONE}"
            return Failure(kind="cut", message=message)
        if not self.chunks:
            return Failure(
                kind="empty", message="the answer is complete and has no output: the model ended its text at once"
            )
        return None

    def answer(self, now: float, failure: Failure | None) -> Answer:
        return Answer(
            sent=self._sent,
            chunks=tuple(self.chunks),
            ended=now if self._ended is None else self._ended,
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=self._usage.cached_tokens,
            output_tokens=self._usage.output_tokens,
            finish_reason=self._finish_reason,
            failure=failure,
        )


def reason_of(error: BaseException) -> str:
    """What the system said, where it said something; httpx2 says some things with the class alone, and others as a sentence."""
    said: str | None = None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError) and cause.errno:
            # asyncio has an address in place of the reason.
            said = os.strerror(cause.errno)
        elif isinstance(cause, OSError) and cause.strerror:
            said = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return said or clipped(str(error)).removesuffix(".") or type(error).__name__
