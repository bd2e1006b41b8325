"""Rates over a window, and what they cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from assay_evals.load.rates import Rate, cost_per_million, rate


def test_only_what_is_in_the_window_counts() -> None:
    found = rate([0.0, 1.0, 2.0, 3.0, 9.0], [100.0, 1.0, 2.0, 3.0, 100.0], (1.0, 5.0), 10.0)
    assert found.value == 6 / 4 and found.interval is None
    # Four seconds hold 0.4 latencies; five are needed.
    assert found.needs == pytest.approx(12.5)


def test_the_interval_is_student_s_over_ten_slices() -> None:
    counts = [3, 5, 4, 6, 2, 5, 4, 4, 3, 6]
    times = [10 + 2 * place + 0.5 for place, count in enumerate(counts) for _ in range(count)]
    found = rate(times, [2.0] * len(times), (10.0, 30.0), 1.0)
    speeds = np.array(counts) * 2.0 / 2
    half = stats.t.ppf(0.95, 9) * speeds.std(ddof=1) / math.sqrt(10)
    assert found.value == pytest.approx(speeds.mean())
    assert found.interval == pytest.approx((speeds.mean() - half, speeds.mean() + half))


def test_the_interval_of_a_rate_holds_the_truth_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(500):
        times = np.cumsum(rng.exponential(0.5, 400))
        found = rate(times.tolist(), [1.0] * 400, (0.0, 150.0), 1.0)
        inside += found.interval is not None and found.interval[0] <= 2.0 <= found.interval[1]
    assert 0.86 <= inside / 500 <= 0.94


def test_the_cost_is_the_price_of_the_time_that_a_million_tokens_take() -> None:
    found = cost_per_million(3.6, Rate(100.0, (80.0, 125.0)))
    assert found is not None and found.value == pytest.approx(10.0)
    assert found.interval == pytest.approx((8.0, 12.5))
    assert cost_per_million(3.6, Rate(0.0, None)) is None
    endless = cost_per_million(3.6, Rate(10.0, (0.0, 30.0)))
    assert endless is not None and endless.interval is None
