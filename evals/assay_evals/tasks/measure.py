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
from assay_evals.tasks.items import sizes, source_of
from assay_evals.tasks.multiple_choice import answer_question, encode_questions, read_questions
from assay_evals.validity import TASKS_UNSEEN

_SEEN_SHARE, _MOST_SEEN = 0.5, 0.01
# What more of the items than this begin or end with is an instruction, and says nothing of any.
_SHARED = 0.1
Answers = Callable[[range, Any, Runtime, Runtime], Iterator[TaskRow]]


@dataclass(frozen=True)
class ReadTask:
    """A task whose items were read, those of later looks last.

    looks: the items that are answered up to each look that it can take part in.  texts: what each item asks, for finding it in other texts.
    fits: raises UsageError unless tokenizer and context length take all of it.  answers: what both arms make of some of the items, one
    after the other.
    """

    name: str
    looks: tuple[TaskUsed, ...]
    texts: tuple[str | Messages, ...]
    fits: Callable[[Any, int], object]
    answers: Answers

    def used(self, look: int = 1) -> TaskUsed:
        """The items that are answered up to a look."""
        return self.looks[min(look, len(self.looks)) - 1]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many items are answered up to each look."""
        return tuple(used.items for used in self.looks)

    def added(self, look: int) -> range:
        """The places of the items that a look adds to those of the one before."""
        return range(self.used(look - 1).items if look > 1 else 0, self.used(look).items)


def read_tasks(evaluate: Evaluate, base: Path) -> list[ReadTask]:
    """The items of every task; UsageError names the first thing that is wrong with them."""
    return [_read(task, base, evaluate.looks) for task in evaluate.tasks]


def _read(task: MultipleChoiceTask | ExactMatchTask | LmEvalTask, base: Path, looks: int) -> ReadTask:
    if isinstance(task, MultipleChoiceTask):
        return _multiple_choice(task, base, looks)
    return _exact_match(task, base, looks) if isinstance(task, ExactMatchTask) else _lm_eval(task, base, looks)


def _multiple_choice(task: MultipleChoiceTask, base: Path, looks: int) -> ReadTask:
    questions = read_questions(task, base, looks)

    def answers(items: range, tokenizer: Any, baseline: Runtime, candidate: Runtime) -> Iterator[TaskRow]:
        some = questions[items.start : items.stop]
        for encoded in encode_questions(task, some, tokenizer, baseline.context_length):
            yield answer_question(task.name, encoded, baseline, candidate)

    content = [
        [one.item.name, one.item.prompt, one.choices, one.gold, one.item.group, one.item.tag] for one in questions
    ]
    return ReadTask(
        name=task.name,
        looks=_looks(source_of(task), sizes(task.samples, len(questions), looks), lambda items: content[:items]),
        texts=tuple(one.item.prompt for one in questions),
        fits=lambda tokenizer, context_length: encode_questions(task, questions, tokenizer, context_length),
        answers=answers,
    )


def _exact_match(task: ExactMatchTask, base: Path, looks: int) -> ReadTask:
    exercises = read_exercises(task, base, looks)

    def answers(items: range, tokenizer: Any, baseline: Runtime, candidate: Runtime) -> Iterator[TaskRow]:
        some = exercises[items.start : items.stop]
        for encoded in encode_exercises(task, some, tokenizer, baseline.context_length):
            yield answer_exercise(task, encoded, baseline, candidate)

    content = [[one.item.name, one.item.prompt, one.references, one.item.group, one.item.tag] for one in exercises]
    return ReadTask(
        name=task.name,
        looks=_looks(source_of(task), sizes(task.samples, len(exercises), looks), lambda items: content[:items]),
        texts=tuple(one.item.prompt for one in exercises),
        fits=lambda tokenizer, context_length: encode_exercises(task, exercises, tokenizer, context_length),
        answers=answers,
    )


def _lm_eval(task: LmEvalTask, base: Path, looks: int) -> ReadTask:
    from assay_evals.tasks import harness

    read = harness.read_harness(task, base, looks)

    def answers(items: range, tokenizer: Any, baseline: Runtime, candidate: Runtime) -> Iterator[TaskRow]:
        return harness.answer_harness(read.part(items), tokenizer, baseline, candidate)

    return ReadTask(
        name=task.name,
        looks=_looks(
            f"lm-evaluation-harness {metadata.version('lm-eval')}, {task.task}",
            sizes(task.samples, len(read.indices), looks),
            read.content,
        ),
        texts=read.prompts,
        fits=lambda tokenizer, context_length: harness.check_fit(read, tokenizer, context_length),
        answers=answers,
    )


def _looks(source: str, counts: Sequence[int], content: Callable[[int], Any]) -> tuple[TaskUsed, ...]:
    """What the evidence says at each look.  content: the first of the items, as JSON."""
    return tuple(
        TaskUsed(source=source, digest=sha256_bytes(canonical_json(content(items))), items=items, looks=len(counts))
        for items in counts
    )


def measure_tasks(
    tasks: Sequence[ReadTask],
    tokenizer: Any,
    baseline: Runtime,
    candidate: Runtime,
    progress: Progress,
    *,
    look: int = 1,
) -> Iterator[TaskRow]:
    """Yield what both arms make of every item that a look adds to a task."""
    for task in tasks:
        added = task.added(look)
        if not added:
            continue
        with progress.stage(f"measure the task {task.name}", len(added)) as advance:
            for row in task.answers(added, tokenizer, baseline, candidate):
                yield row
                advance()


def unseen_items(
    calibration: Sequence[Sequence[int]], tasks: Sequence[ReadTask], tokenizer: Any, look: int | None = None
) -> Check:
    """No task has more than 1% of items that the model was calibrated on.  look: up to which they count; all, unless given.

    An item counts when more than half of its sequences of 13 tokens stand in the calibration text, without those that more than a tenth of
    the task's items have.
    """
    seen = {gram for tokens in calibration for gram in grams(tokens)}
    found: list[str] = []
    passed = True
    for task in tasks:
        texts = task.texts if look is None else task.texts[: task.used(look).items]
        sequences = [set(grams(_tokens(text, tokenizer))) for text in texts]
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
