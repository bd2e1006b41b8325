"""A load test from its settings to its result: find the model, try one request, run every level.

The trial says at once what would fail every request, whether the server counts tokens, and how long a prompt of so many tokens is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import resource
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import httpx2

from assay.errors import AssayError, UsageError
from assay.host import environment
from assay.progress import Progress
from assay_evals.load.arrivals import Load, read_loads
from assay_evals.load.client import HTTP_ADVICE, UNREACHABLE, Client, Credentials, Target, open_client, reason_of
from assay_evals.load.prompts import CHARACTERS_PER_TOKEN, PromptOf, documentation_prompts, file_prompts
from assay_evals.load.records import Answer, Failure, Level, Measured, Parameters
from assay_evals.load.runner import LevelPlan, run_level, usual_warm_up
from assay_evals.load.wire import Api, MalformedEventError, clipped, request_body

_TRIAL_TOKENS = 4
# Of a prompt's length: less, because what is longer may not fit the model's context.
_TRIAL_PARTS = (0.25, 0.75)
_USUAL_INPUT_TOKENS = 256
_WRONG_REQUEST = ("HTTP 400", "HTTP 401", "HTTP 403", "HTTP 404", "HTTP 405", "HTTP 413", "HTTP 422")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is to be sent.  input_tokens: of the prompts from Python's documentation, unless a file has others.  extra: into each request."""

    endpoint: str
    model: str | None
    api: Api
    loads: tuple[Load, ...]
    requests: int
    warm_up: int | None
    input_tokens: int
    output_tokens: int
    timeout: float
    seed: int
    prompts: Path | None = None
    prompts_field: str = "prompt"
    extra: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    credentials: Credentials = dataclasses.field(default_factory=Credentials, repr=False)

    def warm_up_of(self, load: Load) -> int:
        return usual_warm_up(load, self.requests) if self.warm_up is None else self.warm_up

    @property
    def sent(self) -> int:
        """Requests of all levels, without those that cool down."""
        return sum(self.warm_up_of(load) + self.requests for load in self.loads)


def measure(settings: Settings, progress: Progress) -> Measured:
    """Run every level in turn; a level that is stopped is the last one."""
    _allow_many_connections()
    return asyncio.run(_measure(settings, progress))


async def _measure(settings: Settings, progress: Progress) -> Measured:
    target = Target(settings.endpoint, settings.api, settings.timeout)
    async with open_client(target, settings.credentials) as client:
        trial = _Trial(client, settings, settings.model or await _only_model(client))
        await trial.run()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        levels: list[Level] = []
        first = 0
        for load in settings.loads:
            plan = LevelPlan(
                load=load,
                warm_up=settings.warm_up_of(load),
                measured=settings.requests,
                first=first,
                seed=f"{settings.seed}/{load}",
            )
            with progress.stage(str(load), settings.requests) as advance:
                levels.append(await run_level(client, plan, trial.body, advance))
            first += len(levels[-1].requests) + levels[-1].unfinished
            if levels[-1].stopped:
                break
    return Measured(
        started=started,
        environment=environment() | {"client": f"httpx2 {metadata.version('httpx2')}"},
        parameters=_parameters(settings, trial),
        levels=tuple(levels),
    )


def _parameters(settings: Settings, trial: _Trial) -> Parameters:
    return Parameters(
        endpoint=settings.endpoint,
        model=trial.model,
        api=settings.api,
        prompts="python-docs" if settings.prompts is None else str(settings.prompts),
        input_tokens=settings.input_tokens if settings.prompts is None else None,
        output_tokens=settings.output_tokens,
        requests=settings.requests,
        timeout_seconds=settings.timeout,
        seed=settings.seed,
        extra=settings.extra,
        notes=tuple(trial.notes),
    )


class _Trial:
    """The first requests, one after the other, and what the later ones take from them."""

    def __init__(self, client: Client, settings: Settings, model: str) -> None:
        self.model = model
        self.notes: list[str] = []
        self._client, self._settings = client, settings
        self._usage = True
        self._prompt_of: PromptOf

    async def run(self) -> None:
        if self._settings.prompts is not None:
            prompts = file_prompts(self._settings.prompts, self._settings.prompts_field, self._settings.api)
            self._prompt_of = lambda number: prompts[number % len(prompts)]
            await self._ask(0)
            if len(prompts) < self._settings.sent:
                self.notes.append(
                    f"{len(prompts)} prompts come round again; what the server has cached of them is not computed anew"
                )
            return
        self._prompt_of = documentation_prompts(await self._characters(), self._settings.seed)

    async def _characters(self) -> int:
        """How long a prompt of so many tokens is: through two others goes the line tokens = those of a template + share · characters."""
        wanted = self._settings.input_tokens
        lengths: list[int] = []
        counts: list[int] = []
        for number, part in enumerate(_TRIAL_PARTS):
            characters = round(CHARACTERS_PER_TOKEN * part * max(wanted, _USUAL_INPUT_TOKENS))
            self._prompt_of = documentation_prompts(characters, self._settings.seed)
            # Numbers that no request of a level has.
            tokens = (await self._ask(-1 - number)).prompt_tokens
            if tokens is None:
                self.notes.append("the endpoint counts no prompt tokens: four characters are taken for one")
                return round(CHARACTERS_PER_TOKEN * wanted)
            lengths.append(len(self._prompt_of(-1 - number)))
            counts.append(tokens)
        share = max(1, counts[1] - counts[0]) / (lengths[1] - lengths[0])
        return max(1, round(lengths[0] + (wanted - counts[0]) / share))

    def body(self, number: int) -> dict[str, Any]:
        return self._body(number, self._settings.output_tokens)

    def _body(self, number: int, output_tokens: int) -> dict[str, Any]:
        return request_body(
            self._settings.api,
            self.model,
            self._prompt_of(number),
            output_tokens,
            usage=self._usage,
            extra=self._settings.extra,
        )

    async def _ask(self, number: int) -> Answer:
        tokens = min(_TRIAL_TOKENS, self._settings.output_tokens)
        answer = await self._client.ask(self._body(number, tokens))
        if self._usage and _rejects_usage(answer.failure):
            self._usage = False
            self.notes.append("the endpoint rejects stream_options: it is not asked to count tokens")
            answer = await self._client.ask(self._body(number, tokens))
        if answer.failure and answer.failure.kind != "empty":
            _refuse(answer.failure)
        return answer


def _rejects_usage(failure: Failure | None) -> bool:
    return failure is not None and failure.kind in ("HTTP 400", "HTTP 422") and "stream_options" in failure.message


def _refuse(failure: Failure) -> NoReturn:
    """The first request failed as all would: UsageError when it was the request, AssayError when it was the endpoint."""
    message = f"the first request failed, so nothing was measured. {failure.kind}: {failure.message}."
    if failure.kind in _WRONG_REQUEST:
        raise UsageError(message)
    if failure.kind == UNREACHABLE:
        message += " Is the server running, and is this its address?"
    raise AssayError(message)


async def _only_model(client: Client) -> str:
    """The model that an endpoint serves when it serves one."""
    wanted = "name the model with --model"
    try:
        models = await client.models()
    except httpx2.HTTPStatusError as error:
        status = error.response.status_code
        advice = HTTP_ADVICE[status] if status in (401, 403) else wanted
        raise UsageError(f"{client.target.url}/models answers with HTTP {status}; {advice}.") from error
    except MalformedEventError as error:
        raise UsageError(f"{client.target.url}/models: {error}; {wanted}.") from error
    except httpx2.TransportError as error:
        _refuse(Failure(kind=UNREACHABLE, message=f"no connection to {client.target.url}: {reason_of(error)}"))
    if len(models) != 1:
        raise UsageError(
            f"{client.target.url} serves {len(models)} models: {clipped(', '.join(models)) or 'none'}; {wanted}."
        )
    return models[0]


def read_settings(
    *,
    endpoint: str | None,
    model: str | None,
    api: Api,
    concurrency: str | None,
    rate: str | None,
    requests: int,
    warm_up: int | None,
    input_tokens: int | None,
    output_tokens: int,
    prompts: Path | None,
    field: str,
    body: str | None,
    timeout: float,
    api_key_env: str | None,
    seed: int,
) -> Settings:
    """Settings from the words of the command line; UsageError says what is wrong or contradicts itself."""
    if endpoint is None:
        raise UsageError("--endpoint is missing: the base URL of an API, such as http://127.0.0.1:8000/v1.")
    if concurrency is not None and rate is not None:
        raise UsageError("--concurrency is a closed loop, --rate an open one: give one of them.")
    if prompts is not None and input_tokens is not None:
        raise UsageError("--prompts has prompts of their own length, --input-tokens makes some: give one of them.")
    url = _read_endpoint(endpoint)
    key = None if api_key_env is None else _read_api_key(api_key_env)
    login = (url.username, url.password) if url.username else None
    return Settings(
        endpoint=str(url.copy_with(username=None, password=None)).rstrip("/"),
        model=model,
        api=api,
        loads=read_loads("concurrency", concurrency or "1") if rate is None else read_loads("rate", rate),
        requests=requests,
        warm_up=warm_up,
        input_tokens=_USUAL_INPUT_TOKENS if input_tokens is None else input_tokens,
        output_tokens=output_tokens,
        timeout=timeout,
        seed=seed,
        prompts=prompts,
        prompts_field=field,
        extra={} if body is None else _read_body(body),
        credentials=Credentials(api_key=key, login=login),
    )


def _read_endpoint(text: str) -> httpx2.URL:
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
