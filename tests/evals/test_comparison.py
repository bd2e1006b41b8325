from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from assay.errors import UsageError
from assay_evals.comparison import Compared, Contrast, Finished, compare
from assay_evals.evidence import Evidence
from assay_evals.gate import judge
from assay_evals.report.comparison_page import render_comparison
from assay_evals.report.table import comparison_table

Make = Callable[..., Evidence]


def finished(name: str, evidence: Evidence) -> Finished:
    return Finished(name, evidence, judge(evidence))


def contrast(found: Compared, metric: str) -> Contrast:
    return next(one for one in found.contrasts if one.metric == metric)


def test_one_run_is_no_comparison(good: Evidence) -> None:
    with pytest.raises(UsageError, match="at least two runs"):
        compare([finished("a", good)])


def test_the_first_is_what_the_others_are_compared_with(good: Evidence, make_evidence: Make) -> None:
    first, second = compare([finished("a", good), finished("b", make_evidence(kl=0.2))])
    assert (first.name, second.name, first.verdict, second.verdict) == ("a", "b", "PASS", "FAIL")
    assert all(one.change is None and one.interval is None for one in first.contrasts)
    assert [one.metric for one in first.contrasts] == [one.metric for one in second.contrasts]
    assert not any(one.metric.endswith(".same_arm") for one in first.contrasts)


def test_a_run_against_itself_changes_nothing(good: Evidence) -> None:
    _, again = compare([finished("a", good), finished("a", good)])
    for metric, nothing in (
        ("kl_divergence", 0),
        ("top1_agreement", 0),
        ("cloze_accuracy", 0),
        ("perplexity", 1),
        ("size_on_disk", 1),
    ):
        found = contrast(again, metric)
        assert found.change == nothing and found.interval == (nothing, nothing), metric
    assert contrast(again, "cloze_disagreement").change is None
    speed = contrast(again, "decode_tokens_per_second")
    assert speed.change == 1 and speed.interval is not None and speed.interval[0] < 1 < speed.interval[1]


def test_pairing_shows_what_two_intervals_beside_each_other_would_not(make_evidence: Make) -> None:
    """The same text is hard for both: 4 % more divergence is plain, though each is only known to 6 %."""
    before = make_evidence(kl=0.05)
    raised = [replace(row, kl=tuple(1.04 * (value or 0.0) for value in row.kl)) for row in before.windows]
    runs = [finished("a", before), finished("b", replace(before, windows=tuple(raised)))]
    alone = [run.verdict.row("kl_divergence") for run in runs]
    found = contrast(compare(runs)[1], "kl_divergence")
    assert alone[0] and alone[0].difference and alone[1] and alone[1].interval and found.interval
    assert found.change == pytest.approx(0.04 * alone[0].difference, rel=1e-6)
    assert 0 < found.interval[0] < found.interval[1]
    assert alone[1].interval[0] < alone[0].difference < alone[1].interval[1]


def test_speeds_are_compared_through_their_own_baselines(make_evidence: Make) -> None:
    _, second = compare([finished("a", make_evidence(speedup=2.0)), finished("b", make_evidence(seed=1, speedup=3.0))])
    found = contrast(second, "decode_tokens_per_second")
    assert found.interval is not None and found.change == pytest.approx(1.5, rel=0.05)
    assert found.interval[0] < 1.5 < found.interval[1]
    assert math.log(found.interval[1] / found.interval[0]) < 0.15


def test_more_candidates_widen_every_interval(make_evidence: Make) -> None:
    runs = [finished(str(seed), make_evidence(seed=seed)) for seed in range(5)]
    pair, many = compare(runs[:2])[1], compare(runs)[1]
    for metric in ("cloze_accuracy", "kl_divergence", "decode_tokens_per_second"):
        narrow, wide = contrast(pair, metric).interval, contrast(many, metric).interval
        assert narrow is not None and wide is not None and wide[0] < narrow[0] < narrow[1] < wide[1], metric


def test_other_samples_are_not_compared(good: Evidence, make_evidence: Make) -> None:
    shorter = make_evidence(documents=39)
    for other in (
        shorter,
        replace(good, header=replace(good.header, text=replace(good.header.text, digest="sha256:0"))),
    ):
        found = contrast(compare([finished("a", good), finished("b", other)])[1], "kl_divergence")
        assert found.change is None and found.reason == "measured on other samples than the first"


def test_what_a_run_lacks_is_not_made_up(good: Evidence) -> None:
    silent = replace(good, runs=())
    _, second = compare([finished("a", silent), finished("b", good)])
    found = contrast(second, "decode_tokens_per_second")
    assert found.value is not None and (found.change, found.reason) == (None, "not measured for the first")
    _, second = compare([finished("a", good), finished("b", silent)])
    assert contrast(second, "decode_tokens_per_second") == Contrast("decode_tokens_per_second", None, None, None)


def test_the_table_shows_values_changes_and_intervals(good: Evidence, make_evidence: Make) -> None:
    output = io.StringIO()
    runs = [finished("runs/first", good), finished("runs/second", make_evidence(seed=3, kl=0.2))]
    Console(width=100, file=output).print(comparison_table(compare(runs)))
    text = output.getvalue()
    for words in (
        "runs/first",
        "runs/second",
        "✗ FAIL",
        "KL divergence",
        "+0.1",
        " nats to +0.",
        "points",
        "×",
        "142 MB",
    ):
        assert words in text, words
    assert "…" not in text


def test_a_candidate_that_is_no_better_in_anything_is_dominated(make_evidence: Make) -> None:
    good, slow, rough = (
        make_evidence(kl=0.05, speedup=3),
        make_evidence(kl=0.06, speedup=2),
        make_evidence(kl=0.08, speedup=4),
    )
    found = compare([finished("good", good), finished("slow", slow), finished("rough", rough)])
    assert [one.dominated_by for one in found] == [None, "good", None]
    for one in found:
        assert one.places is not None
        assert [place.metric for place in one.places] == ["decode_tokens_per_second", "kl_divergence"]


def test_without_a_common_axis_nothing_is_dominated(make_evidence: Make) -> None:
    whole, unmeasured = make_evidence(), replace(make_evidence(kl=0.2), windows=(), clozes=())
    found = compare([finished("whole", whole), finished("unmeasured", unmeasured)])
    assert [(one.places, one.dominated_by) for one in found] == [(None, None)] * 2


def test_the_page_shows_where_each_lies_and_every_metric(make_evidence: Make) -> None:
    hostile = "<script>alert(1)</script>"
    runs = [finished("a", make_evidence(kl=0.05)), finished(hostile, make_evidence(kl=0.06, speedup=2))]
    page = render_comparison(compare(runs)).decode()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("class='dot candidate'") == 1 and page.count("class='dot dominated'") == 1
    assert "KL divergence, nats" in page and "decode speed, candidate / baseline" in page
    assert re.search(r"<th>KL divergence</th><td>0\.\d+ nats</td><td>0\.\d+ nats<small>\+0.0\d+ nats</small>", page)
