"""Throughput of a level with its interval, from batches of time.

What is counted is what happened between the first measured request's start and the last one's end, whichever phase it belongs to: all that time
the load was on. Its equal slices are the batches: rate ± t_{B−1} · s / √B over the rates of B slices (batch means; Law 2015, section 9.5.3).
Slices shorter than a request would depend on each other, so there are at most as many as median latencies fit, and fewer than 5 tell nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from assay_evals.load.quantiles import CONFIDENCE
from assay_evals.statistics import Interval, plain_mean, t_interval

_MOST_SLICES, _FEWEST_SLICES = 10, 5


@dataclass(frozen=True)
class Rate:
    """Per second, or what follows from it.  interval: at 90 %; needs: how many times as many requests would have one, where there is none."""

    value: float
    interval: Interval | None
    needs: float | None = None


def rate(times: Sequence[float], weights: Sequence[float], window: Interval, latency: float) -> Rate:
    """Weights of what happened in a window, per second; latency: median of a request's, in seconds."""
    start, end = window
    seconds = end - start
    inside = [(at, weight) for at, weight in zip(times, weights, strict=True) if start <= at <= end]
    total = sum(weight for _, weight in inside) / seconds
    fit = seconds / latency
    slices = min(_MOST_SLICES, int(fit))
    if slices < _FEWEST_SLICES:
        return Rate(total, None, _FEWEST_SLICES / fit)
    sums, _ = np.histogram(
        [at for at, _ in inside], bins=slices, range=window, weights=[weight for _, weight in inside]
    )
    low, high = t_interval(plain_mean((sums / (seconds / slices)).tolist()), CONFIDENCE)
    return Rate(total, (max(0.0, low), high))


def cost_per_million(price_per_hour: float, tokens_per_second: Rate) -> Rate | None:
    """price / (tokens/s · 3600) · 10⁶; its interval turns that of the throughput round. None when there were no tokens."""

    def cost(speed: float) -> float:
        return price_per_hour / (speed * 3600) * 1e6

    if tokens_per_second.value <= 0:
        return None
    bounds = tokens_per_second.interval
    if bounds is None or bounds[0] <= 0:
        return Rate(cost(tokens_per_second.value), None, tokens_per_second.needs)
    return Rate(cost(tokens_per_second.value), (cost(bounds[1]), cost(bounds[0])))
