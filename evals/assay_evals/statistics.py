"""The statistics of a verdict: intervals for paired quality, for skewed means and for speed over blocks.

Every function cites its formula. What varies independently is the cluster (a document) or the block (four processes),
never the token or the request, so spread is always taken over those. Sums that verdicts depend on are exact
(`math.fsum`), and resampling draws from raw PCG64 output, whose stream numpy promises not to change.
Left out on purpose: tests of "no difference" (not finding one is no reason to pass), and dropping outliers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Interval = tuple[float, float]
Array = NDArray[np.float64]

POWER = 0.80
DRAWS = 2000
_CHUNK_INDICES = 1 << 22


@dataclass(frozen=True)
class Groups:
    """Samples collapsed to their clusters: the sum and the count of each."""

    sums: Array
    counts: Array

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def clusters(self) -> int:
        return len(self.counts)


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and the degrees of freedom that the error was estimated with."""

    mean: float
    standard_error: float
    degrees: int


def grouped(sums: Sequence[float], labels: Sequence[str], counts: Sequence[int] | None = None) -> Groups:
    """Collapse items to one sum and one count per label, in the order of the labels.

    Each item is one sample, or `counts` samples; the order of the items does not matter to the last bit.
    """
    items = zip(labels, sums, [1] * len(sums) if counts is None else counts, strict=True)
    members: dict[str, list[tuple[float, int]]] = {}
    for label, total, count in items:
        members.setdefault(label, []).append((total, count))
    groups = [members[label] for label in sorted(members)]
    return Groups(
        np.array([math.fsum(total for total, _ in group) for group in groups], dtype=np.float64),
        np.array([sum(count for _, count in group) for group in groups], dtype=np.float64),
    )


def clustered_mean(groups: Groups) -> Estimate:
    """Mean over samples with a standard error clustered by group; needs two groups.

    SE = sqrt(G/(G−1) · Σ_g (Σ_{i∈g} (x_i − x̄))²) / n (Liang & Zeger 1986; Miller 2024, "Adding error bars to evals",
    which leaves out the small-sample factor G/(G−1) of Cameron & Miller 2015). Degrees of freedom: G − 1.
    """
    count, total = groups.clusters, groups.samples
    mean = math.fsum(groups.sums) / total
    residuals = groups.sums - mean * groups.counts
    spread = math.fsum(residuals * residuals) * count / (count - 1)
    return Estimate(mean, math.sqrt(spread) / total, count - 1)


def plain_mean(values: Sequence[float]) -> Estimate:
    """Mean and s/√n of independent values, such as one log-ratio per block: each value is its own cluster."""
    return clustered_mean(Groups(np.asarray(values, dtype=np.float64), np.ones(len(values))))


def jackknife(whole: float, without: Sequence[float]) -> Estimate:
    """Standard error of an estimate from what it is without each of its groups: for percentiles of what was pooled.

    SE² = (J−1)/J · Σ_j (θ_(j) − mean of θ_(j))², degrees of freedom J − 1 (Tukey 1958). That single values are left out makes it
    wrong for percentiles; groups of many make it right (Shao & Wu 1989).
    """
    count = len(without)
    mean = math.fsum(without) / count
    spread = math.fsum((value - mean) ** 2 for value in without) * (count - 1) / count
    return Estimate(whole, math.sqrt(spread), count - 1)


def t_interval(estimate: Estimate, confidence: float) -> Interval:
    """Two-sided Student interval: mean ± `t_half_width`."""
    half_width = t_half_width(estimate.standard_error, estimate.degrees, confidence)
    return estimate.mean - half_width, estimate.mean + half_width


def t_half_width(standard_error: float, degrees: float, confidence: float) -> float:
    """Half-width of a two-sided Student interval: t_{(1+confidence)/2, degrees} · SE."""
    return _t(0.5 + confidence / 2, degrees) * standard_error


def bootstrap_t_interval(groups: Groups, confidence: float, draws: int = DRAWS, seed: int = 0) -> Interval:
    """Two-sided studentised cluster bootstrap of a ratio-mean Σ sums / Σ counts.

    Draw G clusters with replacement, take t* = (mean* − mean) / SE*, and invert its quantiles:
    [mean − t*_{high} · SE, mean − t*_{low} · SE] (Efron & Tibshirani 1993, section 12.5). Unlike the percentile
    interval it follows the skew of a heavy-tailed mean. Draws without spread (all one cluster) have no t*.
    """
    estimate, count = clustered_mean(groups), groups.clusters
    if estimate.standard_error == 0:
        return estimate.mean, estimate.mean
    source = np.random.PCG64(seed)
    pieces: list[Array] = []
    step = max(1, _CHUNK_INDICES // count)
    for first in range(0, draws, step):
        rows = min(step, draws - first)
        # Remainders of 64-bit integers: the bias is below count / 2**64.
        picked = (source.random_raw(rows * count) % np.uint64(count)).astype(np.int64).reshape(rows, count)
        sums, counts = groups.sums[picked], groups.counts[picked]
        totals = counts.sum(axis=1)
        means = sums.sum(axis=1) / totals
        residuals = sums - means[:, None] * counts
        errors = np.sqrt((residuals * residuals).sum(axis=1) * count / (count - 1)) / totals
        spread = errors > 1e-9 * estimate.standard_error
        pieces.append((means[spread] - estimate.mean) / errors[spread])
    low, high = np.quantile(np.concatenate(pieces), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return estimate.mean - float(high) * estimate.standard_error, estimate.mean - float(low) * estimate.standard_error


def cautious_interval(groups: Groups, confidence: float) -> Interval:
    """On each side the wider of the Student and the bootstrap interval, with the cluster that pulls hardest to that side counted once more.

    Few clusters show less of a long tail than there is: their mean is then too good and their spread too small at the same time, and either
    interval alone lets a bad candidate pass up to twice as often as it says. The cluster counted twice moves an end by some
    1/√G of its own width; the simulations are in benchmarks/gate_soundness.py.
    """
    pulls = groups.sums - clustered_mean(groups).mean * groups.counts
    lower, upper = (_once_more(groups, int(index)) for index in (np.argmin(pulls), np.argmax(pulls)))
    low = min(t_interval(clustered_mean(lower), confidence)[0], bootstrap_t_interval(lower, confidence)[0])
    high = max(t_interval(clustered_mean(upper), confidence)[1], bootstrap_t_interval(upper, confidence)[1])
    return low, high


def _once_more(groups: Groups, index: int) -> Groups:
    return Groups(np.append(groups.sums, groups.sums[index]), np.append(groups.counts, groups.counts[index]))


def binomial_upper(successes: int, trials: int, alpha: float) -> float:
    """Exact one-sided upper bound of a proportion: the p with P(X ≤ successes | p) = alpha (Clopper & Pearson 1934)."""
    return 1.0 if successes >= trials else float(stats.beta.ppf(1 - alpha, successes + 1, trials - successes))


def binomial_lower(successes: int, trials: int, alpha: float) -> float:
    """Exact one-sided lower bound of a proportion: the p with P(X ≥ successes | p) = alpha (Clopper & Pearson 1934)."""
    return 0.0 if successes <= 0 else float(stats.beta.ppf(alpha, successes, trials - successes + 1))


def rare_difference_interval(lost: int, gained: int, trials: int, alpha: float) -> Interval:
    """Bounds of (gained − lost) / trials that hold when answers almost never differ, each one-sided at `alpha`.

    Below: the loss is at most its own Clopper–Pearson bound, whatever was gained, so 0 losses in 299 show a loss ≤ 1%.
    Above: gained at most, lost at least, each at alpha/2 (Bonferroni), so that a plain loss can still be shown.
    """
    lower = -binomial_upper(lost, trials, alpha)
    return lower, binomial_upper(gained, trials, alpha / 2) - binomial_lower(lost, trials, alpha / 2)


def block_log_ratio(baseline: tuple[float, float], candidate: tuple[float, float]) -> float:
    """ln(candidate / baseline) of one ABBA or BAAB block: the difference of the means of the logarithms.

    In these orders a linear drift of the machine adds the same to both arms and cancels.
    """
    return (math.log(candidate[0]) + math.log(candidate[1]) - math.log(baseline[0]) - math.log(baseline[1])) / 2


def same_arm_log_ratio(baseline: tuple[float, float], candidate: tuple[float, float]) -> float:
    """The A/A control of one block: ln(later / earlier) of the two processes of an arm, averaged over both arms.

    For independent processes of equal noise σ its variance is σ², exactly that of `block_log_ratio`; its true value
    is 0 on a machine that does not drift. Each pair is in the order of running.
    """
    return (math.log(baseline[1] / baseline[0]) + math.log(candidate[1] / candidate[0])) / 2


def detectable(standard_error: float, degrees: float, alpha: float) -> float:
    """Distance of the truth from a limit that is resolved with 80% probability: (t_{1−alpha} + t_{0.80}) · SE.

    The sample-size formula n = (z_{1−alpha} + z_{power})² σ² / distance², solved for the distance, with t for z.
    degrees may be math.inf, for planning.
    """
    return (_t(1 - alpha, degrees) + _t(POWER, degrees)) * standard_error


def resolved(estimate: Estimate, bound: float) -> float:
    """`detectable` for an interval that was found: from the mean to its end, and t_{0.80} · SE beyond."""
    return abs(estimate.mean - bound) + _t(POWER, estimate.degrees) * estimate.standard_error


def outliers(values: Sequence[float]) -> list[int]:
    """Positions with |x − median| / (1.4826 · MAD) > 3.5 (Iglewicz & Hoaglin 1993): to be shown, never dropped.

    When more than half of the values are equal the MAD is 0, and 1.2533 · mean |x − median| takes its place.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        return []
    distances = np.abs(data - np.median(data))
    scale = 1.4826 * float(np.median(distances)) or 1.2533 * float(np.mean(distances))
    return [int(index) for index in np.flatnonzero(distances > 3.5 * scale)]


def _t(probability: float, degrees: float) -> float:
    return float(stats.t.ppf(probability, degrees) if math.isfinite(degrees) else stats.norm.ppf(probability))
