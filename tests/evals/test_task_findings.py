"""From the answers to tasks to rows, verdict and report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from pydantic import TypeAdapter
from rich.console import Console

from assay.errors import IntegrityError
from assay.recipe import Evaluate, Gate
from assay_evals.comparison import Finished, compare
from assay_evals.disagreements import worst_disagreements
from assay_evals.evidence import (
    AnswerItem,
    Check,
    ChoiceItem,
    Continued,
    Evidence,
    Scored,
    ScoredItem,
    TaskRow,
    TaskUsed,
    read_evidence,
    write_evidence,
)
from assay_evals.gate import judge
from assay_evals.planning import plan_gates
from assay_evals.report import render_report
from assay_evals.report.table import verdict_table
from assay_evals.statistics import binomial_lower, binomial_upper
from assay_evals.validity import TASKS_UNSEEN
from assay_evals.verdict import Verdict

Make = Callable[..., Evidence]
ITEMS = {"source": "jsonl", "path": "items.jsonl"}
CHOICE = {"name": "mc", "kind": "multiple_choice", "items": ITEMS}
MATCH = {"name": "em", "kind": "exact_match", "items": ITEMS, "new_tokens": 8, "extract": r"\d+", "stop": ["\n"]}
HARNESS = {"name": "lm", "kind": "lm_eval", "task": "arc_easy", "metric": "acc_norm"}
CHOICES = ("a certain statement", "no")


def chosen(number: int, right: tuple[bool, bool], **changes: Any) -> ChoiceItem:
    """By characters, an arm is right that gives the long one −6, and wrong that gives it −60; by the sum, both are wrong."""
    baseline, candidate = ((-6.0 if found else -60.0, -4.0) for found in right)
    values: dict[str, Any] = {
        "task": "mc",
        "item": str(number),
        "group": None,
        "tag": None,
        "prompt": f"Which, {number}?",
    }
    return ChoiceItem(
        **(values | {"choices": CHOICES, "gold": 0, "baseline": baseline, "candidate": candidate} | changes)
    )


def written(number: int, texts: tuple[str, str], tokens: tuple[int, int] = (4, 4), **changes: Any) -> AnswerItem:
    arms = [Continued(tokens=count, ended=count < 8, text=text) for text, count in zip(texts, tokens, strict=True)]
    values: dict[str, Any] = {"task": "em", "item": str(number), "group": None, "tag": None, "prompt": "6 × 7 ="}
    references = {"references": ("42", "0042"), "new_tokens": 8, "baseline": arms[0], "candidate": arms[1]}
    return AnswerItem(**(values | references | changes))


def scored(number: int, scores: tuple[float | None, float | None], **changes: Any) -> ScoredItem:
    arms = [Scored(score=score, responses=(-1.0, -2.0)) for score in scores]
    values: dict[str, Any] = {"task": "lm", "item": str(number), "group": None, "tag": None, "prompt": "Which?"}
    more = {"target": "0", "choices": 2, "continuations": (" a", " b"), "baseline": arms[0], "candidate": arms[1]}
    return ScoredItem(**(values | more | changes))


def outcomes(total: int, right: int, lost: int, gained: int) -> list[tuple[bool, bool]]:
    """Of `total` items the baseline has `right`, of which the candidate loses some, and gains others."""
    return [(number < right, lost <= number < right or right <= number < right + gained) for number in range(total)]


@pytest.fixture(scope="module")
def make(make_evidence: Make) -> Make:
    """Evidence with answers to tasks."""

    def build(rows: Sequence[TaskRow], *tasks: dict[str, Any], **gates: dict[str, float]) -> Evidence:
        quality = [{"metric": "kl_divergence", "tokens": 2000}]
        evaluate = json.dumps({"length": 64, "quality": quality, "tasks": tasks})
        names = [task["name"] for task in tasks]
        checks = (*make_evidence().header.checks, Check(name=TASKS_UNSEEN, passed=True, detail="none"))
        used = {
            name: TaskUsed(source="items.jsonl", digest="sha256:0", items=sum(row.task == name for row in rows))
            for name in names
        }
        gate = json.dumps({"kl_divergence": {"max": 0.1}, "tasks": gates})
        return replace(
            make_evidence(evaluate=evaluate, gate=gate, checks=checks, tasks=used), tasks=tuple(rows), runs=()
        )

    return build


def failed(verdict: Verdict) -> dict[str, str]:
    return {check.name: check.detail for check in verdict.checks if not check.passed}


# The gate


@pytest.mark.parametrize(
    ("lost", "gained", "verdict"),
    [(0, 0, "PASS"), (8, 6, "PASS"), (120, 20, "FAIL"), (45, 5, "INCONCLUSIVE")],
)
def test_a_task_is_gated_by_its_paired_accuracy(make: Make, lost: int, gained: int, verdict: str) -> None:
    rows = [chosen(number, right) for number, right in enumerate(outcomes(1000, 800, lost, gained))]
    found = judge(make(rows, CHOICE, mc={"max_drop": 0.04}))
    row = found.row("task.mc")
    assert found.verdict == verdict and not failed(found) and row is not None
    assert (row.baseline, row.candidate) == (0.8, (800 - lost + gained) / 1000)
    assert row.difference == pytest.approx((gained - lost) / 1000)
    assert row.reason.endswith(f"{lost} answers went from right to wrong, {gained} from wrong to right.")
    assert row.interval is not None and (row.n, row.clusters) == (1000, 1000)
    if not lost:
        assert row.interval[0] == pytest.approx(-binomial_upper(0, 1000, 0.05))


def test_items_of_a_group_count_as_one_cluster(make: Make) -> None:
    """Ten items in a row are lost or kept together: the interval is that of three hundred, not that of three thousand."""
    right = [(True, number // 10 % 10 > 0) for number in range(3000)]
    rows = [chosen(number, one, group=f"page {number // 10}") for number, one in enumerate(right)]
    together = judge(make(rows, CHOICE)).row("task.mc")
    few = judge(make([chosen(number, one) for number, one in enumerate(right[::10])], CHOICE)).row("task.mc")
    assert few and together and few.interval and together.interval
    assert (together.n, together.clusters, few.n, few.clusters) == (3000, 300, 300, 300)
    assert few.difference == together.difference == -0.1 and together.interval == pytest.approx(few.interval)
    lonely = judge(make([replace(row, group="one") for row in rows], CHOICE))
    assert "is of one group; spread between groups needs at least two" in failed(lonely)["every metric measured"]


def test_both_ways_to_judge_a_choice_are_told_and_the_declared_one_is_gated(make: Make) -> None:
    rows = [chosen(number, right) for number, right in enumerate(outcomes(100, 80, 10, 0))]
    by_character, by_sum = judge(make(rows, CHOICE)), judge(make(rows, CHOICE | {"normalized": False}))
    values = {
        row.metric: (row.baseline, row.candidate)
        for verdict in (by_character, by_sum)
        for row in verdict.reported
        if row.metric.startswith("task.mc.")
    }
    assert values["task.mc.raw"] == (0, 0) and values["task.mc.normalized"] == (0.8, 0.7)
    rows_of = [verdict.row("task.mc") for verdict in (by_character, by_sum)]
    assert [(row.baseline, row.candidate) for row in rows_of if row] == [(0.8, 0.7), (0, 0)]
    flipped = by_character.row("task.mc.flipped")
    assert flipped and flipped.difference == 0.1 and flipped.interval
    assert (
        flipped.interval[0]
        <= binomial_lower(10, 100, 0.05)
        < 0.1
        < binomial_upper(10, 100, 0.05)
        <= flipped.interval[1]
    )


def test_answers_are_scored_from_the_evidence_by_the_recipes_rules(make: Make) -> None:
    texts = [("42", "it is 42"), ("0042.", "43"), ("\n42", "42\n43"), ("42", "none")]
    rows = [written(number, texts[number % 4], (4, 8) if number % 4 == 3 else (4, 4)) for number in range(40)]
    found = {row.metric: row for row in judge(make(rows, MATCH)).reported}
    assert (found["task.em"].baseline, found["task.em"].candidate) == (0.75, 0.5)
    assert found["task.em"].reason == "20 answers went from right to wrong, 10 from wrong to right."
    assert (found["task.em.unstopped"].baseline, found["task.em.unstopped"].candidate) == (0, 0.25)
    assert (found["task.em.length"].baseline, found["task.em.length"].candidate) == (4, 5)
    assert found["task.em.length"].difference == 1.25


def test_scores_between_0_and_1_are_paired_too(make: Make) -> None:
    rows = [scored(number, (0.5, 0.25) if number < 5 else (0.5, 0.5)) for number in range(200)]
    row = judge(make(rows, HARNESS)).row("task.lm")
    assert row and row.interval and row.difference == pytest.approx(-0.25 * 5 / 200)
    # At most so many lost, each at most all of it; what is certain of the loss is not counted at the other end.
    assert row.interval == pytest.approx((-binomial_upper(5, 200, 0.05), binomial_upper(0, 200, 0.05)))
    assert row.reason == "5 scores fell, 0 rose."


def test_the_interval_holds_the_truth_as_often_as_it_says(make: Make) -> None:
    rng, held = np.random.default_rng(5), 0
    template = make([chosen(number, (True, True)) for number in range(300)], CHOICE)
    for _ in range(150):
        rows: list[TaskRow] = []
        for page in range(60):
            level = rng.beta(2, 20)
            for number in range(5):
                lost = rng.random() < level
                gained = not lost and rng.random() < 0.05
                rows.append(chosen(5 * page + number, (not gained, not lost), group=str(page)))
        row = judge(replace(template, tasks=tuple(rows), windows=(), clozes=())).row("task.mc")
        assert row and row.interval
        truth = -2 / 22 + (1 - 2 / 22) * 0.05
        held += row.interval[0] <= truth <= row.interval[1]
    assert 0.84 <= held / 150 <= 0.96


@pytest.mark.parametrize(("right", "shows"), [(520, False), (640, True)])
def test_a_baseline_at_chance_cannot_show_a_loss(make: Make, right: int, shows: bool) -> None:
    """Of two choices: half right is nothing to lose, however many that are."""
    rows = [chosen(number, one) for number, one in enumerate(outcomes(1000, right, 0, 0))]
    verdict = judge(make(rows, CHOICE, mc={"max_drop": 0.03}))
    assert (verdict.verdict == "PASS") == shows and (verdict.verdict == "INVALID") != shows
    check = next(check for check in verdict.checks if check.name == "a loss would show in task.mc")
    assert f"{right} of 1,000 items right" in check.detail and "where guessing gets 50.0%" in check.detail
    scores = (-1.0, -9.0, -9.0, -9.0)
    four = [replace(row, choices=("ab" * 5, *"bcd"), baseline=scores, candidate=scores) for row in rows]
    more = judge(make(four, CHOICE, mc={"max_drop": 0.03}))
    assert "where guessing gets 25.0%" in str(more.checks)


def test_what_is_written_cannot_be_guessed(make: Make) -> None:
    rows = [written(number, ("42", "42") if number < 20 else ("43", "43")) for number in range(100)]
    verdict = judge(make(rows, MATCH, em={"max_drop": 0.04}))
    assert not failed(verdict) and "guessing" not in str(verdict.checks)
    assert "a loss would show in task.em" in failed(judge(make(rows, MATCH, em={"max_drop": 0.06})))


def test_a_gate_on_a_task_that_was_not_measured_is_invalid(make: Make) -> None:
    evidence = make([chosen(number, (True, True)) for number in range(10)], CHOICE)
    asked = Gate.model_validate_json('{"kl_divergence": {"max": 0.1}, "tasks": {"other": {"max_drop": 0.5}}}')
    row = judge(evidence, asked).row("task.other")
    assert row and (row.reason, row.difference) == ("No item of the task other was measured.", None)
    assert judge(evidence, asked).verdict == "INVALID"
    assert (
        "task.mc: No item of the task mc was measured."
        in failed(judge(replace(evidence, tasks=())))["every metric measured"]
    )


# Validity


def test_fewer_items_than_declared_are_invalid(make: Make) -> None:
    rows = [chosen(number, (True, True)) for number in range(50)]
    whole = make(rows, CHOICE)
    assert not failed(judge(whole))
    short = failed(judge(replace(whole, tasks=tuple(rows[1:]))))["samples as declared"]
    assert "Measured only 49 of 50 items of the task mc" in short
    declared = failed(judge(make(rows, CHOICE | {"samples": 60})))["samples as declared"]
    assert "50 of 60 items of the task mc" in declared
    undeclared = replace(whole, header=replace(whole.header, tasks={}))
    assert "samples as declared" in failed(judge(replace(undeclared, tasks=())))
    assert "item ('mc', '0')" in failed(judge(replace(whole, tasks=(*rows, rows[0]))))["each sample once"]


@pytest.mark.parametrize(
    ("row", "task", "said"),
    [
        (chosen(0, (True, True), candidate=(None, -1.0)), CHOICE, "Item '0' of the task mc has a log-likelihood that is not a finite number"),
        (chosen(0, (True, True), baseline=(0.5, -1.0)), CHOICE, "has a log-likelihood above zero"),
        (scored(0, (None, 1.0)), HARNESS, "Item '0' of the task lm has a score that is not a number from 0 to 1"),
        (scored(0, (1.0, 1.5)), HARNESS, "has a score that is not a number from 0 to 1"),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_invalid(make: Make, row: TaskRow, task: dict[str, Any], said: str) -> None:
    verdict = judge(make([row], task))
    assert verdict.verdict == "INVALID" and said in failed(verdict)["finite numbers"]


def test_the_check_for_calibrated_items_has_to_be_there(make: Make) -> None:
    evidence = make([chosen(number, (True, True)) for number in range(10)], CHOICE)
    without = replace(evidence, header=replace(evidence.header, checks=evidence.header.checks[:-1]))
    assert TASKS_UNSEEN in failed(judge(without))["evaluator's checks"]


# Evidence


def test_evidence_keeps_answers_and_the_same_verdict_follows(make: Make, tmp_path: Path) -> None:
    rows = [
        chosen(0, (True, False)),
        chosen(1, (True, True), tag="x", group="g"),
        written(0, ("42", "43")),
        scored(0, (1.0, 0.0)),
    ]
    evidence = make(rows, CHOICE, MATCH, HARNESS, mc={"max_drop": 0.5})
    kept = write_evidence(tmp_path / "evidence", evidence.header, (*evidence.windows, *evidence.clozes, *rows), ())
    assert kept.tasks == tuple(rows) and read_evidence(tmp_path / "evidence") == kept
    assert judge(kept) == replace(judge(evidence), evidence=kept.digest)


@pytest.mark.parametrize(
    ("make_row", "changes", "message"),
    [
        (chosen, {"gold": 2}, "gold is 2, but there are 2 choices"),
        (chosen, {"baseline": (-1.0,)}, "a log-likelihood of each per arm"),
        (chosen, {"choices": ("a", "")}, "none empty"),
        (chosen, {"choices": ("a",), "baseline": (-1.0,), "candidate": (-1.0,)}, "needs two choices or more"),
    ],
)
def test_a_question_that_contradicts_itself_is_no_evidence(
    make_row: Callable[..., TaskRow], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_row(0, (True, True), **changes)


def test_an_answer_that_contradicts_itself_is_no_evidence() -> None:
    with pytest.raises(ValueError, match="no more tokens than were asked for"):
        written(0, ("42", "42"), (4, 9))
    with pytest.raises(ValueError, match="needs a reference"):
        written(0, ("42", "42"), references=())


def test_a_changed_row_is_noticed(make: Make, tmp_path: Path) -> None:
    evidence = make([chosen(0, (True, False))], CHOICE)
    write_evidence(tmp_path / "evidence", evidence.header, evidence.tasks, ())
    path = tmp_path / "evidence" / "quality.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("-60.0", "-6.0"), encoding="utf-8")
    with pytest.raises(IntegrityError, match="It was changed"):
        read_evidence(tmp_path / "evidence")


# Slices, reports, comparison, planning


@pytest.fixture(scope="module")
def mixed(make: Make) -> Evidence:
    """German items are lost; one text tries to be markup."""
    rows: list[TaskRow] = [
        chosen(number, (number % 5 > 0, number % 5 > 0 and number % 10 != 1), tag="de" if number % 10 == 1 else "en")
        for number in range(200)
    ]
    rows[1] = replace(rows[1], prompt="x" * 400 + "<b>[link](x)</b> | ?", choices=("<script>right</script>", "no"))
    rows += [written(number, ("42", "4\u202e3" if number == 7 else "42")) for number in range(50)]
    return make(rows, CHOICE, MATCH, mc={"max_drop": 0.03})


def test_a_tag_that_is_broken_is_shown_beside_the_whole(mixed: Evidence) -> None:
    verdict = judge(mixed)
    found = {row.metric: row for row in verdict.slices}
    whole, german, english = verdict.row("task.mc"), found["task.mc@tag=de"], found["task.mc@tag=en"]
    assert whole and (german.n, german.difference) == (20, -1) and (english.n, english.difference) == (180, 0)
    assert whole.difference == pytest.approx(-0.1) and not [name for name in found if name.startswith("task.em")]


def sliced(evidence: Evidence, **slices: float) -> Verdict:
    """Judged with gates on the slices of tasks, too."""
    gate = evidence.header.recipe.gate.model_dump(mode="json", exclude_none=True)
    tasks = {name: {"max_drop": most} for name, most in slices.items()}
    return judge(evidence, Gate.model_validate_json(json.dumps(gate | {"slices": {"tasks": tasks}})))


def test_the_average_does_not_hide_a_slice_that_fails(make: Make) -> None:
    rows = [
        chosen(number, (number % 5 > 0, number % 5 > 0 and number % 40 != 1), tag="de" if number % 40 == 1 else "en")
        for number in range(4000)
    ]
    evidence = make(rows, CHOICE, mc={"max_drop": 0.05})
    assert judge(evidence).verdict == "PASS"
    verdict = sliced(evidence, mc=0.05)
    assert {row.metric: row.verdict for row in verdict.gates if row.metric.startswith("task")} == {
        "task.mc": "PASS",
        "task.mc@tag=de": "FAIL",
        "task.mc@tag=en": "PASS",
    }
    assert verdict.verdict == "FAIL" and [reason.partition(":")[0] for reason in verdict.reasons] == ["task mc, tag=de"]
    text = render_report("markdown", verdict, evidence, {}, {}).decode()
    assert "❌ FAIL" in text and text.index("tag=de") < text.index("tag=en")


def test_a_slice_that_cannot_be_told_is_never_passed_over(make: Make) -> None:
    rows = [chosen(number, (True, True), tag="rare" if number == 7 else "en") for number in range(400)]
    verdict = sliced(make(rows, CHOICE, mc={"max_drop": 0.05}), mc=0.05)
    found = {row.metric: row for row in verdict.gates}
    assert (verdict.verdict, found["task.mc@tag=rare"].verdict) == ("INVALID", "INVALID")
    assert "with the tag 'rare' is of one group" in found["task.mc@tag=rare"].reason
    untagged = sliced(make([replace(row, tag=None) for row in rows], CHOICE, mc={"max_drop": 0.05}), mc=0.05)
    assert untagged.verdict == "INVALID" and "no item of this task with a tag" in untagged.gates[-1].reason


def test_each_of_several_looks_at_a_task_has_its_share_of_the_error(make: Make) -> None:
    rows = [chosen(number, right, tag="ab"[number % 2]) for number, right in enumerate(outcomes(400, 300, 9, 5))]
    evidence = make(rows, CHOICE, mc={"max_drop": 0.1})
    # Evidence of before there were looks says nothing of them, and is judged as it was.
    assert "looks" not in json.dumps(TypeAdapter(TaskUsed).dump_python(evidence.header.tasks["mc"]))
    used = {"mc": replace(evidence.header.tasks["mc"], looks=4)}
    later = replace(evidence, header=replace(evidence.header, tasks=used))
    for one, confidence in ((evidence, 0.9), (later, 1 - 2 * 0.05 / 4)):
        verdict = judge(one)
        found = [verdict.row("task.mc"), *(row for row in verdict.slices if row.metric.startswith("task.mc"))]
        assert len(found) == 3 and all(row and row.confidence == pytest.approx(confidence) for row in found)


def test_every_form_of_report_has_the_task_and_its_worst_answers(mixed: Evidence) -> None:
    verdict, output = judge(mixed), io.StringIO()
    assert verdict.verdict == "FAIL"
    Console(width=100, file=output).print(verdict_table(verdict))
    shown = " ".join(output.getvalue().split())
    assert "task mc 80.0% 70.0% −10.0 points" in shown and "task mc, tag=de" in shown
    page, text, junit = (render_report(form, verdict, mixed, {}, {}).decode() for form in ("html", "markdown", "junit"))
    for form in (page, text):
        assert "Task mc" in form and "at most 3 points lower" in form and "Task mc, tag=de" in form
        assert "<script>right" not in form and "&lt;script&gt;right" in form and "[link](x)" not in text
    assert page.count('class="flip"') >= 10 and "Task em" in page and "of 200 items" in page
    assert "The 10 worst of the answers to the task mc that became wrong" in text
    assert "The 1 worst of the answers to the task em that became wrong" in text
    case = next(case for case in ElementTree.fromstring(junit) if case.get("name", "").startswith("task.mc"))
    assert case.find("failure") is not None and case.get("name") == "task.mc at most 3 points lower"
    assert "Task mc −10.0 points" in text.splitlines()[2] or "task mc −10.0 points" in text.splitlines()[2]


def test_the_worst_answers_are_those_where_the_right_one_fell_most(make: Make) -> None:
    rows = [
        chosen(number, (True, False), candidate=(-60.0 - number, -4.0)) if number < 5 else chosen(number, (False, True))
        for number in range(10)
    ]
    items = worst_disagreements(make(rows, CHOICE), 3).tasks["mc"]
    assert [item.row.item for item in items] == ["4", "3", "2"]
    assert items[0].answers == (CHOICES[0], CHOICES[1]) and items[0].expected == CHOICES[0]


def test_candidates_are_compared_by_the_items_that_both_answered(make: Make) -> None:
    def finished(name: str, lost: int) -> Finished:
        rows = [chosen(number, right) for number, right in enumerate(outcomes(400, 300, lost, 0))]
        evidence = make(rows, CHOICE)
        return Finished(name, evidence, judge(evidence))

    runs = [finished("one", 30), finished("two", 10)]
    contrast = next(one for one in compare(runs)[1].contrasts if one.metric == "task.mc")
    assert contrast.change == pytest.approx(0.05) and contrast.interval and 0 < contrast.interval[0] < 0.05
    other = make([chosen(number, (True, True)) for number in range(400)], CHOICE | {"normalized": False})
    against = compare([runs[0], Finished("other", other, judge(other))])[1]
    contrast = next(one for one in against.contrasts if one.metric == "task.mc")
    assert (contrast.change, contrast.reason) == (None, "measured on other samples than the first")


def test_planning_tells_what_the_items_resolve() -> None:
    gate = Gate.model_validate_json('{"tasks": {"mc": {"max_drop": 0.02}}}')

    def planned(task: dict[str, Any], **items: list[int]) -> Any:
        evaluate = {"quality": [{"metric": "kl_divergence"}], "tasks": [CHOICE | task]}
        (found,) = plan_gates(Evaluate.model_validate_json(json.dumps(evaluate)), gate, items=items)
        return found

    few, many = planned({"samples": 200}), planned({}, mc=[3000])
    assert not few.in_reach and (few.metric, few.samples) == ("task.mc", 200) and "ask for about" in few.sentence
    assert many.in_reach and "3,000 items resolve" in many.sentence
    # n = 6.1826 · discordance / margin², by the published table; documents alike take more.
    assert planned({"samples": 1237}).in_reach and not planned({"samples": 1236}).in_reach
    assert not planned({"samples": 1237, "group": "page"}).in_reach
    # Several looks divide the error, and the last one counts.
    assert planned({}, mc=[3000]).smallest < planned({}, mc=[1500, 3000]).smallest < planned({}, mc=[1500]).smallest
