"""Loads as they are written, and arrivals that are a Poisson process."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from assay.errors import UsageError
from assay_evals.load.arrivals import Load, poisson_arrivals, read_loads


def test_levels_are_read_in_their_order() -> None:
    assert read_loads("concurrency", "4, 1,2") == tuple(Load("concurrency", value) for value in (4.0, 1.0, 2.0))
    assert read_loads("rate", "0.5,2") == (Load("rate", 0.5), Load("rate", 2.0))
    assert [str(load) for load in read_loads("rate", "0.5")] == ["rate 0.5/s"]
    assert str(Load("concurrency", 8.0)) == "concurrency 8"


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("concurrency", "1,two", "'two'"),
        ("concurrency", "1.5", "'1.5'"),
        ("concurrency", "0", "'0'"),
        ("concurrency", "", "''"),
        ("rate", "1,,2", "''"),
        ("rate", "-1", "'-1'"),
        ("rate", "nan", "'nan'"),
        ("rate", "inf", "'inf'"),
        ("rate", "1,1.0", "listed twice"),
    ],
)
def test_what_is_no_level_is_named(kind: str, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        read_loads(kind, text)  # type: ignore[arg-type]
    assert f"--{kind} {text}" in str(caught.value)


def test_gaps_are_exponential_and_do_not_depend_on_each_other() -> None:
    arrivals = np.array(list(itertools.islice(poisson_arrivals(2.5, "0"), 20_000)))
    gaps = np.diff(arrivals, prepend=0.0)
    assert stats.kstest(gaps, stats.expon(scale=1 / 2.5).cdf).pvalue > 0.01
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    # As many as fall into a second are Poisson: their variance is their mean.
    counts = np.bincount(arrivals.astype(int))[:-1]
    assert counts.mean() == pytest.approx(2.5, rel=0.03) and counts.var() == pytest.approx(2.5, rel=0.06)


def test_arrivals_come_again_by_their_seed() -> None:
    first, again, other = (list(itertools.islice(poisson_arrivals(1.0, seed), 5)) for seed in ("0", "0", "1"))
    assert first == again != other
