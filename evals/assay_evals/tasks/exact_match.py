"""Exact match: both arms answer a prompt greedily, as when they are served; right is an answer that is one of the references.

What is generated is kept whole. The answer in it is found when it is judged: up to the first stop string, what `extract` finds there,
normalized as the references are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.errors import UsageError
from assay.recipe import ExactMatchTask
from assay.text import field_of
from assay_evals.evidence import AnswerItem, Continued
from assay_evals.runtimes.base import Runtime
from assay_evals.task_scoring import normalized
from assay_evals.tasks.encoding import Encoder
from assay_evals.tasks.items import Item, prompt_text, read_items, read_rows


@dataclass(frozen=True)
class Exercise:
    """An item with its references."""

    item: Item
    references: tuple[str, ...]


@dataclass(frozen=True)
class Encoded:
    """An exercise as the model reads it."""

    exercise: Exercise
    prompt: str
    tokens: list[int]


def read_exercises(task: ExactMatchTask, base: Path, looks: int = 1) -> list[Exercise]:
    """The exercises that are to be answered; UsageError names the first line that is none."""
    return [
        Exercise(item, _references(task, item, field_of(row, task.references, item.place)))
        for item, row in read_items(task, read_rows(task, base, looks), task.prompt)
    ]


def _references(task: ExactMatchTask, item: Item, value: Any) -> tuple[str, ...]:
    references = [value] if isinstance(value, str) else value
    if not isinstance(references, list) or not references or not all(isinstance(one, str) for one in references):
        raise UsageError(f"{item.place}: {task.references!r} must be a text, or a list of one text or more.")
    for reference in references:
        if not normalized(reference, task):
            raise UsageError(
                f"{item.place}: {task.references!r} holds {reference!r}, of which nothing is left to compare; give it a text."
            )
    return tuple(references)


def encode_exercises(
    task: ExactMatchTask, exercises: Sequence[Exercise], tokenizer: Any, context_length: int
) -> list[Encoded]:
    """The exercises as tokens; UsageError when prompt and answer do not fit the model's context."""
    encoder = Encoder(tokenizer, templated=task.chat)
    encoded: list[Encoded] = []
    for exercise in exercises:
        prompt = prompt_text(exercise.item, tokenizer, chat=task.chat)
        tokens = encoder.prompt(prompt)
        if len(tokens) + task.new_tokens > context_length:
            raise UsageError(
                f"{exercise.item.place}: the prompt's {len(tokens):,} tokens and {task.new_tokens:,} new ones exceed the model's context "
                f"of {context_length:,}. Leave the item out, or lower new_tokens."
            )
        encoded.append(Encoded(exercise, prompt, tokens))
    return encoded


def answer_exercise(task: ExactMatchTask, encoded: Encoded, baseline: Runtime, candidate: Runtime) -> AnswerItem:
    """What both arms answer."""
    item = encoded.exercise.item
    before, after = (generate(runtime, encoded.tokens, task.new_tokens, task.stop) for runtime in (baseline, candidate))
    return AnswerItem(
        task=task.name,
        item=item.name,
        group=item.group,
        tag=item.tag,
        prompt=encoded.prompt,
        references=encoded.exercise.references,
        new_tokens=task.new_tokens,
        baseline=before,
        candidate=after,
    )


def generate(runtime: Runtime, prompt: list[int], new_tokens: int, stop: Sequence[str]) -> Continued:
    """Greedy text after a prompt, until the model ends it, a stop string stands in it, or there are `new_tokens`.

    The stop string, if one was met, is part of the text; the model has then ended it as well.
    """

    tokens: list[int] = []

    def greedy(scores: NDArray[np.float32]) -> int | None:
        token = int(scores.argmax())
        if token in runtime.ends or met():
            return None
        tokens.append(token)
        return token

    def met() -> bool:
        text = runtime.decode(tokens) if stop and tokens else ""
        return any(word in text for word in stop)

    runtime.generate_picked(prompt, new_tokens, greedy)
    ended = len(tokens) < new_tokens or met()
    return Continued(tokens=len(tokens), ended=ended, text=runtime.decode(tokens) if tokens else "")
