from __future__ import annotations

import math
import time

import numpy as np
import pytest
from numpy.random import Generator
from scipy import stats

from assay_evals.statistics import (
    Groups,
    binomial_lower,
    binomial_upper,
    block_log_ratio,
    bootstrap_t_interval,
    cautious_interval,
    clustered_mean,
    detectable,
    grouped,
    outliers,
    plain_mean,
    rare_difference_interval,
    same_arm_log_ratio,
    t_interval,
)


def naive_clustered_error(values: list[float], labels: list[str]) -> float:
    """The double sum as the formula has it: over clusters, over all pairs within each."""
    mean = sum(values) / len(values)
    total = 0.0
    for label in set(labels):
        members = [value for value, other in zip(values, labels, strict=True) if other == label]
        for one in members:
            for two in members:
                total += (one - mean) * (two - mean)
    clusters = len(set(labels))
    return math.sqrt(total * clusters / (clusters - 1)) / len(values)


def test_the_clustered_error_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    labels = [f"d{number}" for number in rng.integers(0, 9, 200)]
    values = [float(value) for value in rng.normal(0, 1, 200) + np.array([len(label) for label in labels])]
    estimate = clustered_mean(grouped(values, labels))
    assert estimate.mean == pytest.approx(sum(values) / 200, rel=1e-12)
    assert estimate.standard_error == pytest.approx(naive_clustered_error(values, labels), rel=1e-10)
    assert estimate.degrees == 8


def test_clusters_of_one_give_the_standard_error_of_the_mean() -> None:
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    assert plain_mean(values).standard_error == pytest.approx(stats.sem(values), rel=1e-12)
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert t_interval(plain_mean(values), 0.95) == pytest.approx(expected, rel=1e-12)


def test_items_that_stand_for_many_samples_count_as_many() -> None:
    one_by_one = grouped([1.0, 2.0, 3.0, 10.0, 20.0, 6.0], ["a", "a", "a", "b", "b", "c"])
    collapsed = grouped([6.0, 30.0, 6.0], ["a", "b", "c"], [3, 2, 1])
    assert clustered_mean(one_by_one) == clustered_mean(collapsed)
    assert collapsed.samples == 6
    assert collapsed.clusters == 3


def naive_bootstrap(groups: Groups, confidence: float, draws: int, seed: int) -> tuple[float, float]:
    """The same draws, one cluster at a time."""
    estimate, count = clustered_mean(groups), groups.clusters
    raw = iter(np.random.PCG64(seed).random_raw(draws * count))
    found: list[float] = []
    for _ in range(draws):
        picked = [int(next(raw)) % count for _ in range(count)]
        again = clustered_mean(Groups(groups.sums[picked], groups.counts[picked]))
        if again.standard_error > 1e-9 * estimate.standard_error:
            found.append((again.mean - estimate.mean) / again.standard_error)
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return estimate.mean - high * estimate.standard_error, estimate.mean - low * estimate.standard_error


@pytest.mark.parametrize("count", [2, 3, 12])
def test_the_bootstrap_agrees_with_a_plain_loop(count: int) -> None:
    rng = np.random.default_rng(count)
    groups = Groups(rng.lognormal(0, 1, count), rng.integers(1, 9, count).astype(np.float64))
    expected = naive_bootstrap(groups, 0.90, 300, 7)
    assert bootstrap_t_interval(groups, 0.90, draws=300, seed=7) == pytest.approx(expected, rel=1e-9)


def test_the_bootstrap_gives_the_same_numbers_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    groups = Groups(rng.lognormal(0, 1, 30), np.ones(30))
    whole = bootstrap_t_interval(groups, 0.90)
    monkeypatch.setattr("assay_evals.statistics._CHUNK_INDICES", 777)
    assert bootstrap_t_interval(groups, 0.90) == pytest.approx(whole, rel=1e-12)


def test_the_bootstrap_is_quick_enough_for_a_large_run() -> None:
    rng = np.random.default_rng(2)
    values = [float(value) for value in rng.lognormal(0, 1.5, 100_000)]
    labels = [str(label) for label in rng.integers(0, 2_000, 100_000)]
    started = time.perf_counter()
    bootstrap_t_interval(grouped(values, labels), 0.90)
    assert time.perf_counter() - started < 2


def test_samples_without_spread_have_an_interval_without_width() -> None:
    groups = Groups(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert cautious_interval(groups, 0.90) == (2.0, 2.0)


def correlated_answers(rng: Generator, documents: int, each: int) -> tuple[list[float], list[str]]:
    """Paired differences −1, 0, 1 with mean 0, alike within a document."""
    lean = rng.normal(0, 0.15, documents)
    values: list[float] = []
    labels: list[str] = []
    for document in range(documents):
        draws = rng.random(each)
        gained, lost = max(0.15 + lean[document], 0.0), max(0.15 - lean[document], 0.0)
        values += [1.0 if draw < gained else -1.0 if draw > 1 - lost else 0.0 for draw in draws]
        labels += [f"d{document}"] * each
    return values, labels


def test_clustered_intervals_hold_the_truth_as_often_as_they_say_and_plain_ones_do_not() -> None:
    rng = np.random.default_rng(3)
    clustered = plain = 0
    for _ in range(1000):
        values, labels = correlated_answers(rng, 25, 20)
        low, high = t_interval(clustered_mean(grouped(values, labels)), 0.90)
        clustered += low <= 0 <= high
        low, high = t_interval(plain_mean(values), 0.90)
        plain += low <= 0 <= high
    assert 0.87 <= clustered / 1000 <= 0.93
    assert plain / 1000 < 0.75


def naive_cautious(groups: Groups, confidence: float) -> tuple[float, float]:
    """The definition: twice over all that the ends are taken of."""
    mean = groups.sums.sum() / groups.counts.sum()
    order = sorted(range(groups.clusters), key=lambda index: groups.sums[index] - mean * groups.counts[index])
    ends: list[list[tuple[float, float]]] = []
    for index in (order[0], order[-1]):
        again = Groups(np.append(groups.sums, groups.sums[index]), np.append(groups.counts, groups.counts[index]))
        ends.append([t_interval(clustered_mean(again), confidence), bootstrap_t_interval(again, confidence)])
    return min(interval[0] for interval in ends[0]), max(interval[1] for interval in ends[1])


@pytest.mark.parametrize("count", [2, 5, 40])
def test_the_cautious_interval_is_that_of_its_definition(count: int) -> None:
    rng = np.random.default_rng(count)
    groups = Groups(rng.lognormal(0, 1, count), rng.integers(1, 9, count).astype(np.float64))
    found, mean = cautious_interval(groups, 0.90), clustered_mean(groups).mean
    assert found == pytest.approx(naive_cautious(groups, 0.90), rel=1e-12)
    assert found[0] < mean < found[1]


def test_one_end_mirrors_the_other() -> None:
    rng = np.random.default_rng(9)
    sums, counts = rng.lognormal(0, 1, 30), rng.integers(1, 9, 30).astype(np.float64)
    low, high = cautious_interval(Groups(sums, counts), 0.90)
    mirrored = cautious_interval(Groups(-sums, counts), 0.90)
    # The quantiles of the same draws, from the other end.
    assert mirrored == pytest.approx((-high, -low), rel=1e-9)


def test_few_skewed_clusters_are_bounded_as_often_as_is_said_and_not_by_student() -> None:
    rng = np.random.default_rng(4)
    cautious = student = lower = 0
    rounds = 400
    for _ in range(rounds):
        counts = np.maximum(1, np.round(20_000 * (share := rng.lognormal(0, 0.7, 39)) / share.sum()))
        level = rng.lognormal(-0.045, 0.3, 39)
        sums = np.array([rng.lognormal(-(1.3**2) / 2, 1.3, int(count)).sum() for count in counts]) * level
        groups = Groups(sums, counts)
        low, high = cautious_interval(groups, 0.90)
        cautious, lower = cautious + (high >= 1), lower + (low <= 1)
        student += t_interval(clustered_mean(groups), 0.90)[1] >= 1
    assert student / rounds < 0.94 <= cautious / rounds
    assert lower / rounds >= 0.95


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 10), (3, 40), (24, 1000), (10, 10)])
def test_binomial_bounds_are_those_of_the_definition(successes: int, trials: int) -> None:
    upper, lower = binomial_upper(successes, trials, 0.05), binomial_lower(successes, trials, 0.05)
    if successes < trials:
        assert stats.binom.cdf(successes, trials, upper) == pytest.approx(0.05, rel=1e-9)
    else:
        assert upper == 1
    if successes > 0:
        assert stats.binom.sf(successes - 1, trials, lower) == pytest.approx(0.05, rel=1e-9)
    else:
        assert lower == 0


def test_it_takes_299_questions_without_a_loss_to_show_a_loss_below_one_point() -> None:
    assert rare_difference_interval(0, 0, 299, 0.05)[0] >= -0.01
    assert rare_difference_interval(0, 0, 298, 0.05)[0] < -0.01


def test_rare_differences_are_bounded_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    inside_low = inside_high = 0
    for _ in range(2000):
        lost, gained, _ = rng.multinomial(400, [0.02, 0.01, 0.97])
        low, high = rare_difference_interval(int(lost), int(gained), 400, 0.05)
        inside_low += low <= -0.01
        inside_high += high >= -0.01
    assert inside_low / 2000 >= 0.95
    assert inside_high / 2000 >= 0.95


def test_rare_differences_are_bounded_by_both_proportions() -> None:
    low, high = rare_difference_interval(7, 3, 500, 0.05)
    assert stats.binom.cdf(7, 500, -low) == pytest.approx(0.05, rel=1e-9)
    gained = stats.beta.ppf(0.975, 4, 497)
    lost = stats.beta.ppf(0.025, 7, 494)
    assert high == pytest.approx(gained - lost, rel=1e-9)


def test_a_plain_loss_among_rare_differences_is_still_shown() -> None:
    assert rare_difference_interval(20, 0, 100, 0.05)[1] < -0.05


def test_a_linear_drift_cancels_in_the_ratio_and_shows_in_the_control() -> None:
    slow = [math.exp(0.05 * position) for position in range(4)]
    for baseline, candidate in (((0, 3), (1, 2)), ((1, 2), (0, 3))):
        times = (
            (2 * slow[baseline[0]], 2 * slow[baseline[1]]),
            (slow[candidate[0]], slow[candidate[1]]),
        )
        assert block_log_ratio(*times) == pytest.approx(math.log(1 / 2))
        assert same_arm_log_ratio(*times) == pytest.approx(0.05 * (3 + 1) / 2)


def test_the_control_has_the_noise_of_what_it_controls() -> None:
    rng = np.random.default_rng(6)
    times = np.exp(rng.normal(0, 0.05, (20_000, 4)))
    pairs = [((row[0], row[3]), (row[1], row[2])) for row in times.tolist()]
    ratio = np.std([block_log_ratio(*pair) for pair in pairs])
    control = np.std([same_arm_log_ratio(*pair) for pair in pairs])
    assert ratio == pytest.approx(0.05, rel=0.02)
    assert control == pytest.approx(ratio, rel=0.03)


def test_the_speed_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(2000):
        times = np.exp(rng.normal(0, 0.1, (8, 4)))
        low, high = t_interval(plain_mean([block_log_ratio((r[0], r[3]), (r[1], r[2])) for r in times.tolist()]), 0.95)
        inside += low <= 0 <= high
    assert 0.935 <= inside / 2000 <= 0.965


def test_what_is_called_detectable_is_detected_four_times_in_five() -> None:
    rng = np.random.default_rng(8)
    blocks, noise, found = 12, 0.08, 0
    distance = detectable(noise / math.sqrt(blocks), blocks - 1, 0.025)
    for _ in range(2000):
        values = [float(value) for value in rng.normal(distance, noise, blocks)]
        found += t_interval(plain_mean(values), 0.95)[0] > 0
    assert 0.77 <= found / 2000 <= 0.84


def test_outliers_are_flagged_by_their_distance_from_the_median() -> None:
    assert outliers([1.0, 1.1, 0.9, 1.05, 0.95, 5.0]) == [5]
    assert outliers([1.0, 1.1, 0.9, 1.05, 0.95, 1.2]) == []
    assert outliers([2.0, 2.0, 2.0, 2.0, 2.0, 9.0]) == [5]
    assert outliers([3.0, 3.0, 3.0]) == []
    assert outliers([]) == []
