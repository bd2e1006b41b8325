"""The tasks of a recipe: read and checked before anything is built, answered by both arms afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from assay.calibration import encode
from assay.errors import UsageError
from assay.files import canonical_json, sha256_bytes
from assay.progress import Progress
from assay.recipe import Evaluate, ExactMatchTask, LmEvalTask, MultipleChoiceTask
from assay.text import Document, Messages
from assay_evals.evidence import Check, TaskRow, TaskUsed
from assay_evals.quality.checks import grams
from assay_evals.runtimes.base import Runtime
from assay_evals.tasks.exact_match import answer_exercise, encode_exercises, read_exercises
from assay_evals.tasks.items import source_of
from assay_evals.tasks.multiple_choice import answer_question, encode_questions, read_questions
from assay_evals.validity import TASKS_UNSEEN

_SEEN_SHARE, _MOST_SEEN = 0.5, 0.01
# What more of the items than this begin or end with is an instruction, and says nothing of any.
_SHARED = 0.1
Answers = Callable[[Any, Runtime, Runtime], Iterator[TaskRow]]


@dataclass(frozen=True)
class ReadTask:
    """A task whose items were read.

    texts: what each item asks, for finding it in other texts.  fits: raises UsageError unless tokenizer and context length take all of
    it.  answers: what both arms make of it, one item after the other.
    """

    name: str
    used: TaskUsed
    texts: tuple[str | Messages, ...]
    fits: Callable[[Any, int], object]
    answers: Answers


def read_tasks(evaluate: Evaluate, base: Path) -> list[ReadTask]:
    """The items of every task; UsageError names the first thing that is wrong with them."""
    return [_read(task, base) for task in evaluate.tasks]


def _read(task: MultipleChoiceTask | ExactMatchTask | LmEvalTask, base: Path) -> ReadTask:
    if isinstance(task, MultipleChoiceTask):
        return _multiple_choice(task, base)
    return _exact_match(task, base) if isinstance(task, ExactMatchTask) else _lm_eval(task, base)


def _multiple_choice(task: MultipleChoiceTask, base: Path) -> ReadTask:
    questions = read_questions(task, base)

    def answers(tokenizer: Any, baseline: Runtime, candidate: Runtime) -> Iterator[TaskRow]:
        for encoded in encode_questions(task, questions, tokenizer, baseline.context_length):
            yield answer_question(task.name, encoded, baseline, candidate)

    content = [
        [one.item.name, one.item.prompt, one.choices, one.gold, one.item.group, one.item.tag] for one in questions
    ]
    return ReadTask(
        name=task.name,
        used=_used(source_of(task), content, len(questions)),
        texts=tuple(one.item.prompt for one in questions),
        fits=lambda tokenizer, context_length: encode_questions(task, questions, tokenizer, context_length),
        answers=answers,
    )


def _exact_match(task: ExactMatchTask, base: Path) -> ReadTask:
    exercises = read_exercises(task, base)

    def answers(tokenizer: Any, baseline: Runtime, candidate: Runtime) -> Iterator[TaskRow]:
        for encoded in encode_exercises(task, exercises, tokenizer, baseline.context_length):
            yield answer_exercise(task, encoded, baseline, candidate)

    content = [[one.item.name, one.item.prompt, one.references, one.item.group, one.item.tag] for one in exercises]
    return ReadTask(
        name=task.name,
        used=_used(source_of(task), content, len(exercises)),
        texts=tuple(one.item.prompt for one in exercises),
        fits=lambda tokenizer, context_length: encode_exercises(task, exercises, tokenizer, context_length),
        answers=answers,
    )


def _lm_eval(task: LmEvalTask, base: Path) -> ReadTask:
    from assay_evals.tasks import harness

    read = harness.read_harness(task, base)

    def answers(tokenizer: Any, baseline: Runtime, candidate: Runtime) -> Iterator[TaskRow]:
        return harness.answer_harness(read, tokenizer, baseline, candidate)

    return ReadTask(
        name=task.name,
        used=_used(
            f"lm-evaluation-harness {metadata.version('lm-eval')}, {task.task}", read.content(), len(read.indices)
        ),
        texts=read.prompts,
        fits=lambda tokenizer, context_length: harness.check_fit(read, tokenizer, context_length),
        answers=answers,
    )


def _used(source: str, content: Any, items: int) -> TaskUsed:
    return TaskUsed(source=source, digest=sha256_bytes(canonical_json(content)), items=items)


def measure_tasks(
    tasks: Sequence[ReadTask], tokenizer: Any, baseline: Runtime, candidate: Runtime, progress: Progress
) -> Iterator[TaskRow]:
    """Yield what both arms make of every item of every task."""
    for task in tasks:
        with progress.stage(f"measure the task {task.name}", task.used.items) as advance:
            for row in task.answers(tokenizer, baseline, candidate):
                yield row
                advance()


def unseen_items(calibration: Sequence[Sequence[int]], tasks: Sequence[ReadTask], tokenizer: Any) -> Check:
    """No task has more than 1% of items that the model was calibrated on.

    An item counts when more than half of its sequences of 13 tokens stand in the calibration text, without those that more than a tenth of
    the task's items have.
    """
    seen = {gram for tokens in calibration for gram in grams(tokens)}
    found: list[str] = []
    passed = True
    for task in tasks:
        sequences = [set(grams(_tokens(text, tokenizer))) for text in task.texts]
        holders = Counter(gram for one in sequences for gram in one)
        most = max(1.0, _SHARED * len(sequences))
        own = [{gram for gram in one if holders[gram] <= most} for one in sequences]
        known = sum(len(one & seen) > _SEEN_SHARE * len(one) for one in own)
        short = sum(not one for one in own)
        passed &= known <= _MOST_SEEN * len(own)
        found.append(
            f"{known:,} of the {len(own):,} items of {task.name}"
            + (f" ({short:,} are too short to tell)" if short else "")
        )
    detail = (
        f"{'; '.join(found)} stand in the calibration text by more than half of their sequences of 13 tokens; at most "
        f"{_MOST_SEEN:.0%} may."
    )
    return Check(name=TASKS_UNSEEN, passed=passed, detail=detail)


def check_tasks(
    tasks: Sequence[ReadTask], tokenizer: Any, context_length: int, calibration: Sequence[Sequence[int]]
) -> None:
    """UsageError when an item does not fit the model, or items were calibrated on."""
    for task in tasks:
        task.fits(tokenizer, context_length)
    if tasks and not (unseen := unseen_items(calibration, tasks, tokenizer)).passed:
        raise UsageError(f"tasks were calibrated on: {unseen.detail} Use other text for one of the two.")


def _tokens(text: str | Messages, tokenizer: Any) -> list[int]:
    if not isinstance(text, str):
        text = "\n".join(turn["content"] for turn in text)
    return encode(Document("item", text), tokenizer)
