"""Quantiles and their intervals: against plain sums of binomial probabilities, and by how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from assay_evals.load.quantiles import LEVELS, fewest, order_ranks, quantile


def naive_ranks(count: int, level: float) -> tuple[int, int] | None:
    """The largest l with P(B ≤ l − 1) ≤ 5 % and the smallest u with P(B ≥ u) ≤ 5 %, by adding up the binomial."""

    def probability(hits: range) -> float:
        return sum(math.comb(count, k) * level**k * (1 - level) ** (count - k) for k in hits)

    low = max((rank for rank in range(1, count + 1) if probability(range(rank)) <= 0.05), default=None)
    high = min((rank for rank in range(1, count + 1) if probability(range(rank, count + 1)) <= 0.05), default=None)
    return None if low is None or high is None else (low, high)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.slow
def test_ranks_are_those_of_the_binomial(level: float) -> None:
    for count in (1, 2, 4, 5, 6, 10, 28, 29, 30, 57, 100, 298, 299, 300, 700):
        assert order_ranks(count, level) == naive_ranks(count, level), count


@pytest.mark.parametrize(("level", "count"), [(0.5, 5), (0.9, 29), (0.99, 299)])
def test_the_fewest_samples_are_the_first_with_both_ends(level: float, count: int) -> None:
    assert fewest(level) == count
    assert order_ranks(count - 1, level) is None and order_ranks(count, level) is not None


def test_values_and_ends_are_samples_of_these_ranks() -> None:
    values = [float(value) for value in np.random.default_rng(0).permutation(300)]
    for level, value in zip(LEVELS, (149.0, 269.0, 296.0), strict=True):
        found = quantile(values, range(300), level)
        low, high = order_ranks(300, level) or (0, 0)
        assert (found.value, found.interval, found.needs) == (value, (low - 1.0, high - 1.0), None)


def test_too_few_samples_give_no_figure_but_what_they_lack() -> None:
    found = quantile([1.0] * 100, range(100), 0.99)
    assert (found.value, found.interval) == (None, None) and found.needs == pytest.approx(2.99)
    assert quantile([], [], 0.5).value is None


def test_samples_that_repeat_their_batch_count_once() -> None:
    """Forty batches of eight equal samples know as much as forty samples."""
    distinct = np.random.default_rng(1).normal(size=40)
    batches = np.repeat(np.arange(40), 8).tolist()
    found = quantile(np.repeat(distinct, 8).tolist(), batches, 0.5)
    alone = quantile(distinct.tolist(), range(40), 0.5)
    assert found.value == alone.value and found.interval and alone.interval
    assert found.interval[0] <= alone.interval[0] and found.interval[1] >= alone.interval[1]
    assert found.interval[1] - found.interval[0] < 1.5 * (alone.interval[1] - alone.interval[0])
    assert quantile(np.repeat(distinct, 8).tolist(), batches, 0.99).value is None


def test_a_single_batch_tells_of_no_spread() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0] * 6, 0.5).value is None


@pytest.mark.slow
@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("batches", "size"), [(300, 1), (75, 4), (100, 20)])
def test_the_interval_holds_the_truth_at_least_as_often_as_it_says(batches: int, size: int, alike: float) -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(batches), size).tolist()
    for level in LEVELS:
        truth, inside, made = float(stats.norm.ppf(level)), 0, 0
        for _ in range(300):
            shared = np.repeat(rng.normal(0, math.sqrt(alike), batches), size)
            values = shared + rng.normal(0, math.sqrt(1 - alike), batches * size)
            if interval := quantile(values.tolist(), labels, level).interval:
                made += 1
                inside += interval[0] <= truth <= interval[1]
        assert not made or inside / made >= 0.86, (level, inside, made)
        assert made == 300 or level == 0.99
