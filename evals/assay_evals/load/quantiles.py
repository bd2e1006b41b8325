"""Quantiles of latencies with intervals that hold for any distribution, or the number of requests that one would need.

The interval is made of order statistics: X_(l) ≤ ξ_p < X_(u) with probability P(l ≤ B ≤ u − 1), B ~ Binomial(n, p) (David & Nagaraja 2003,
section 7.1). For p = 0.99 and 90 % both ends are samples only from n = 299 on: below that nobody knows how long the tail is, and no
figure is given.

Requests that are served together are alike, and so are all gaps between the chunks of one: n counts what is independent. With samples in
batches, n is the effective number n* = variance / SE², where SE is the clustered standard error of the mean (Korn & Graubard 1998, for
proportions), scaled by (z / t)² for the few batches that SE comes from: of the share of samples up to the quantile, or of the samples' ranks,
whichever is worth less.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from assay_evals.statistics import Array, Groups, Interval, clustered_mean, t_half_width

CONFIDENCE = 0.90
LEVELS = (0.50, 0.90, 0.99)
_TAIL = (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class Quantile:
    """value: the smallest sample that at least `level` of the samples do not exceed.  interval: at 90 %.

    Both are None where the interval does not exist; needs: how many times as many samples would have one.
    """

    level: float
    value: float | None
    interval: Interval | None
    needs: float | None = None


def fewest(level: float) -> int:
    """The smallest number of independent samples with a two-sided interval: max(p, 1 − p)^n ≤ 5 %."""
    return math.ceil(math.log(_TAIL) / math.log(max(level, 1 - level)))


def quantile(values: Sequence[float], batches: Sequence[int], level: float) -> Quantile:
    """One quantile of samples; batches: for each sample a label, shared by those that are not independent of each other."""
    if not values:
        return Quantile(level, None, None)
    samples = np.asarray(values, dtype=np.float64)
    order = np.sort(samples)
    count = len(order)
    value = float(order[math.ceil(count * level - 1e-9) - 1])
    independent = effective_count(samples, np.asarray(batches), level, value)
    ranks = order_ranks(math.floor(independent), level)
    if ranks is None:
        return Quantile(level, None, None, fewest(level) / independent)
    # A rank among n* stands for a stretch of ranks among n: its outer end.
    low = order[math.floor((ranks[0] - 1) * count / math.floor(independent))]
    high = order[math.ceil(ranks[1] * count / math.floor(independent)) - 1]
    return Quantile(level, value, (float(low), float(high)))


def order_ranks(count: int, level: float) -> tuple[int, int] | None:
    """Ranks (from 1) of the narrowest equal-tailed interval: each tail of the binomial at most 5 %; None where an end would be infinite."""
    if count < 1:
        return None
    low = int(stats.binom.ppf(_TAIL, count, level))
    high = int(stats.binom.ppf(1 - _TAIL, count, level)) + 1
    return (low, high) if low >= 1 and high <= count else None


def effective_count(values: Array, batches: NDArray[np.int64], level: float, value: float) -> float:
    """How many independent samples these are worth at a quantile of this value; at most their number, and 1 for a single batch."""
    count = len(values)
    _, labels = np.unique(batches, return_inverse=True)
    counts = np.bincount(labels).astype(np.float64)
    if len(counts) == count:
        return float(count)
    if len(counts) == 1:
        return 1.0
    ranks = stats.rankdata(values)
    worths = [float(count)]
    # Of the quantile's own tail few batches tell, at times none; ranks tell of all samples, but not of what only the tail has in common.
    for score, variance in ((ranks, float(ranks.var())), (values <= value, level * (1 - level))):
        sums = np.bincount(labels, weights=score).astype(np.float64)
        error = clustered_mean(Groups(sums, counts)).standard_error
        if error > 0:
            worths.append(variance / error**2)
    few = t_half_width(1.0, math.inf, CONFIDENCE) / t_half_width(1.0, len(counts) - 1, CONFIDENCE)
    return max(1.0, few**2 * min(worths))
