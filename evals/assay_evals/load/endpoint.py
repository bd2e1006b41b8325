"""An OpenAI-compatible endpoint: a streaming request is sent, timed chunk by chunk, and, when it fails, its failure named by kind.

The kinds: `unreachable` (no connection), `timeout`, `cut` (the stream ended before it was complete), `malformed` (an answer that is not the
API's), `error event` (the server reported an error within the stream), `empty` (a complete answer without any output), and `HTTP nnn`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import resource
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import httpx2
from httpx2 import EventSource

from assay.errors import UsageError
from assay_evals.load.client import TIMEOUT, UNREACHABLE, refuse
from assay_evals.load.records import Answer, Failure
from assay_evals.load.wire import (
    DONE,
    PATHS,
    Api,
    ErrorEventError,
    Event,
    MalformedEventError,
    Prompt,
    clipped,
    error_message,
    read_event,
    request_body,
)

_TRIAL_TOKENS = 4
_RUNNING = " Is the server running, and is this its address?"
_CONNECT_SECONDS = 10.0
# Below the 5 seconds after which common servers close an idle connection: a request must not meet a connection that is being closed.
_IDLE_SECONDS = 1.0
_HTTP_ADVICE = {
    401: "the endpoint wants another API key: name the variable that holds it with --api-key-env",
    403: "this API key may not use it",
    404: "is the path right (most servers want …/v1), and is the model's name?",
    429: "the endpoint limits the rate; lower --concurrency or --rate",
}


@dataclass(frozen=True)
class Credentials:
    """What is sent and kept nowhere.  login: name and password, for a gateway that wants them."""

    api_key: str | None = None
    login: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where requests go.  url: without a slash at its end, and without credentials, because messages quote it.

    model: the only one that it serves, unless named.  extra: into each request.
    """

    url: str
    api: Api
    model: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    credentials: Credentials = dataclasses.field(default_factory=Credentials, repr=False)

    @property
    def address(self) -> str:
        return self.url + PATHS[self.api]

    @asynccontextmanager
    async def open(self, timeout: float) -> AsyncGenerator[EndpointClient]:
        """A client without a limit of its own on connections, which follows no redirects: they would be measured too."""
        _allow_many_connections()
        key = self.credentials.api_key
        async with httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            auth=self.credentials.login,
            timeout=httpx2.Timeout(None, connect=min(_CONNECT_SECONDS, timeout)),
            limits=httpx2.Limits(keepalive_expiry=_IDLE_SECONDS),
        ) as http:
            model = self.model or await _only_model(self.url, http, timeout)
            yield EndpointClient(self, model, http, timeout)


class EndpointClient:
    """Sends requests to one endpoint."""

    counts_alone = False
    context_length: int | None = None

    def __init__(self, endpoint: Endpoint, model: str, http: httpx2.AsyncClient, timeout: float) -> None:
        self.notes: list[str] = []
        self.software = {"client": f"httpx2 {metadata.version('httpx2')}"}
        self._endpoint, self._model, self._http, self._timeout = endpoint, model, http, timeout
        self._usage = True
        self._started = time.perf_counter()

    def now(self) -> float:
        return round(time.perf_counter() - self._started, 6)

    def used(self) -> dict[str, Any]:
        return {
            "endpoint": self._endpoint.url,
            "model": self._model,
            "api": self._endpoint.api,
            "extra": self._endpoint.extra,
        }

    async def count(self, prompt: Prompt, output_tokens: int) -> int | None:
        """A short request, whose usage tells."""
        tokens = min(_TRIAL_TOKENS, output_tokens)
        answer = await self.ask(prompt, tokens)
        if self._usage and _rejects_usage(answer.failure):
            self._usage = False
            self.notes.append("the endpoint rejects stream_options: it is not asked to count tokens")
            answer = await self.ask(prompt, tokens)
        failure = answer.failure
        if failure and failure.kind != "empty":
            refuse(failure, _RUNNING if failure.kind == UNREACHABLE else "")
        return answer.prompt_tokens

    async def ask(self, prompt: Prompt, output_tokens: int) -> Answer:
        """Send one request and follow its stream to the end."""
        stream = _Stream(self.now())
        endpoint = self._endpoint
        body = request_body(endpoint.api, self._model, prompt, output_tokens, usage=self._usage, extra=endpoint.extra)
        failure = await self._follow(stream, body)
        return stream.answer(self.now(), failure)

    async def _follow(self, stream: _Stream, body: dict[str, Any]) -> Failure | None:
        try:
            async with asyncio.timeout(self._timeout):
                if refused := await self._exchange(stream, body):
                    return refused
        except TimeoutError:
            if not stream.done:
                seen = f"{len(stream.chunks)} chunks had come" if stream.chunks else "nothing had come"
                return Failure(kind=TIMEOUT, message=f"not finished after {self._timeout:g} s; {seen}")
        except MalformedEventError as error:
            return Failure(kind="malformed", message=f"event {stream.events + 1} is malformed: {error}")
        except httpx2.SSEError as error:
            return Failure(kind="malformed", message=f"event {stream.events + 1} cannot be read: {_reason_of(error)}")
        except httpx2.DecodingError as error:
            return Failure(kind="malformed", message=f"the answer cannot be decoded: {error}")
        except ErrorEventError as error:
            return Failure(kind="error event", message=f"the server reports in event {stream.events + 1}: {error}")
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            return Failure(kind=UNREACHABLE, message=f"no connection to {self._endpoint.url}: {_reason_of(error)}")
        except httpx2.TransportError as error:
            return Failure(
                kind="cut", message=f"the connection broke after {stream.events} events: {_reason_of(error)}"
            )
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
                    "POST", self._endpoint.address, json=body, extensions={"trace": trace}
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
        parts = (error_message(response.text) or "it says no more", _HTTP_ADVICE.get(status))
        return Failure(
            kind=f"HTTP {status}", message=f"{self._endpoint.address}: {'; '.join(part for part in parts if part)}"
        )


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


def _reason_of(error: BaseException) -> str:
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


def _rejects_usage(failure: Failure | None) -> bool:
    return failure is not None and failure.kind in ("HTTP 400", "HTTP 422") and "stream_options" in failure.message


async def _only_model(url: str, http: httpx2.AsyncClient, timeout: float) -> str:
    """The model that an endpoint serves when it serves one."""
    wanted = "name the model with --model"
    try:
        models = await _models(url, http, timeout)
    except httpx2.HTTPStatusError as error:
        status = error.response.status_code
        advice = _HTTP_ADVICE[status] if status in (401, 403) else wanted
        raise UsageError(f"{url}/models answers with HTTP {status}; {advice}.") from error
    except MalformedEventError as error:
        raise UsageError(f"{url}/models: {error}; {wanted}.") from error
    except httpx2.TransportError as error:
        refuse(Failure(kind=UNREACHABLE, message=f"no connection to {url}: {_reason_of(error)}"), _RUNNING)
    if len(models) != 1:
        raise UsageError(f"{url} serves {len(models)} models: {clipped(', '.join(models)) or 'none'}; {wanted}.")
    return models[0]


async def _models(url: str, http: httpx2.AsyncClient, timeout: float) -> list[str]:
    """Names that GET /models lists; httpx2's errors, or MalformedEventError for what is no such list."""
    response = await http.get(f"{url}/models", timeout=timeout)
    response.raise_for_status()
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedEventError(f"not a list of models: {clipped(response.text)}") from error


def read_endpoint(text: str, *, model: str | None, api: Api, body: str | None, api_key_env: str | None) -> Endpoint:
    """An endpoint from the words of the command line; UsageError says what is wrong."""
    url = _read_url(text)
    key = None if api_key_env is None else _read_api_key(api_key_env)
    login = (url.username, url.password) if url.username else None
    return Endpoint(
        url=str(url.copy_with(username=None, password=None)).rstrip("/"),
        model=model,
        api=api,
        extra={} if body is None else _read_body(body),
        credentials=Credentials(api_key=key, login=login),
    )


def _read_url(text: str) -> httpx2.URL:
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise UsageError(
            f"--endpoint {text}: not a URL ({error}); write one such as http://127.0.0.1:8000/v1."
        ) from error
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UsageError(f"--endpoint {text}: not the base URL of an API; write one such as http://127.0.0.1:8000/v1.")
    return url


def _read_body(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--body {text}: not JSON ({error}).") from error
    if not isinstance(value, dict) or value.keys() & {"prompt", "messages", "stream", "stream_options"}:
        raise UsageError(f"--body {text}: give a JSON object without prompt, messages, stream and stream_options.")
    return value


def _read_api_key(variable: str) -> str:
    if not (key := os.environ.get(variable)):
        raise UsageError(f"--api-key-env {variable}: this environment variable is not set, or is empty.")
    return key


def _allow_many_connections() -> None:
    """Each request in flight is an open file; shells allow 1,024 where the system allows more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
