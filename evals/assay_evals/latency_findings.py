"""How long users wait, from evidence to rows: for the first token, between tokens, for the last one, and with a prefix in the cache.

All come from the same requests. t_1 … t_n are the seconds from a request to its tokens; what a metric is, its function says. Time per
output token is one number for each request, and 1 / decode rate; inter-token latency pools all gaps of a process, so that a long request
counts for more, and has percentiles, which show what a mean hides: that some tokens come late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from assay.recipe import (
    EndToEndLatencyMetric,
    InterTokenLatencyMetric,
    PrefillMetric,
    PrefixReuseMetric,
    TimePerOutputTokenMetric,
    TimeToFirstTokenMetric,
)
from assay_evals.evidence import Evidence, Generation, PrefixHit, SpeedRun
from assay_evals.findings import UnmeasurableError, bounded_exp, finding
from assay_evals.speed_findings import (
    CONFIDENCE,
    all_times,
    blocks_of,
    declared,
    each_request,
    per_request,
    ratio,
    times,
)
from assay_evals.statistics import jackknife, t_interval
from assay_evals.verdict import Row
from assay_evals.wording import SLICE

_QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}
_TAIL_SEEN = 0.99


def time_to_first_token(evidence: Evidence) -> list[Row]:
    """t_1: a row for each prompt length."""
    metric = declared(evidence, TimeToFirstTokenMetric)
    return _by_length(metric, evidence, lambda generation: times(generation)[0])


def prefill_tokens_per_second(evidence: Evidence) -> list[Row]:
    """Tokens of the prompt / t_1."""
    metric = declared(evidence, PrefillMetric)
    return _by_length(metric, evidence, lambda generation: generation.prompt_tokens / times(generation)[0])


def time_per_output_token(evidence: Evidence) -> list[Row]:
    """(t_n − t_1) / (n − 1) of each request."""
    metric = declared(evidence, TimePerOutputTokenMetric)

    def seconds_per_token(generation: Generation) -> float:
        seconds = all_times(generation, metric.new_tokens)
        return (seconds[-1] - seconds[0]) / (len(seconds) - 1)

    return _by_length(metric, evidence, seconds_per_token)


def end_to_end_latency(evidence: Evidence) -> list[Row]:
    """t_n."""
    metric = declared(evidence, EndToEndLatencyMetric)
    return _by_length(metric, evidence, lambda generation: all_times(generation, metric.new_tokens)[-1])


def inter_token_latency(evidence: Evidence) -> list[Row]:
    """The mean of t_{k+1} − t_k over all requests of a process, and percentiles of the gaps of all processes of an arm.

    A percentile p is told where at least ln(1 − 0.99) / ln(p) gaps are there, so that one beyond it was seen with 99% probability
    (MLPerf's early stopping with no failure): 7 for p50, 44 for p90, 459 for p99. Its interval is the jackknife's over blocks.
    """
    metric = declared(evidence, InterTokenLatencyMetric)

    def gaps(run: SpeedRun) -> list[float]:
        found = [
            seconds
            for length in metric.prompt_tokens
            for seconds in each_request(run, length, lambda one: all_times(one, metric.new_tokens))
        ]
        return [later - earlier for seconds in found for earlier, later in pairwise(seconds)]

    def mean_gap(run: SpeedRun) -> float:
        found = gaps(run)
        return math.fsum(found) / len(found)

    rows = [*ratio(metric.metric, evidence, mean_gap)]
    blocks = [
        ([*gaps(block.baseline[0]), *gaps(block.baseline[1])], [*gaps(block.candidate[0]), *gaps(block.candidate[1])])
        for block in blocks_of(evidence)
    ]
    count = sum(len(baseline) for baseline, _ in blocks)
    for name, quantile in _QUANTILES.items():
        if count >= math.log(1 - _TAIL_SEEN) / math.log(quantile):
            rows += _percentile(f"{metric.metric}.{name}", quantile, blocks)
    return rows


# The gaps of a block: the baseline's, the candidate's.
_Gaps = tuple[list[float], list[float]]


def _percentile(metric: str, quantile: float, blocks: Sequence[_Gaps]) -> list[Row]:
    """The row of one percentile; none where many tokens come at one moment, so that it is zero and has no ratio."""

    def arms(chosen: Sequence[_Gaps]) -> tuple[float, float]:
        pooled = [[gap for block in chosen for gap in block[arm]] for arm in (0, 1)]
        return float(np.quantile(pooled[0], quantile)), float(np.quantile(pooled[1], quantile))

    without = [arms([*blocks[:index], *blocks[index + 1 :]]) for index in range(len(blocks))]
    whole = arms(blocks)
    if min(*whole, *(value for pair in without for value in pair)) <= 0:
        return []
    change = jackknife(math.log(whole[1] / whole[0]), [math.log(after / before) for before, after in without])
    low, high = t_interval(change, CONFIDENCE)
    return [
        finding(
            metric,
            arms=whole,
            difference=bounded_exp(change.mean),
            interval=(bounded_exp(low), bounded_exp(high)),
            confidence=CONFIDENCE,
            samples=sum(len(gaps) for block in blocks for gaps in block),
            clusters=len(blocks),
        )
    ]


def prefix_reuse(evidence: Evidence) -> list[Row]:
    """t_1 with the prefix in the cache; and as a share of t_1 without it.

    UnmeasurableError where the first token is another one than without the cache: then it does not hold what it should.
    """
    metric = declared(evidence, PrefixReuseMetric)

    def hit(run: SpeedRun) -> PrefixHit:
        place = f"Block {run.block}, process {run.position} ({run.arm})"
        wanted = (metric.prompt_tokens, metric.prefix_tokens)
        found = [one for one in run.prefix_hits if (one.prompt_tokens, one.prefix_tokens) == wanted]
        if len(found) != 1:
            raise UnmeasurableError(f"{place}: {len(found)} requests found their prefix in the cache; one was to.")
        for cold in each_request(run, metric.prompt_tokens, lambda generation: generation.first_token):
            if cold != found[0].first_token:
                raise UnmeasurableError(
                    f"{place}: with the prefix in the cache the first token is {found[0].first_token}, without it {cold}: "
                    "the cache does not hold what it should."
                )
        return found[0]

    def share(run: SpeedRun) -> float:
        seconds, cold = hit(run).seconds, per_request(run, metric.prompt_tokens, lambda one: times(one)[0])
        return math.nan if seconds is None else seconds / cold

    return [
        *ratio(metric.metric, evidence, lambda run: hit(run).seconds),
        *ratio(f"{metric.metric}.share", evidence, share),
    ]


_ByLength = TimeToFirstTokenMetric | PrefillMetric | TimePerOutputTokenMetric | EndToEndLatencyMetric


def _by_length(metric: _ByLength, evidence: Evidence, measure: Callable[[Generation], float]) -> list[Row]:
    """The rows of each prompt length, which is named where there are several."""
    rows: list[Row] = []
    for length in metric.prompt_tokens:
        one = len(metric.prompt_tokens) == 1
        name = metric.metric if one else f"{metric.metric}{SLICE}prompt_tokens={length}"
        rows += ratio(name, evidence, partial(per_request, prompt_tokens=length, measure=measure))
    return rows


# In the order of the recipe's schema.
MEASURES: dict[str, Callable[[Evidence], list[Row]]] = {
    "inter_token_latency": inter_token_latency,
    "time_per_output_token": time_per_output_token,
    "end_to_end_latency": end_to_end_latency,
    "time_to_first_token": time_to_first_token,
    "prefill_tokens_per_second": prefill_tokens_per_second,
    "prefix_reuse": prefix_reuse,
}
