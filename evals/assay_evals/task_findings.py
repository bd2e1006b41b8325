"""Tasks, from evidence to rows: what each arm scores on each item, and the paired difference, clustered by the items' groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from assay.recipe import ExactMatchTask, LmEvalTask, MultipleChoiceTask
from assay_evals.evidence import AnswerItem, ChoiceItem, Evidence, Measured, ScoredItem, TaskRow
from assay_evals.findings import UnmeasurableError, finding
from assay_evals.quality_findings import ALPHA, CONFIDENCE, paired_accuracy, paired_disagreement, ratio_of_means
from assay_evals.slices import TAG, sliced
from assay_evals.task_scoring import answer_in, likeliest, normalized
from assay_evals.verdict import Row
from assay_evals.wording import TASK

Task = MultipleChoiceTask | ExactMatchTask | LmEvalTask


@dataclass(frozen=True)
class Judged:
    """An item with the score of each arm, 0 to 1, and what each said."""

    row: TaskRow
    scores: tuple[float, float]
    answers: tuple[str, str]
    expected: str


def judged_items(evidence: Evidence, name: str) -> list[Judged]:
    """The items of a task with their scores; UnmeasurableError when there are none, or one cannot be judged."""
    task = next((one for one in evidence.header.recipe.evaluate.tasks if one.name == name), None)
    rows = [row for row in evidence.tasks if row.task == name]
    if task is None or not rows:
        raise UnmeasurableError(f"No item of the task {name} was measured.")
    return [_judged(task, row) for row in rows]


def _judged(task: Task, row: TaskRow) -> Judged:
    if isinstance(row, ChoiceItem) and isinstance(task, MultipleChoiceTask):
        return _chosen(row, normalized=task.normalized)
    if isinstance(row, AnswerItem) and isinstance(task, ExactMatchTask):
        references = {normalized(reference, task) for reference in row.references}
        answers = (answer_in(row.baseline.text, task), answer_in(row.candidate.text, task))
        scores = (float(answers[0] in references), float(answers[1] in references))
        return Judged(row, scores, answers, " or ".join(row.references))
    if isinstance(row, ScoredItem) and isinstance(task, LmEvalTask):
        before, after = row.baseline, row.candidate
        if before.score is None or after.score is None:
            raise UnmeasurableError(f"The score of item {row.item!r} of the task {row.task} is not a finite number.")
        answers = (_response(row, before.responses), _response(row, after.responses))
        return Judged(row, (before.score, after.score), answers, row.target)
    raise UnmeasurableError(f"Item {row.item!r} of the task {row.task} is not of the kind that the recipe declares.")


def _chosen(row: ChoiceItem, *, normalized: bool) -> Judged:
    before, after = (_finite(row, arm) for arm in (row.baseline, row.candidate))
    picked = (
        likeliest(before, row.choices, normalized=normalized),
        likeliest(after, row.choices, normalized=normalized),
    )
    scores = (float(picked[0] == row.gold), float(picked[1] == row.gold))
    return Judged(row, scores, (row.choices[picked[0]], row.choices[picked[1]]), row.choices[row.gold])


def _finite(row: ChoiceItem, values: Sequence[Measured]) -> list[float]:
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        raise UnmeasurableError(f"A log-likelihood of item {row.item!r} of the task {row.task} is not a finite number.")
    return found


def _response(row: ScoredItem, responses: Sequence[Measured | str]) -> str:
    """What an arm said: its text, or the likeliest of several continuations."""
    numbers = [value for value in responses if isinstance(value, float)]
    if not row.continuations or len(numbers) < 2:
        return ", ".join("–" if value is None else str(value) for value in responses)
    return row.continuations[numbers.index(max(numbers))].strip()


def cluster(row: TaskRow) -> str:
    """Items of a group vary together; an item without one is on its own."""
    return f"item {row.item}" if row.group is None else f"group {row.group}"


def task_rows(evidence: Evidence, metric: str) -> list[Row]:
    """The row of a task, which is what a gate judges, and those that tell more about it."""
    name = metric.removeprefix(TASK)
    items = judged_items(evidence, name)
    labels = [cluster(item.row) for item in items]
    if len(set(labels)) < 2:
        raise UnmeasurableError(
            f"Every item of the task {name} is of one group; spread between groups needs at least two."
        )
    scores, alpha = [item.scores for item in items], alpha_of(evidence, name)
    rows = [paired_accuracy(metric, scores, labels, alpha), paired_disagreement(f"{metric}.flipped", scores, labels)]
    choices = [item.row for item in items if isinstance(item.row, ChoiceItem)]
    if choices:
        task = next(one for one in evidence.header.recipe.evaluate.tasks if one.name == name)
        other = not (isinstance(task, MultipleChoiceTask) and task.normalized)
        part = "normalized" if other else "raw"
        rows.append(
            paired_accuracy(f"{metric}.{part}", [_chosen(row, normalized=other).scores for row in choices], labels)
        )
    answers = [item.row for item in items if isinstance(item.row, AnswerItem)]
    return rows + (_answer_rows(metric, answers, labels) if answers else [])


def _answer_rows(metric: str, rows: Sequence[AnswerItem], labels: Sequence[str]) -> list[Row]:
    """Whether the candidate writes longer, or does not stop."""
    cut = [(float(not row.baseline.ended), float(not row.candidate.ended)) for row in rows]
    found = [replace(paired_accuracy(f"{metric}.unstopped", cut, labels), reason="")]
    lengths = [(float(row.baseline.tokens), float(row.candidate.tokens)) for row in rows]
    if _mean(lengths, 0) > 0:
        ratio, interval = ratio_of_means(lengths, labels)
        found.append(
            finding(
                f"{metric}.length",
                arms=(_mean(lengths, 0), _mean(lengths, 1)),
                difference=ratio,
                interval=interval,
                confidence=CONFIDENCE,
                samples=len(rows),
                clusters=len(set(labels)),
            )
        )
    return found


def _mean(pairs: Sequence[tuple[float, float]], arm: int) -> float:
    return math.fsum(pair[arm] for pair in pairs) / len(pairs)


def task_slices(evidence: Evidence, metric: str) -> dict[str, list[Row] | str]:
    """The row of a task for each tag of its items, by what it is called there, or why it cannot be told."""
    name = metric.removeprefix(TASK)
    items, alpha = judged_items(evidence, name), alpha_of(evidence, name)
    found: dict[str, list[Row] | str] = {}
    for tag in sorted({item.row.tag for item in items if item.row.tag is not None}):
        part = [item for item in items if item.row.tag == tag]
        labels, called = [cluster(item.row) for item in part], sliced(metric, f"{TAG}={tag}")
        if len(set(labels)) > 1:
            found[called] = [paired_accuracy(called, [item.scores for item in part], labels, alpha)]
        else:
            found[called] = (
                f"Every item of the task {name} with the tag {tag!r} is of one group; spread between groups needs at least two."
            )
    return found


def alpha_of(evidence: Evidence, name: str) -> float:
    """One-sided error of one look at a task: all that it could take part in are wrong no more often than ALPHA together (Bonferroni)."""
    used = evidence.header.tasks.get(name)
    return ALPHA / (used.looks if used else 1)


def chance_level(evidence: Evidence, metric: str) -> float:
    """The accuracy of guessing at a metric: the mean of 1 / choices over the items of a task; 0 where there is nothing to choose from."""
    rows = [row for row in evidence.tasks if f"{TASK}{row.task}" == metric]
    counts = [
        len(row.choices) if isinstance(row, ChoiceItem) else row.choices if isinstance(row, ScoredItem) else 0
        for row in rows
    ]
    return math.fsum(1 / count for count in counts if count) / len(counts) if counts else 0.0
