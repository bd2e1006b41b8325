from __future__ import annotations

import pytest

from assay.recipe import QUALITY_GATES, SPEED_GATES
from assay_evals import wording
from assay_evals.evidence import Evidence
from assay_evals.gate import judge


@pytest.mark.parametrize(
    ("metric", "number", "text"),
    [
        ("cloze_accuracy", 0.4312, "43.1%"),
        ("kl_divergence", 0.03123, "0.0312 nats"),
        ("decode_tokens_per_second", 73.14, "73.1 tok/s"),
        ("time_to_first_token", 1.284, "1.28 s"),
        ("time_to_first_token", 0.0123, "12.3 ms"),
        ("size_on_disk", 142_000_000, "142 MB"),
        ("size_on_disk", 999_600_000, "1000 MB"),
        ("size_on_disk", 1_234_000_000, "1.23 GB"),
        ("size_on_disk", 12_340_000, "12.3 MB"),
        ("size_on_disk", 12, "12 B"),
        ("perplexity", 15.3817, "15.382"),
        ("cloze_accuracy", None, "–"),
        ("inter_token_latency.p99", 0.0412, "41.2 ms"),
        ("energy_per_output_token", 0.8123, "0.812 J"),
        ("bits_per_weight", 4.594, "4.59 bits"),
        ("cost_per_million_tokens@EUR", 1.5151, "1.515"),
        ("prefix_reuse.share", 0.242, "24.2%"),
    ],
)
def test_values_have_the_units_of_people(metric: str, number: float | None, text: str) -> None:
    assert wording.value(metric, number) == text


@pytest.mark.parametrize(
    ("metric", "number", "text"),
    [
        ("cloze_accuracy", -0.0061, "−0.6 points"),
        ("cloze_accuracy", 0.004, "+0.4 points"),
        ("cloze_accuracy", -0.0001, "0.0 points"),
        ("decode_tokens_per_second", 3.312, "3.31×"),
        ("size_on_disk", 0.26296, "0.263×"),
        ("perplexity", 1.0164, "1.016×"),
        ("decode_tokens_per_second", 1234.5, "1234×"),
        ("top1_agreement", 0.9231, "92.3%"),
        ("kl_divergence", 0.0312, "0.0312 nats"),
        ("decode_tokens_per_second.same_arm", 1.004, "1.004×"),
        ("time_to_first_token@prompt_tokens=64.same_arm", 1.004, "1.004×"),
        ("prefix_reuse.share", 1.09, "1.09×"),
        ("bits_per_weight", 4.594, "4.59 bits"),
    ],
)
def test_differences_are_in_the_terms_of_their_metric(metric: str, number: float, text: str) -> None:
    assert wording.difference(metric, number) == text


def test_a_number_near_the_limit_is_told_apart_from_it() -> None:
    assert wording.difference("decode_tokens_per_second", 1.4991, limit=1.5) == "1.499×"
    assert wording.difference("decode_tokens_per_second", 1.499999, limit=1.5) == "1.499999×"
    assert wording.difference("decode_tokens_per_second", 1.5, limit=1.5) == "1.50×"
    assert wording.interval("cloze_accuracy", (-0.03004, 0.01), limit=-0.03) == "−3.004 to +1.000 points"


@pytest.mark.parametrize(
    ("metric", "bounds", "text", "bare"),
    [
        ("cloze_accuracy", (-0.016, 0.004), "−1.6 to +0.4 points", "−1.6 to +0.4"),
        ("decode_tokens_per_second", (3.24, 3.3415), "3.24× to 3.34×", "3.24 to 3.34"),
        ("time_to_first_token", (0.97, 1.3), "0.970× to 1.300×", "0.970 to 1.300"),
        ("top1_agreement", (0.924, 0.93), "92.4 to 93.0%", "92.4 to 93.0"),
        ("kl_divergence", (0.03, 0.04), "0.0300 to 0.0400 nats", "0.0300 to 0.0400"),
        ("size_on_disk", (0.3, 0.3), "exact", "exact"),
    ],
)
def test_intervals_have_their_unit_once(metric: str, bounds: tuple[float, float], text: str, bare: str) -> None:
    assert wording.interval(metric, bounds) == text
    assert wording.interval(metric, bounds, bare=True) == bare


@pytest.mark.parametrize(
    ("metric", "rule", "text"),
    [
        ("cloze_accuracy", {"max_drop": 0.03}, "at most 3 points lower"),
        ("top1_agreement", {"min": 0.925}, "at least 92.5%"),
        ("kl_divergence", {"max": 0.1}, "at most 0.1 nats"),
        ("decode_tokens_per_second", {"min_speedup": 1.5}, "at least 1.5×"),
        ("size_on_disk", {"max_ratio": 0.5}, "at most 0.5×"),
    ],
)
def test_criteria_are_told_as_the_recipe_has_them(metric: str, rule: dict[str, float], text: str) -> None:
    assert wording.criterion(metric, rule) == text


@pytest.mark.parametrize(
    ("metric", "number", "text"),
    [
        ("decode_tokens_per_second", 3.31, "decode 3.3× as fast"),
        ("decode_tokens_per_second", 0.9, "decode 0.90× as fast"),
        ("size_on_disk", 0.263, "74% smaller on disk"),
        ("size_on_disk", 1.0, "the same size on disk"),
        ("cloze_accuracy", -0.0061, "cloze accuracy 0.6 points lower"),
        ("cloze_accuracy", 0.01, "cloze accuracy 1.0 point higher"),
        ("cloze_accuracy", 0.0, "cloze accuracy the same"),
        ("time_to_first_token", 1.16, "first token 16% later"),
        ("peak_memory", 0.52, "peak memory 48% lower"),
        ("top1_agreement", 0.923, "the same first choice at 92.3% of positions"),
        ("kl_divergence", 0.0312, "KL divergence 0.0312 nats"),
    ],
)
def test_consequences_are_plain_phrases(metric: str, number: float, text: str) -> None:
    assert wording.consequence(metric, number) == text


def test_every_metric_of_a_verdict_has_words(good: Evidence) -> None:
    verdict = judge(good)
    assert {*QUALITY_GATES, *SPEED_GATES} <= set(wording.METRICS)
    for row in (*verdict.gates, *verdict.reported):
        assert wording.words(row.metric).label
        assert wording.headline(row.metric, row.difference or 0.0)[0]
