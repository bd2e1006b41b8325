"""Structured output from measurement to verdict: what each row says, and damage that enforcement would hide."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from assay.progress import Progress
from assay.recipe import Evaluate, Gate, Structured
from assay_evals import wording
from assay_evals.disagreements import worse_outputs, worst_disagreements
from assay_evals.evidence import Evidence, StructuredRow, Written, read_evidence, write_evidence
from assay_evals.gate import judge
from assay_evals.planning import plan_gates
from assay_evals.report import markdown, page
from assay_evals.structured.constraint import Enforcer
from assay_evals.structured.items import Item
from assay_evals.structured.measure import WritingArm, measure_structured
from assay_evals.verdict import GateRow, Row

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
GATE = {"kl_divergence": {"max": 0.1}, "structured": {"max_new_invalid": 0, "max_drop": 0.2}}


def one(level: int, *, cut_off: bool = False, known: bool = True) -> Written:
    """level: 0 is no JSON, 1 not valid, 2 valid, 3 right."""
    correct = level == 3 if known else None
    return Written(tokens=9, cut_off=cut_off, parsed=level > 0, valid=level > 1, correct=correct, text=f"level {level}")


def row(number: int, before: int, after: int, **changes: Any) -> StructuredRow:
    values: dict[str, Any] = {
        "item": f"item-{number:03}",
        "prompt": f"What is {number}?",
        "schema": json.dumps(SCHEMA),
        "expected": "{}",
        "refused": None,
        "baseline": one(before),
        "candidate": one(after),
        "baseline_enforced": one(max(before, 2)),
        "candidate_enforced": one(max(after, 2)),
        "compile_seconds": 0.002,
        "step_seconds": (0.0004, 0.0006),
    }
    return StructuredRow(**(values | changes))


def rows(*levels: tuple[int, int, int]) -> tuple[StructuredRow, ...]:
    """Of each (baseline's level, candidate's level, how many)."""
    pairs = [(before, after) for before, after, count in levels for _ in range(count)]
    return tuple(row(number, before, after) for number, (before, after) in enumerate(pairs))


def asking(good: Evidence, samples: int, gate: dict[str, Any] | None = None) -> Evidence:
    """Evidence whose recipe asks for structured output."""
    evaluate = good.header.recipe.evaluate.model_copy(update={"structured": Structured(samples=samples)})
    recipe = replace(good.header.recipe, evaluate=evaluate, gate=Gate.model_validate_json(json.dumps(gate or GATE)))
    return replace(good, header=replace(good.header, recipe=recipe))


def judged(good: Evidence, structured: tuple[StructuredRow, ...]) -> dict[str, Row]:
    verdict = judge(replace(asking(good, len(structured)), structured=structured))
    return {found.metric: found for found in (*verdict.gates, *verdict.reported)}


# The damage that enforcement hides


@pytest.fixture
def measured(scripted: Callable[[dict[str, list[str]]], Any], tokenizer: Any) -> Callable[[bool], list[StructuredRow]]:
    """Twenty items, measured with the real enforcement; whether the candidate puts a fence around what it would write."""
    items = [Item(f"item-{number}", f"Number {number}?", SCHEMA, {"n": number}) for number in range(20)]

    def measure(fenced: bool) -> list[StructuredRow]:
        right = {str(item.prompt): [json.dumps(item.expected)] for item in items}
        broken = {prompt: [f"```json\n{text}\n```", text] for prompt, (text,) in right.items()}
        arms = [
            WritingArm(runtime, Enforcer(tokenizer, runtime.ends))
            for runtime in (scripted(right), scripted(broken if fenced else right))
        ]
        asked = [(item, arms[0].runtime.encode(str(item.prompt))) for item in items]
        settings = Structured(samples=20, new_tokens=32)
        return list(measure_structured(arms[0], arms[1], asked, settings, Progress()))

    return measure


def test_what_enforcement_hides_is_caught(good: Evidence, measured: Callable[[bool], list[StructuredRow]]) -> None:
    structured = tuple(measured(True))
    assert all(found.candidate.text.startswith("```json") and not found.candidate.parsed for found in structured)
    verdict = judge(replace(asking(good, 20), structured=structured))
    assert verdict.verdict == "FAIL"
    gates = {gate.metric: gate for gate in verdict.gates}
    assert gates["structured.new_invalid"].verdict == gates["structured.correct"].verdict == "FAIL"
    assert gates["structured.new_invalid"].difference == 20
    for metric in ("parsed", "valid", "correct"):
        enforced = verdict.row(f"structured.enforced.{metric}")
        assert enforced is not None and (enforced.baseline, enforced.candidate) == (1, 1), metric


def test_a_sound_candidate_passes(good: Evidence, measured: Callable[[bool], list[StructuredRow]]) -> None:
    structured = tuple(measured(False))
    verdict = judge(replace(asking(good, 20), structured=structured))
    assert verdict.verdict == "PASS", verdict.reasons
    assert {found.candidate.text for found in structured} == {f'{{"n": {number}}}' for number in range(20)}
    cost, first = verdict.row("structured.cost"), verdict.row("structured.first_use")
    assert cost is not None and first is not None and first.n == 20
    steps = [seconds for found in structured for seconds in found.step_seconds]
    assert cost.n == len(steps) and cost.candidate == pytest.approx(sum(steps) / len(steps))
    assert cost.interval is not None and cost.interval[0] < cost.interval[1]


def test_a_schema_that_cannot_be_enforced_is_counted_and_named(
    scripted: Callable[[dict[str, list[str]]], Any], tokenizer: Any, good: Evidence
) -> None:
    unique = {"type": "array", "uniqueItems": True}
    items = [Item("a", "One?", SCHEMA, None), Item("b", "Two?", unique, None), Item("c", "Three?", SCHEMA, None)]
    runtime = scripted({"One?": ['{"n": 1}'], "Two?": ["[1, 1]"], "Three?": ['{"n": 3}']})
    arm = WritingArm(runtime, Enforcer(tokenizer, runtime.ends))
    asked = [(item, runtime.encode(str(item.prompt))) for item in items]
    structured = tuple(measure_structured(arm, arm, asked, Structured(samples=3, new_tokens=16), Progress()))
    assert [found.refused is None for found in structured] == [True, False, True]
    assert structured[1].candidate == replace(structured[1].candidate, parsed=True, valid=False, correct=None)
    found = judged(good, structured)
    assert found["structured.compiled"].difference == pytest.approx(2 / 3)
    assert "1 of 3 schemas cannot be enforced. b: " in found["structured.compiled"].reason
    assert "uniqueItems" in found["structured.compiled"].reason
    assert (found["structured.valid"].n, found["structured.enforced.valid"].n) == (3, 2)
    assert "structured.enforced.correct" not in found
    assert found["structured.correct"].interval is None, "nobody knows what is correct, so the gate is INVALID"


def test_what_the_limit_cuts_off_is_told(scripted: Callable[[dict[str, list[str]]], Any], tokenizer: Any) -> None:
    runtime = scripted({"Go?": ['{"n": 1234567890123456789012345678901234567890}']})
    arm = WritingArm(runtime, Enforcer(tokenizer, runtime.ends))
    asked = [(Item("a", "Go?", SCHEMA, None), runtime.encode("Go?"))]
    for new_tokens, cut_off in ((8, True), (64, False)):
        (found,) = measure_structured(arm, arm, asked, Structured(new_tokens=new_tokens), Progress())
        for written in (found.baseline, found.candidate, found.baseline_enforced, found.candidate_enforced):
            assert written is not None and (written.cut_off, written.parsed) == (cut_off, not cut_off)


# Rows and gates


@pytest.mark.parametrize(("lost", "limit", "verdict"), [(0, 0, "PASS"), (1, 0, "FAIL"), (1, 1, "PASS"), (3, 2, "FAIL")])
def test_newly_invalid_outputs_are_counted_and_the_bound_of_their_rate_is_said(
    good: Evidence, lost: int, limit: int, verdict: str
) -> None:
    """What was invalid before does not count, and what becomes valid makes up for nothing."""
    structured = rows((3, 1, lost), (3, 3, 20 - lost), (1, 0, 4), (0, 3, 6))
    gate = {"kl_divergence": {"max": 0.1}, "structured": {"max_new_invalid": limit}}
    verdicts = judge(replace(asking(good, 30, gate), structured=structured)).gates
    found = next(gate for gate in verdicts if gate.metric == "structured.new_invalid")
    assert (found.verdict, found.difference, found.n, found.interval) == (verdict, lost, 20, (lost, lost))
    upper = 100 * float(stats.beta.ppf(0.95, lost + 1, 20 - lost))
    assert f"{lost} of 20 valid outputs became invalid, which shows a rate of at most {upper:.1f}%" in found.reason
    assert f"It is {lost}, exactly; at most {limit} was asked." in found.reason


def test_a_baseline_that_is_never_valid_cannot_lose(good: Evidence) -> None:
    found = judged(good, rows((1, 0, 30)))
    new, right = found["structured.new_invalid"], found["structured.correct"]
    assert isinstance(new, GateRow) and new.verdict == "INVALID" and "valid for none of 30 items" in new.reason
    verdict = judge(replace(asking(good, 30), structured=rows((1, 0, 30))))
    (check,) = [check for check in verdict.checks if check.name == "a loss would show in structured.correct"]
    assert not check.passed and "The baseline answers 0 of 30 items right" in check.detail
    assert verdict.verdict == "INVALID" and isinstance(right, GateRow)


def test_the_share_of_right_outputs_is_paired(good: Evidence) -> None:
    found = judged(good, rows((3, 3, 80), (3, 2, 10), (2, 3, 4), (0, 0, 6)))["structured.correct"]
    assert (found.baseline, found.candidate, found.difference) == (0.9, 0.84, pytest.approx(-0.06))
    assert found.interval is not None and isinstance(found, GateRow) and found.verdict == "PASS"
    assert "10 were so from the baseline only, 4 from the candidate only" in found.reason
    # 14 answers differ, so the exact bound holds too: no loss above the upper bound of 10 in 100.
    assert found.interval[0] <= -float(stats.beta.ppf(0.95, 11, 90)) + 1e-9


def test_each_of_several_looks_has_its_share_of_the_error(good: Evidence) -> None:
    structured = rows((3, 3, 90), (3, 2, 10))
    found: list[Row] = []
    for looks in (1, 4):
        evidence = asking(good, 100)
        recipe = evidence.header.recipe
        recipe = replace(recipe, evaluate=recipe.evaluate.model_copy(update={"looks": looks}))
        header = replace(evidence.header, recipe=recipe)
        found += judge(replace(evidence, header=header, structured=structured)).gates[1:3]
    assert [row.confidence for row in found] == [None, 0.9, None, 0.975]
    assert "(95% confidence" in found[0].reason and "(98.75% confidence" in found[2].reason
    once, often = found[1].interval, found[3].interval
    assert once and often and often[0] < once[0]


def test_fewer_or_doubled_or_without_time_is_invalid(good: Evidence) -> None:
    def failed(structured: tuple[StructuredRow, ...]) -> dict[str, str]:
        checks = judge(replace(asking(good, 30), structured=structured)).checks
        return {check.name: check.detail for check in checks if not check.passed}

    sound = rows((3, 3, 30))
    assert failed(sound) == {}
    assert "29 of 30 structured outputs" in failed(sound[:29])["samples as declared"]
    assert "structured output item-000" in failed((*sound, sound[0]))["each sample once"]
    assert "'item-000'" in failed((replace(sound[0], step_seconds=(None,)), *sound[1:]))["finite numbers"]
    assert "'item-000'" in failed((replace(sound[0], compile_seconds=None), *sound[1:]))["finite numbers"]
    assert "Fewer than two structured outputs" in failed(())["every metric measured"]


def test_evidence_keeps_them_and_refuses_what_cannot_be(good: Evidence, tmp_path: Path) -> None:
    structured = (row(0, 3, 1), row(1, 2, 2, refused="no", baseline_enforced=None, candidate_enforced=None))
    written = write_evidence(tmp_path / "evidence", good.header, (*good.windows, *structured), ())
    assert written.structured == structured and read_evidence(tmp_path / "evidence") == written
    with pytest.raises(ValueError, match="or it is said why none does"):
        row(0, 3, 3, refused="no")
    with pytest.raises(ValueError, match="for all outputs of an item"):
        row(0, 3, 3, baseline=one(2, known=False))
    with pytest.raises(ValueError, match="only what is valid can be correct"):
        Written(tokens=1, cut_off=False, parsed=True, valid=False, correct=True, text="")


def test_the_worst_outputs_come_first_and_are_shown_in_every_report(good: Evidence) -> None:
    structured = (row(0, 3, 3), row(1, 3, 2), row(2, 2, 0), row(3, 3, 0), row(4, 1, 3), row(5, 2, 1))
    evidence = replace(asking(good, 6), structured=structured)
    assert [found.item for found in worst_disagreements(evidence, 3).outputs] == ["item-003", "item-002", "item-005"]
    assert len(worse_outputs(evidence)) == 4
    verdict = judge(evidence)
    html, comment = page.render(verdict, evidence, {}, {}), markdown.render_markdown(verdict, evidence, {})
    for text in ("What is 3?", "level 0", "valid but wrong"):
        assert text in html and text in comment
    assert "4 of 6 outputs are worse" in html and "What is 4?" not in html + comment
    assert "Median 0.50 ms, from 0.40 to 0.60 ms." in html
    unlike = replace(structured[0], refused="no such keyword", baseline_enforced=None, candidate_enforced=None)
    refused = replace(evidence, structured=(unlike, *structured[1:]))
    assert "1 of 6 schemas cannot be enforced. item-000: no such keyword" in page.render(
        judge(refused), refused, {}, {}
    )
    assert "Structured output" not in page.render(judge(good), good, {}, {})


def test_every_row_has_words(good: Evidence) -> None:
    found = judged(good, rows((3, 3, 20), (3, 1, 2)))
    named = [metric for metric in found if metric.startswith("structured.")]
    assert set(named) == {metric for metric in wording.METRICS if metric.startswith("structured.")}
    cost = found["structured.cost"]
    assert (
        wording.difference("structured.cost", cost.difference)
        == "0.50 ms"
        == wording.value("structured.cost", cost.candidate)
    )
    assert wording.interval("structured.cost", (0.0004, 0.0006)) == "0.40 to 0.60 ms"
    assert wording.difference("structured.new_invalid", 2.0, 0.0) == "2" == wording.value("structured.new_invalid", 2.0)


def test_planning_says_what_a_count_shows_and_what_a_drop_takes() -> None:
    evaluate = Evaluate.model_validate_json('{"quality": [{"metric": "kl_divergence"}], "structured": {"samples": 40}}')
    gate = Gate.model_validate_json('{"structured": {"max_new_invalid": 0, "max_drop": 0.05}}')
    count, drop = plan_gates(evaluate, gate)
    assert count.in_reach and f"at most {100 * (1 - 0.05 ** (1 / 40)):.1f}%" in count.sentence
    assert not drop.in_reach and "40 items resolve" in drop.sentence and "items." in drop.sentence
    assert drop.samples == 40
