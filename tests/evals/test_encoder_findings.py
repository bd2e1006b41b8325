"""What an encoder's evidence comes to: means that are clustered and bounded, exact bounds where little differs, speed by shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from assay.recipe import Evaluate, Gate
from assay_evals import encoder_findings as findings
from assay_evals.evidence import (
    Check,
    ClassGiven,
    Classified,
    Embedded,
    Encoding,
    Evidence,
    Retrieved,
    SpeedRun,
    read_evidence,
    write_evidence,
)
from assay_evals.findings import UnmeasurableError
from assay_evals.gate import judge
from assay_evals.planning import plan_gates
from assay_evals.report import render_report
from assay_evals.statistics import binomial_upper
from assay_evals.validity import ENCODER_EVALUATORS

EVALUATE = """{
  "text": {"source": "python-docs"}, "length": 64, "blocks": 3,
  "quality": [{"metric": "embedding_cosine", "texts": 120}, {"metric": "similarity_rank", "texts": 120},
              {"metric": "retrieval_agreement", "queries": 120, "top": 4},
              {"metric": "retrieval_accuracy", "queries": 120}],
  "speed": [{"metric": "encode_latency", "shapes": [{"batch": 1, "tokens": 32}, {"batch": 4, "tokens": 32}]},
            {"metric": "encode_throughput", "shapes": [{"batch": 4, "tokens": 32}]}, {"metric": "size_on_disk"}]
}"""
GATE = """{
  "embedding_cosine": {"min": 0.98}, "similarity_rank": {"min": 0.9}, "retrieval_agreement": {"min": 0.7},
  "retrieval_accuracy": {"max_drop": 0.1}, "encode_throughput": {"min_speedup": 1.5}
}"""
CLASSES = """{"text": {"source": "python-docs"}, "quality": [{"metric": "class_agreement", "texts": 60}]}"""


def embeddings(rng: np.random.Generator, count: int, loss: float) -> list[Embedded]:
    rows: list[Embedded] = []
    for number in range(count):
        similar = rng.random(31)
        moved = similar + loss * rng.normal(0, 1, 31)
        rows.append(
            Embedded(
                document=f"document-{number % 40:02}",
                window=number // 40,
                tokens=64,
                text="a text",
                cosine=float(1 - loss * rng.random()),
                baseline=tuple(float(value) for value in similar.clip(-1, 1)),
                candidate=tuple(float(value) for value in moved.clip(-1, 1)),
            )
        )
    return rows


def retrievals(count: int, lost: int, others: int = 0) -> list[Retrieved]:
    """lost: queries of which the candidate finds nothing of what the baseline does."""
    names = [f"document-{number % 40:02}#{number // 40}" for number in range(count)]
    rows: list[Retrieved] = []
    for number, name in enumerate(names):
        found = (name, *(names[(number + step) % count] for step in (1, 2, 3)))
        other = tuple(names[(number + step) % count] for step in (11, 12, 13, 14))
        rows.append(
            Retrieved(
                document=name.partition("#")[0],
                window=number // 40,
                tokens=18,
                text="a query",
                own=name,
                passages=count,
                baseline=found,
                candidate=other if number < lost else (*found[:3], other[3]) if number < lost + others else found,
            )
        )
    return rows


def classes(count: int, changed: int, label: str | None = "yes") -> list[Classified]:
    return [
        Classified(
            document=f"row:{number}",
            window=0,
            tokens=12,
            text="a row",
            classes=2,
            label=label,
            baseline=ClassGiven(name="yes", share=0.9),
            candidate=ClassGiven(name="no" if number < changed else "yes", share=0.8),
        )
        for number in range(count)
    ]


def runs(speedup: float, blocks: int = 3) -> tuple[SpeedRun, ...]:
    def seconds(arm: str, batch: int, block: int) -> tuple[float, ...]:
        return tuple(batch * 0.01 * (1 + 0.01 * block) / (speedup if arm == "candidate" else 1) for _ in range(3))

    return tuple(
        SpeedRun(
            block=block,
            position=position,  # pyright: ignore[reportArgumentType]
            arm=arm,
            load_seconds=0.1,
            peak_memory_bytes=10**8,
            generations=(),
            encodings=tuple(Encoding(batch=batch, tokens=32, seconds=seconds(arm, batch, block)) for batch in (1, 4)),
        )
        for block in range(blocks)
        for position, arm in enumerate(("baseline", "candidate", "candidate", "baseline"))
    )


@pytest.fixture
def encoder(make_evidence: Callable[..., Evidence]) -> Callable[..., Evidence]:
    """An encoder's evidence; keywords replace parts of it."""

    def make(**parts: Any) -> Evidence:
        rng = np.random.default_rng(0)
        checks = tuple(Check(name=name, passed=True, detail="as it should be") for name in ENCODER_EVALUATORS)
        changes = {"gate": parts.pop("gate", GATE), "evaluate": parts.pop("evaluate", EVALUATE)}
        evidence = make_evidence(checks=checks, **changes)
        rows = parts.pop("encoded", [*embeddings(rng, 120, 0.02), *retrievals(120, 1, 30)])
        return dataclasses.replace(
            evidence, windows=(), clozes=(), encoded=tuple(rows), runs=parts.pop("runs", runs(2.0)), **parts
        )

    return make


def test_a_good_encoder_passes(encoder: Callable[..., Evidence]) -> None:
    verdict = judge(encoder())
    assert (verdict.verdict, verdict.reasons) == ("PASS", ("All 5 gates passed.",))
    row = verdict.row("encode_throughput")
    assert row is not None and row.difference is not None and abs(row.difference - 2.0) < 1e-9
    assert row.baseline is not None and abs(row.baseline - 100 / 1.01) < 0.5
    assert {"embedding_cosine.p01", "embedding_cosine.min", "retrieval_agreement.first"} <= {
        one.metric for one in verdict.reported
    }
    assert verdict.row("encode_latency@batch=4 tokens=32") is not None


@pytest.mark.parametrize(
    ("parts", "metric", "outcome"),
    [
        (
            {"encoded": [*embeddings(np.random.default_rng(1), 120, 0.2), *retrievals(120, 0)]},
            "embedding_cosine",
            "FAIL",
        ),
        (
            {"encoded": [*embeddings(np.random.default_rng(1), 120, 0.5), *retrievals(120, 0)]},
            "similarity_rank",
            "FAIL",
        ),
        (
            {"encoded": [*embeddings(np.random.default_rng(1), 120, 0.01), *retrievals(120, 60)]},
            "retrieval_agreement",
            "FAIL",
        ),
        (
            {"encoded": [*embeddings(np.random.default_rng(1), 120, 0.01), *retrievals(120, 40)]},
            "retrieval_accuracy",
            "FAIL",
        ),
        ({"runs": runs(1.2)}, "encode_throughput", "FAIL"),
    ],
)
def test_each_kind_of_damage_fails_its_gate(
    encoder: Callable[..., Evidence], parts: dict[str, Any], metric: str, outcome: str
) -> None:
    verdict = judge(encoder(**parts))
    assert next(row.verdict for row in verdict.gates if row.metric == metric) == outcome


def test_rank_correlation_is_spearmans() -> None:
    for row in embeddings(np.random.default_rng(3), 5, 0.3):
        assert abs(findings.rank_correlation(row) - stats.spearmanr(row.baseline, row.candidate).statistic) < 1e-12
    flat = dataclasses.replace(row, candidate=(0.5,) * 31)
    assert findings.rank_correlation(flat) == 0.0


def test_few_differences_have_the_exact_bound(encoder: Callable[..., Evidence]) -> None:
    none = findings.retrieval_agreement(encoder(encoded=retrievals(120, 0)))
    assert none.interval == (pytest.approx(1 - binomial_upper(0, 120, 0.05)), 1.0)
    few = findings.retrieval_agreement(encoder(encoded=retrievals(120, 1, 3)))
    assert few.interval is not None
    assert few.interval[0] <= 1 - binomial_upper(1, 120, 0.05), "one lost whole"
    same = findings.class_agreement(encoder(evaluate=CLASSES, encoded=classes(60, 0)))
    assert same.difference == 1.0 and same.interval == (pytest.approx(1 - binomial_upper(0, 60, 0.05)), 1.0)


def test_accuracy_is_paired_and_told_from_chance(encoder: Callable[..., Evidence]) -> None:
    evaluate = """{"text": {"source": "jsonl", "path": "rows.jsonl", "field": "text"},
                   "quality": [{"metric": "class_accuracy", "texts": 200, "label": "kind"}]}"""
    gate = '{"class_accuracy": {"max_drop": 0.05}}'
    evidence = encoder(evaluate=evaluate, gate=gate, encoded=classes(200, 30))
    row = findings.class_accuracy(evidence)
    assert (row.baseline, row.candidate, row.difference) == (1.0, 0.85, -0.15)
    assert findings.chance_level(evidence, "class_accuracy") == 0.5
    check = next(check for check in judge(evidence).checks if check.name == "a loss would show in class_accuracy")
    assert check.passed and "guessing gets 50.0%" in check.detail
    with pytest.raises(UnmeasurableError, match="not known of every text"):
        findings.class_accuracy(encoder(evaluate=evaluate, gate=gate, encoded=classes(200, 30, label=None)))


def test_what_is_missing_doubled_or_no_number_is_invalid(encoder: Callable[..., Evidence]) -> None:
    rng = np.random.default_rng(0)
    rows = [*embeddings(rng, 120, 0.02), *retrievals(120, 1)]
    cases = {
        "samples as declared": rows[1:],
        "each sample once": [*rows, rows[0]],
        "finite numbers": [dataclasses.replace(rows[0], cosine=None), *rows[1:]],
    }
    for name, encoded in cases.items():
        verdict = judge(encoder(encoded=encoded))
        assert verdict.verdict == "INVALID"
        assert name in {check.name for check in verdict.checks if not check.passed}
    above = [dataclasses.replace(rows[0], cosine=1.5), *rows[1:]]
    assert judge(encoder(encoded=above)).verdict == "INVALID"
    silent = tuple(dataclasses.replace(run, encodings=()) for run in runs(2.0))
    assert "0 measurements of batch=4 tokens=32" in " ".join(judge(encoder(runs=silent)).reasons)


def test_the_checks_of_an_encoder_are_its_own(encoder: Callable[..., Evidence], good: Evidence) -> None:
    header = encoder().header
    decoders = dataclasses.replace(header, checks=good.header.checks)
    assert judge(dataclasses.replace(encoder(), header=decoders)).verdict == "INVALID"


def test_evidence_is_read_as_it_was_written(encoder: Callable[..., Evidence], good: Evidence, tmp_path: Any) -> None:
    evidence = encoder(encoded=[*embeddings(np.random.default_rng(0), 50, 0.02), *retrievals(50, 3), *classes(10, 2)])
    read = write_evidence(tmp_path / "evidence", evidence.header, evidence.quality, evidence.runs)
    assert (read.encoded, read.runs) == (evidence.encoded, evidence.runs)
    assert read_evidence(tmp_path / "evidence") == read
    write_evidence(tmp_path / "decoder", good.header, good.quality, good.runs)
    assert "encodings" not in (tmp_path / "decoder" / "speed.jsonl").read_text(), "a decoder's evidence keeps its form"


def test_the_report_shows_the_worst(encoder: Callable[..., Evidence]) -> None:
    rows = [*embeddings(np.random.default_rng(0), 120, 0.02), *retrievals(120, 2)]
    rows[7] = dataclasses.replace(rows[7], cosine=0.5, text="moved furthest")
    evidence = encoder(encoded=rows)
    for form in ("html", "markdown"):
        page = render_report(form, judge(evidence), evidence, {"version": 1, "layers": []}, {}).decode()  # pyright: ignore[reportArgumentType]
        assert "moved furthest" in page and "0.5000" in page
        assert "document-00#0" in page.replace("\\", "")
    classified = encoder(evaluate=CLASSES, gate='{"class_agreement": {"min": 0.5}}', encoded=classes(60, 9))
    page = render_report("html", judge(classified), classified, {"version": 1, "layers": []}, {}).decode()
    assert "9 of 60 texts are put into another class" in page


def test_a_plan_says_what_encoders_samples_reach() -> None:
    evaluate, gate = Evaluate.model_validate_json(EVALUATE), Gate.model_validate_json(GATE)
    reached = {reach.metric: reach for reach in plan_gates(evaluate, gate)}
    assert reached["embedding_cosine"].in_reach and "120 texts can show" in reached["embedding_cosine"].sentence
    assert "120 queries resolve" in reached["retrieval_accuracy"].sentence
    few = Evaluate.model_validate_json(EVALUATE.replace('"texts": 120', '"texts": 4'))
    assert not {reach.metric: reach for reach in plan_gates(few, gate)}["embedding_cosine"].in_reach
