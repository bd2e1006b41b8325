"""An average hides a slice that is broken; the gate and the report do not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from assay.recipe import Gate
from assay_evals.evidence import Evidence
from assay_evals.gate import judge
from assay_evals.report import render_report
from assay_evals.report.table import verdict_table
from assay_evals.slices import slices_of

Make = Callable[..., Evidence]
BROKEN = {f"document-{number:02}" for number in range(4)}


def tagged(evidence: Evidence, broken: set[str] = BROKEN) -> Evidence:
    """The documents of one language, a tenth of the text, diverge thirty times as much, and lose most of their answers."""
    names = sorted({window.document for window in evidence.windows})
    tags = {name: "de" if name in broken else "en" for name in names}
    windows = [
        replace(row, kl=tuple(30 * (value or 0) for value in row.kl)) if row.document in broken else row
        for row in evidence.windows
    ]
    clozes = [
        replace(row, candidate=replace(row.candidate, correct=False)) if row.document in broken else row
        for row in evidence.clozes
    ]
    text = replace(evidence.header.text, tags=tags)
    header = replace(evidence.header, text=text)
    return replace(evidence, header=header, windows=tuple(windows), clozes=tuple(clozes))


@pytest.fixture(scope="module")
def hidden(make_evidence: Make) -> Evidence:
    return tagged(make_evidence(kl=0.01, lost=0.01, gained=0.01))


def gate(**slices: dict[str, float]) -> Gate:
    criteria = {"kl_divergence": {"max": 0.1}, "cloze_accuracy": {"max_drop": 0.13}}
    return Gate.model_validate_json(json.dumps(criteria | ({"slices": slices} if slices else {})))


def test_a_slice_destroyed_while_the_average_holds_is_shown_and_fails_its_gate(hidden: Evidence) -> None:
    unsuspecting = judge(hidden, gate())
    assert unsuspecting.verdict == "PASS"
    found = {row.metric: row for row in unsuspecting.slices}
    whole, part = unsuspecting.row("kl_divergence"), found["kl_divergence@tag=de"]
    assert whole and whole.difference and part.difference and part.difference > 6 * whole.difference
    verdict = judge(hidden, gate(kl_divergence={"max": 0.1}, cloze_accuracy={"max_drop": 0.1}))
    assert verdict.verdict == "FAIL"
    outcomes = {row.metric: row.verdict for row in verdict.gates}
    assert outcomes["kl_divergence@tag=de"] == outcomes["cloze_accuracy@tag=de"] == "FAIL"
    assert outcomes["kl_divergence@tag=en"] == outcomes["kl_divergence"] == "PASS"
    assert any(reason.startswith("KL divergence, tag=de: Even the better end") for reason in verdict.reasons)


def test_slices_add_up_to_the_whole(hidden: Evidence) -> None:
    verdict = judge(hidden, gate())
    parts = [row for row in verdict.slices if row.metric.startswith("cloze_accuracy@tag=")]
    whole = verdict.row("cloze_accuracy")
    assert whole and whole.difference is not None and sum(row.n for row in parts) == whole.n
    together = sum(row.n * (row.difference or 0.0) for row in parts) / whole.n
    assert together == pytest.approx(whole.difference, rel=1e-6)
    assert sum(row.clusters or 0 for row in parts) == whole.clusters


def test_a_text_without_tags_of_documents_alike_has_no_slices(good: Evidence) -> None:
    assert slices_of(good) == {} and judge(good).slices == ()


def test_lengths_are_slices_where_they_differ(good: Evidence) -> None:
    """Of what was measured of each document."""
    more = [replace(row, window=number) for row in good.windows if row.document in BROKEN for number in range(1, 5)]
    found = slices_of(replace(good, windows=(*good.windows, *more)))
    assert list(found) == ["length=up to 256 tokens", "length=up to 1,024 tokens"]
    assert {row.document for row in found["length=up to 1,024 tokens"].windows} == BROKEN
    assert len(found["length=up to 256 tokens"].windows) == 36


def test_a_gate_on_slices_that_are_not_there_is_invalid(good: Evidence) -> None:
    verdict = judge(good, gate(kl_divergence={"max": 0.1}))
    assert verdict.verdict == "INVALID"
    assert verdict.gates[-1].reason == "The evidence has no document with a tag."


def test_a_slice_of_one_document_cannot_pass(make_evidence: Make) -> None:
    alone = tagged(make_evidence(), {"document-07"})
    verdict = judge(alone, gate(kl_divergence={"max": 10.0}))
    row = next(row for row in verdict.gates if row.metric == "kl_divergence@tag=de")
    assert (verdict.verdict, row.verdict) == ("INVALID", "INVALID") and "needs at least two" in row.reason
    assert not [row for row in judge(alone, gate()).slices if row.metric.endswith("tag=de")]


def test_every_report_names_the_worst_slice_first(hidden: Evidence) -> None:
    verdict, output = judge(hidden, gate()), io.StringIO()
    Console(width=80, file=output).print(verdict_table(verdict))
    shown = " ".join(output.getvalue().split())
    assert "KL divergence, tag=de" in shown and "KL divergence, tag=en" not in shown
    for form in ("html", "markdown"):
        text = render_report(form, verdict, hidden, {}, {}).decode()
        assert 0 < text.index("KL divergence, tag=de") < text.index("KL divergence, tag=en")
        assert 0 < text.index("Cloze accuracy, tag=de") < text.index("Cloze accuracy, tag=en")
