"""The items of a task: rows of a file or of a data set, checked one by one, with the place that each comes from.

Which of them are answered is fixed by the recipe: all, the first N, or N at random by a seed; where the gate may look several times, as
many more of the others at each further look, for as long as there are any.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from assay.calibration import rendered
from assay.errors import UsageError
from assay.recipe import DeclaredTask, ExactMatchTask, JsonLinesRows, MultipleChoiceTask
from assay.text import Document, Messages, contents, field_of, hub_rows, json_rows, label

Picked = TypeVar("Picked")


@dataclass(frozen=True)
class Item:
    """What all kinds of items have.  place: where it is from, as errors name it."""

    name: str
    place: str
    prompt: str | Messages
    group: str | None
    tag: str | None


def read_rows(task: MultipleChoiceTask | ExactMatchTask, base: Path, looks: int) -> list[tuple[str, Any]]:
    """The rows that are to be answered up to the last look, with their places; base: the directory that relative paths start from."""
    if isinstance(task.items, JsonLinesRows):
        rows = list(json_rows(base / task.items.path))
    else:
        rows = [(f"{task.items.name}#{index}", row) for index, row in enumerate(hub_rows(task.items))]
    if not rows:
        raise UsageError(f"the task {task.name} has no items: {source_of(task)} is empty.")
    return picked(rows, task, looks)


def source_of(task: MultipleChoiceTask | ExactMatchTask) -> str:
    """Where the items are from, as the recipe has it."""
    return task.items.path if isinstance(task.items, JsonLinesRows) else f"hf:{task.items.name}"


def sizes(samples: int | None, items: int, looks: int) -> tuple[int, ...]:
    """How many items are answered at each look: twice as many as at the one before, while there are more than that."""
    first = samples or items
    return tuple(sorted({min(first << look, items) for look in range(looks)}))


def picked(items: Sequence[Picked], task: DeclaredTask, looks: int) -> list[Picked]:
    """The declared samples, then those that each further look adds, each part in the order of the data.

    UsageError when there are fewer than were declared.
    """
    if task.samples is None:
        return list(items)
    if len(items) < task.samples:
        raise UsageError(
            f"the task {task.name} has {len(items):,} items; the recipe asks for {task.samples:,}. Lower samples, or give more items."
        )
    counts = sizes(task.samples, len(items), looks)
    if task.seed is None:
        return list(items[: counts[-1]])
    order = random.Random(task.seed).sample(range(len(items)), task.samples)
    others = sorted(set(range(len(items))) - set(order))
    order += random.Random(f"{task.seed}, further").sample(others, counts[-1] - len(order))
    parts = [sorted(order[start:stop]) for start, stop in itertools.pairwise((0, *counts))]
    return [items[index] for part in parts for index in part]


def read_items(
    task: MultipleChoiceTask | ExactMatchTask, rows: list[tuple[str, Any]], prompt: str
) -> Iterator[tuple[Item, Any]]:
    """Each row as an item, and the row.  prompt: the field that holds it.  UsageError when an id is there twice."""
    seen: dict[str, str] = {}
    for place, row in rows:
        name = place.rpartition("/")[2] if task.id is None else label(field_of(row, task.id, place), place, task.id)
        if name in seen:
            raise UsageError(f"{place}: the id {name!r} is that of {seen[name]} too; each item needs its own.")
        seen[name] = place
        value = contents(field_of(row, prompt, place), place, prompt)
        if not (value.strip() if isinstance(value, str) else value):
            raise UsageError(f"{place}: {prompt!r} is empty.")
        if not isinstance(value, str) and not task.chat:
            raise UsageError(f"{place}: {prompt!r} holds chat messages; write chat: true, or name a field with a text.")
        group, tag = (
            None if field is None else label(field_of(row, field, place), place, field)
            for field in (task.group, task.tag)
        )
        yield Item(name, place, value, group, tag), row


def prompt_text(item: Item, tokenizer: Any, *, chat: bool) -> str:
    """What the model reads: the text as it is, or through the model's template, which then has begun the model's turn."""
    if not chat:
        assert isinstance(item.prompt, str)
        return item.prompt
    messages = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
    return rendered(Document(item.place, messages), tokenizer, answering=True)
