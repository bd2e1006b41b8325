"""What the requests of a level come to: rates, latencies with intervals, failures by kind, and what a reader has to know beside them.

Everything here is computed from the level's rows alone, so that a result can be judged again by other objectives. Latencies are those of the
measured requests that succeeded; failures and objectives count all that were measured.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from assay_evals.load.arrivals import Load
from assay_evals.load.objectives import Asked, Objectives
from assay_evals.load.quantiles import CONFIDENCE, LEVELS, Quantile, quantile
from assay_evals.load.rates import Rate, cost_per_million, rate
from assay_evals.load.records import Level, Parameters, Request
from assay_evals.statistics import Interval, binomial_lower, binomial_upper

Counting = Literal["by the server", "one per chunk", "by the server, or one per chunk where it gave no usage"]
_TAIL = (1 - CONFIDENCE) / 2
_NOTABLE = 0.10
_BUSY = 0.8


@dataclass(frozen=True)
class Percentile:
    """One percentile in seconds; needs_requests: how many measured requests would give it an interval, where these do not."""

    level: float
    seconds: float | None
    interval: Interval | None
    needs_requests: int | None


@dataclass(frozen=True)
class Share:
    """Of the measured requests, with its exact interval (Clopper & Pearson 1934)."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Throughput:
    """Per second, or a price.  needs_requests: how many measured requests would give it an interval, where these do not."""

    value: float
    interval: Interval | None
    needs_requests: int | None


@dataclass(frozen=True)
class Failures:
    """Failures of one kind, with the first one's message."""

    kind: str
    count: int
    first_message: str


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of a count of tokens."""

    smallest: int
    median: float
    largest: int


@dataclass(frozen=True, kw_only=True)
class LevelFindings:
    """One level. The latencies are lists of percentiles; empty where no request has such a time.

    goodput, good_share: of requests that met every objective; None without objectives.
    """

    load: Load
    requests: int
    warm_up: int
    cool_down: int
    unfinished: int
    stopped: str | None
    failures: tuple[Failures, ...]
    error_rate: Share | None
    good_share: Share | None
    goodput_requests_per_second: Throughput | None
    requests_per_second: Throughput | None
    output_tokens_per_second: Throughput | None
    cost_per_million_output_tokens: Throughput | None
    time_to_first_token: tuple[Percentile, ...]
    inter_token_latency: tuple[Percentile, ...]
    time_per_output_token: tuple[Percentile, ...]
    end_to_end_latency: tuple[Percentile, ...]
    prompt_tokens: Spread | None
    output_tokens: Spread | None
    output_tokens_counted: Counting | None
    notes: tuple[str, ...]


def find(level: Level, parameters: Parameters, asked: Asked) -> LevelFindings:
    """The findings of one level."""
    measured = level.measured
    succeeded = [request for request in measured if request.succeeded]
    batches = _batches(level, succeeded)
    objectives = asked.objectives
    good = None if objectives is None else [request for request in measured if objectives.met_by(request)]
    rates = _Rates(level, len(measured))
    tokens = rates.of_tokens()
    cost = None
    if asked.price_per_hour is not None and tokens is not None:
        cost = cost_per_million(asked.price_per_hour, tokens)
    return LevelFindings(
        load=level.load,
        requests=len(measured),
        warm_up=sum(request.phase == "warm-up" for request in level.requests),
        cool_down=sum(request.phase == "cool-down" for request in level.requests),
        unfinished=level.unfinished,
        stopped=level.stopped,
        failures=_failures(measured),
        error_rate=_share(len(measured) - len(succeeded), len(measured)),
        good_share=None if good is None else _share(len(good), len(measured)),
        goodput_requests_per_second=None if objectives is None else rates.throughput(rates.of_requests(objectives)),
        requests_per_second=rates.throughput(rates.of_requests(Objectives())),
        output_tokens_per_second=rates.throughput(tokens),
        cost_per_million_output_tokens=rates.throughput(cost),
        time_to_first_token=_percentiles([_one(request.time_to_first_token) for request in succeeded], batches),
        inter_token_latency=_percentiles([request.inter_token_latencies for request in succeeded], batches),
        time_per_output_token=_percentiles([_one(request.time_per_output_token) for request in succeeded], batches),
        end_to_end_latency=_percentiles([[request.end_to_end_latency] for request in succeeded], batches),
        prompt_tokens=_spread([request.answer.prompt_tokens for request in succeeded]),
        output_tokens=_spread([request.answer.tokens for request in succeeded]),
        output_tokens_counted=_counting(succeeded),
        notes=tuple(_notes(level, succeeded, parameters)),
    )


def reasons_to_fail(findings: Sequence[LevelFindings], asked: Asked) -> list[str]:
    """Why the limits are not kept, a sentence each; empty when they are."""
    reasons: list[str] = []
    for level in findings:
        if level.error_rate and level.error_rate.value > asked.max_error_rate:
            failed = sum(kind.count for kind in level.failures)
            first = level.failures[0]
            reasons.append(
                f"{level.load}: {failed} of {level.requests} requests failed, {100 * level.error_rate.value:.1f}%; at most "
                f"{100 * asked.max_error_rate:g}% was asked. {first.kind}: {first.first_message}."
            )
        share = level.good_share
        if asked.min_goodput is not None and share and share.value < asked.min_goodput:
            reasons.append(
                f"{level.load}: {100 * share.value:.1f}% of the requests met every objective; at least "
                f"{100 * asked.min_goodput:g}% was asked."
            )
    return reasons


def _one(time: float | None) -> list[float]:
    return [] if time is None else [time]


def _share(count: int, total: int) -> Share | None:
    if not total:
        return None
    return Share(count / total, (binomial_lower(count, total, _TAIL), binomial_upper(count, total, _TAIL)))


def _batches(level: Level, succeeded: Sequence[Request]) -> list[int]:
    """For each request the batch of neighbours that it was served with: as many as were in flight on average (Little: rate · latency)."""
    size = level.load.value
    if level.load.kind == "rate" and succeeded:
        size *= statistics.fmean(request.end_to_end_latency for request in succeeded)
    return [position // max(1, round(size)) for position in range(len(succeeded))]


def _percentiles(times: Sequence[Sequence[float]], batches: Sequence[int]) -> tuple[Percentile, ...]:
    """times: those of each request."""
    pooled = [time for one in times for time in one]
    labels = [batch for one, batch in zip(times, batches, strict=True) for _ in one]
    having = sum(bool(one) for one in times)
    found = [quantile(pooled, labels, level) for level in LEVELS] if pooled else []
    return tuple(_percentile(one, having) for one in found)


def _percentile(found: Quantile, requests: int) -> Percentile:
    needs = None if found.needs is None else math.ceil(requests * found.needs - 1e-9)
    return Percentile(found.level, found.value, found.interval, needs)


class _Rates:
    """Rates over the time in which the load was on."""

    def __init__(self, level: Level, measured: int) -> None:
        self._requests = [request for request in level.requests if request.succeeded]
        self._measured = measured
        latencies = [request.end_to_end_latency for request in self._requests]
        self._latency = statistics.median(latencies) if latencies else 0.0
        ends = [request.answer.ended for request in level.measured]
        self._window = (min(request.due for request in level.measured), max(ends)) if ends else (0.0, 0.0)

    def _rate(self, times: Sequence[float], weights: Sequence[float]) -> Rate | None:
        known = self._latency > 0 and self._window[1] > self._window[0]
        return rate(times, weights, self._window, self._latency) if known else None

    def of_tokens(self) -> Rate | None:
        """Each chunk counts as tokens of its request / chunks of its request; failed requests give none that anyone could use."""
        chunks = [
            (at, request.answer.tokens / len(request.answer.chunks))
            for request in self._requests
            for at in request.answer.chunks
        ]
        return self._rate([at for at, _ in chunks], [tokens for _, tokens in chunks])

    def of_requests(self, objectives: Objectives) -> Rate | None:
        """Requests that ended, and met the objectives."""
        ends = [request.answer.ended for request in self._requests if objectives.met_by(request)]
        return self._rate(ends, [1.0] * len(ends))

    def throughput(self, found: Rate | None) -> Throughput | None:
        if found is None:
            return None
        needs = None if found.needs is None else math.ceil(self._measured * found.needs)
        return Throughput(found.value, found.interval, needs)


def _failures(requests: Sequence[Request]) -> tuple[Failures, ...]:
    """The most frequent kind first."""
    found = [request.answer.failure for request in requests if request.answer.failure]
    first = {failure.kind: failure.message for failure in reversed(found)}
    return tuple(Failures(kind, count, first[kind]) for kind, count in Counter(one.kind for one in found).most_common())


def _spread(counts: Sequence[int | None]) -> Spread | None:
    known = [count for count in counts if count is not None]
    return Spread(min(known), statistics.median(known), max(known)) if known else None


def _counting(requests: Sequence[Request]) -> Counting | None:
    ways = {request.answer.output_tokens is None for request in requests}
    if not ways:
        return None
    if len(ways) > 1:
        return "by the server, or one per chunk where it gave no usage"
    return "one per chunk" if True in ways else "by the server"


def _notes(level: Level, succeeded: Sequence[Request], parameters: Parameters) -> list[str]:
    """What makes the figures mean something else than they seem to."""
    notes: list[str] = []
    if level.stopped:
        notes.append(f"stopped: {level.stopped}; {level.unfinished} unfinished requests are in no figure")
    if not succeeded:
        return notes
    notes += [*_token_notes(succeeded, parameters), *_client_notes(level, succeeded)]
    if level.load.kind == "rate" and (grown := _backlog_growth(level)):
        notes.append(
            f"it does not keep up with this rate: {grown[1]} requests were in flight when the last measured one arrived, {grown[0]} "
            "when the first did; latencies grow for as long as one measures"
        )
    return notes


def _token_notes(succeeded: Sequence[Request], parameters: Parameters) -> list[str]:
    notes: list[str] = []
    if any(request.answer.output_tokens is None for request in succeeded):
        notes.append("the endpoint gives no usage: an output token is counted for each chunk")
    tokens = sum(request.answer.tokens for request in succeeded)
    chunks = sum(len(request.answer.chunks) for request in succeeded)
    if all(len(request.answer.chunks) == 1 for request in succeeded) and tokens > len(succeeded):
        notes.append(
            "whole answers come in one chunk: the endpoint does not stream, and the first token's time is the last one's"
        )
    elif tokens > (1 + _NOTABLE) * chunks:
        notes.append(
            f"a chunk carries {tokens / chunks:.1f} tokens on average: ITL is the time between chunks, TPOT between tokens"
        )
    output = statistics.median(request.answer.tokens for request in succeeded)
    if output < (1 - _NOTABLE) * parameters.output_tokens:
        notes.append(
            f"answers have {output:g} tokens (median) of the {parameters.output_tokens} allowed; "
            """servers that know it go on to the end with --body '{"ignore_eos": true}'"""
        )
    prompts = [request.answer.prompt_tokens for request in succeeded if request.answer.prompt_tokens is not None]
    if prompts and parameters.input_tokens and abs(statistics.median(prompts) / parameters.input_tokens - 1) > _NOTABLE:
        notes.append(
            f"prompts have {statistics.median(prompts):g} tokens (median); {parameters.input_tokens} were asked for"
        )
    cached = sum(request.answer.cached_tokens or 0 for request in succeeded)
    if prompts and cached > _NOTABLE * sum(prompts):
        notes.append(f"{100 * cached / sum(prompts):.0f}% of the prompt tokens came out of the server's prefix cache")
    return notes


def _client_notes(level: Level, succeeded: Sequence[Request]) -> list[str]:
    """The client's lag has to be small against the shortest time that is measured."""
    client = level.client
    if client is None:
        return ["the client's own lag could not be measured on this system"]
    notes: list[str] = []
    times = [
        statistics.median(found)
        for of in (lambda one: one.time_to_first_token, lambda one: one.time_per_output_token)
        if (found := [time for one in succeeded if (time := of(one)) is not None])
    ]
    if times and client.p99_seconds > _NOTABLE * min(times):
        notes.append(
            f"the client lagged by up to {1000 * client.p99_seconds:.1f} ms (p99), which is not small against {1000 * min(times):.1f} ms: "
            "give it a core of its own, or measure less at once"
        )
    if client.processor_share > _BUSY:
        notes.append(
            f"the client used {100 * client.processor_share:.0f}% of a core: it may be what limits the throughput"
        )
    return notes


def _backlog_growth(level: Level) -> tuple[int, int] | None:
    """Requests in flight at the first and the last measured arrival, when so many more at the last are hardly chance.

    In a queue that keeps up both are about Poisson, so that their difference has a standard deviation of √(first + last). More than two of
    these, and more than a tenth of all arrivals in between, is a queue that grows.
    """
    measured = level.measured
    if len(measured) < 2:
        return None
    first, last = (
        sum(one.due <= at < one.answer.ended for one in level.requests) for at in (measured[0].due, measured[-1].due)
    )
    grown = last - first
    return (first, last) if grown > 2 * math.sqrt(first + last) and grown > _NOTABLE * len(measured) else None
