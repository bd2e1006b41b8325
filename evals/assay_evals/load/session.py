"""A load test from its settings to its result: find how long prompts are, run every level.

The first requests say at once what would fail every one, and how long a prompt of so many tokens is.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from assay.errors import UsageError
from assay.host import environment
from assay.progress import Progress
from assay_evals.load.arrivals import Load, read_loads
from assay_evals.load.artifact import read_artifact
from assay_evals.load.client import Client, Target
from assay_evals.load.endpoint import read_endpoint
from assay_evals.load.prompts import CHARACTERS_PER_TOKEN, PromptOf, documentation_prompts, file_prompts
from assay_evals.load.records import Level, Measured, Parameters
from assay_evals.load.runner import LevelPlan, run_level, usual_warm_up
from assay_evals.load.wire import Api
from assay_evals.runtimes.base import check_length

# Of a prompt's length: less, because what is longer may not fit the model's context.
_TRIAL_PARTS = (0.25, 0.75)
_USUAL_INPUT_TOKENS = 256
_FITTING_STEPS, _FITTED_PROMPTS = 5, 15


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is to be sent.  input_tokens: of the prompts from Python's documentation, unless a file has others."""

    target: Target
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

    def warm_up_of(self, load: Load) -> int:
        return usual_warm_up(load, self.requests) if self.warm_up is None else self.warm_up

    @property
    def sent(self) -> int:
        """Requests of all levels, without those that cool down."""
        return sum(self.warm_up_of(load) + self.requests for load in self.loads)


def measure(settings: Settings, progress: Progress) -> Measured:
    """Run every level in turn; a level that is stopped is the last one."""
    return asyncio.run(_measure(settings, progress))


async def _measure(settings: Settings, progress: Progress) -> Measured:
    async with settings.target.open(settings.timeout) as client:
        prompt_of = await _prompts(client, settings)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        levels: list[Level] = []
        first = 0
        for load in settings.loads:
            plan = LevelPlan(
                load=load,
                warm_up=settings.warm_up_of(load),
                measured=settings.requests,
                output_tokens=settings.output_tokens,
                first=first,
                seed=f"{settings.seed}/{load}",
            )
            with progress.stage(str(load), settings.requests) as advance:
                levels.append(await run_level(client, plan, prompt_of, advance))
            first += len(levels[-1].requests) + levels[-1].unfinished
            if levels[-1].stopped:
                break
        return Measured(
            started=started,
            environment=environment() | client.software,
            parameters=_parameters(settings, client),
            levels=tuple(levels),
        )


def _parameters(settings: Settings, client: Client) -> Parameters:
    return Parameters(
        prompts="python-docs" if settings.prompts is None else str(settings.prompts),
        input_tokens=settings.input_tokens if settings.prompts is None else None,
        output_tokens=settings.output_tokens,
        requests=settings.requests,
        timeout_seconds=settings.timeout,
        seed=settings.seed,
        notes=tuple(client.notes),
        **client.used(),
    )


async def _prompts(client: Client, settings: Settings) -> PromptOf:
    """What each request says, tried out on the client."""
    if settings.prompts is None:
        _check_context(client, settings.input_tokens, settings.output_tokens)
        length = await (_fitted if client.counts_alone else _extrapolated)(client, settings)
        return documentation_prompts(length, settings.seed)
    prompts = file_prompts(settings.prompts, settings.prompts_field, settings.api)
    _check_context(client, await client.count(prompts[0], settings.output_tokens), settings.output_tokens)
    if len(prompts) < settings.sent:
        client.notes.append(
            f"{len(prompts)} prompts come round again; what the server has cached of them is not computed anew"
        )
    return lambda number: prompts[number % len(prompts)]


async def _fitted(client: Client, settings: Settings) -> int:
    """Characters of a prompt of so many tokens: changed until the median of some prompts has them."""
    wanted = settings.input_tokens
    characters = CHARACTERS_PER_TOKEN * wanted
    for _ in range(_FITTING_STEPS):
        prompts = documentation_prompts(round(characters), settings.seed)
        counts = [await client.count(prompts(-1 - number), settings.output_tokens) for number in range(_FITTED_PROMPTS)]
        characters = max(1.0, characters * wanted / statistics.median(count or 1 for count in counts))
    return round(characters)


async def _extrapolated(client: Client, settings: Settings) -> int:
    """Likewise by two requests alone: through them goes the line tokens = those of a template + share · characters."""
    wanted = settings.input_tokens
    lengths: list[int] = []
    counts: list[int] = []
    for number, part in enumerate(_TRIAL_PARTS):
        characters = round(CHARACTERS_PER_TOKEN * part * max(wanted, _USUAL_INPUT_TOKENS))
        # Numbers that no request of a level has.
        prompt = documentation_prompts(characters, settings.seed)(-1 - number)
        tokens = await client.count(prompt, settings.output_tokens)
        if tokens is None:
            client.notes.append("the endpoint counts no prompt tokens: four characters are taken for one")
            return round(CHARACTERS_PER_TOKEN * wanted)
        lengths.append(len(prompt))
        counts.append(tokens)
    share = max(1, counts[1] - counts[0]) / (lengths[1] - lengths[0])
    return max(1, round(lengths[0] + (wanted - counts[0]) / share))


def _check_context(client: Client, tokens: int | None, output_tokens: int) -> None:
    if tokens is not None and client.context_length is not None:
        check_length(tokens, output_tokens, client.context_length)


def read_settings(
    *,
    directory: Path | None,
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
    if concurrency is not None and rate is not None:
        raise UsageError("--concurrency is a closed loop, --rate an open one: give one of them.")
    if prompts is not None and input_tokens is not None:
        raise UsageError("--prompts has prompts of their own length, --input-tokens makes some: give one of them.")
    if (directory is None) == (endpoint is None):
        raise UsageError(
            "give either an artifact directory, or --endpoint with the base URL of an API, such as http://127.0.0.1:8000/v1."
        )
    loads = read_loads("concurrency", concurrency or "1") if rate is None else read_loads("rate", rate)
    if directory is not None:
        target: Target = read_artifact(directory, loads, model=model, api=api, body=body, api_key_env=api_key_env)
    else:
        assert endpoint is not None
        target = read_endpoint(endpoint, model=model, api=api, body=body, api_key_env=api_key_env)
    return Settings(
        target=target,
        api=api,
        loads=loads,
        requests=requests,
        warm_up=warm_up,
        input_tokens=_USUAL_INPUT_TOKENS if input_tokens is None else input_tokens,
        output_tokens=output_tokens,
        timeout=timeout,
        seed=seed,
        prompts=prompts,
        prompts_field=field,
    )
