"""Multiple choice: how likely each choice is after the question, for both arms.

ln p(choice | question) = Σ_t ln p(token t of the choice | question, tokens before it), in nats. Judged is it, or it over the number of
characters (code points) of the choice's text: lm-evaluation-harness's `acc` and `acc_norm` (0.4.13, api/task.py, process_results).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from assay.errors import UsageError
from assay.recipe import MultipleChoiceTask
from assay.text import field_of
from assay_evals.evidence import ChoiceItem
from assay_evals.runtimes.base import Runtime
from assay_evals.tasks.encoding import Encoder
from assay_evals.tasks.items import Item, prompt_text, read_items, read_rows


@dataclass(frozen=True)
class Question:
    """An item with its choices and the index of the right one."""

    item: Item
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Encoded:
    """A question as tokens: those before the choices, and those of each choice."""

    question: Question
    prompt: str
    context: list[int]
    continuations: list[list[int]]


def read_questions(task: MultipleChoiceTask, base: Path, looks: int = 1) -> list[Question]:
    """The questions that are to be answered; UsageError names the first line that is none."""
    return [_question(task, item, row) for item, row in read_items(task, read_rows(task, base, looks), task.query)]


def _question(task: MultipleChoiceTask, item: Item, row: Any) -> Question:
    choices = list(task.labels) if task.labels else field_of(row, task.choices, item.place)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UsageError(f"{item.place}: {task.choices!r} must be a list of texts.")
    if len(choices) < 2:
        raise UsageError(
            f"{item.place}: {task.choices!r} has {len(choices)} of them; a question needs two choices or more."
        )
    if not all(choice.strip() for choice in choices):
        raise UsageError(f"{item.place}: a choice in {task.choices!r} is empty.")
    gold = field_of(row, task.gold, item.place)
    if isinstance(gold, str) and choices.count(gold) == 1:
        gold = choices.index(gold)
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise UsageError(
            f"{item.place}: {task.gold!r} is {gold!r}; it must be the index of a choice, 0 to {len(choices) - 1}, or its text."
        )
    return Question(item, tuple(choices), gold)


def encode_questions(
    task: MultipleChoiceTask, questions: Sequence[Question], tokenizer: Any, context_length: int
) -> list[Encoded]:
    """The questions as tokens; UsageError when one does not fit the model's context."""
    encoder = Encoder(tokenizer, templated=task.chat)
    # After a template the model's turn has begun, and no space belongs there.
    delimiter = ("" if task.chat else " ") if task.delimiter is None else task.delimiter
    encoded: list[Encoded] = []
    for question in questions:
        prompt = prompt_text(question.item, tokenizer, chat=task.chat)
        pairs = [encoder.pair(prompt, delimiter + choice) for choice in question.choices]
        for choice, (context, continuation) in zip(question.choices, pairs, strict=True):
            if not continuation:
                raise UsageError(f"{question.item.place}: the choice {choice!r} adds no token to the query.")
            if len(context) + len(continuation) > context_length:
                raise UsageError(
                    f"{question.item.place}: query and choice are {len(context) + len(continuation):,} tokens; the model's context is "
                    f"{context_length:,}. Leave the item out, or shorten it."
                )
        encoded.append(Encoded(question, prompt, pairs[0][0], [continuation for _, continuation in pairs]))
    return encoded


def answer_question(task: str, encoded: Encoded, baseline: Runtime, candidate: Runtime) -> ChoiceItem:
    """What both arms make of a question."""
    question = encoded.question
    scores = [
        tuple(score.log_likelihood for score in continuation_scores(runtime, encoded.context, encoded.continuations))
        for runtime in (baseline, candidate)
    ]
    return ChoiceItem(
        task=task,
        item=question.item.name,
        group=question.item.group,
        tag=question.item.tag,
        prompt=encoded.prompt,
        choices=question.choices,
        gold=question.gold,
        baseline=scores[0],
        candidate=scores[1],
    )


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation in nats; greedy: whether each of its tokens is the likeliest."""

    log_likelihood: float
    greedy: bool


def continuation_scores(runtime: Runtime, context: list[int], continuations: Sequence[list[int]]) -> list[Score]:
    """A score of each continuation, with as few passes as the runtime's interface allows.

    A pass over a sequence has the logits after each of its tokens. The last token of a continuation is only looked up, never read, so
    all choices of one token need one pass, and a choice that another begins with needs none of its own.
    """
    scores: dict[int, Score] = {}
    for sequence, served in _passes(context, continuations):
        logits = runtime.logits(sequence)[len(context) - 1 :]
        for index in served:
            scores[index] = _score(logits[: len(continuations[index])], continuations[index])
    return [scores[index] for index in range(len(continuations))]


def _passes(context: list[int], continuations: Sequence[list[int]]) -> Iterator[tuple[list[int], list[int]]]:
    """The sequences to read, and which continuations each of them serves: those whose beginning it holds."""
    left = sorted(range(len(continuations)), key=lambda index: -len(continuations[index]))
    while left:
        longest = continuations[left[0]][:-1]
        served = [index for index in left if longest[: len(continuations[index]) - 1] == continuations[index][:-1]]
        yield context + longest, served
        left = [index for index in left if index not in served]


def _score(logits: NDArray[np.float32], tokens: list[int]) -> Score:
    """logits: [len(tokens), vocabulary], row i before token i."""
    rows = logits.astype(np.float64)
    found = rows[np.arange(len(tokens)), tokens] - logsumexp(rows, axis=-1)
    return Score(round(float(found.sum()), 7), bool((rows.argmax(axis=-1) == tokens).all()))
