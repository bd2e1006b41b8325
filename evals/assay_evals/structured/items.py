"""What structured output is asked for: prompts with a JSON Schema each and, where known, what is right.

`extraction` ships with Assay: short notes of ten kinds (integers, decimals, truth values, choices, nested objects, arrays), each asked for
after two examples of its kind.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.calibration import rendered
from assay.errors import Problem, RecipeError, UsageError
from assay.files import canonical_json, sha256_bytes
from assay.recipe import Extraction, Structured, StructuredJsonLines
from assay.text import Document, Messages, contents, field_of, json_rows
from assay_evals.structured.outputs import expectation_fault, schema_fault

_EXTRACTION = Path(__file__).parent / "extraction.jsonl"
_MOST_PROBLEMS = 50


@dataclass(frozen=True)
class Item:
    """A prompt, the schema of what is to be written after it, and what is right; None where that is not known."""

    name: str
    prompt: str | Messages
    schema: dict[str, Any]
    expected: Any


def load_items(settings: Structured, base: Path) -> list[Item]:
    """The first items of a source, as many as are declared; RecipeError names every line that is wrong.

    base: the directory that relative paths start from.
    """
    if isinstance(settings.items, Extraction):
        items, source = _extraction(), "extraction"
    else:
        items, source = _json_lines(settings.items, base), settings.items.path
    if len(items) < settings.samples:
        raise UsageError(
            f"evaluate.structured: {source} has {len(items):,} items; the recipe asks for {settings.samples:,}. Lower samples, or give "
            "more items."
        )
    return items[: settings.samples]


def items_digest(items: list[Item]) -> str:
    """Digest of all that is asked, in order."""
    return sha256_bytes(canonical_json([[one.name, one.prompt, one.schema, one.expected] for one in items]))


def prompt_tokens(item: Item, tokenizer: Any) -> list[int]:
    """Token ids up to where the model's answer begins; chat messages pass through its template."""
    text = rendered(Document(item.name, item.prompt), tokenizer, answering=True)
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _json_lines(source: StructuredJsonLines, base: Path) -> list[Item]:
    path, problems, items = base / source.path, list[Problem](), list[Item]()
    for place, row in json_rows(path):
        number = int(place.rpartition(":")[2])
        try:
            items.append(_item(f"{path.name}:{number}", row, source, place))
        except UsageError as error:
            problems.append(Problem(str(path), number, str(error).removeprefix(f"{place}: ")))
    if problems:
        raise RecipeError(problems[:_MOST_PROBLEMS])
    return items


def _item(name: str, row: Any, source: StructuredJsonLines, place: str) -> Item:
    prompt = contents(field_of(row, source.prompt_field, place), place, source.prompt_field)
    schema, expected = field_of(row, source.schema_field, place), row.get(source.expected_field)
    if not prompt:
        raise UsageError(f"{place}: {source.prompt_field!r} is empty.")
    if (fault := schema_fault(schema)) is not None:
        raise UsageError(f"{place}: {source.schema_field!r} {fault}.")
    if expected is not None and (fault := expectation_fault(schema, expected)) is not None:
        raise UsageError(f"{place}: {source.expected_field!r} is not valid by its own schema: {fault}.")
    return Item(name, prompt, schema, expected)


def _extraction() -> list[Item]:
    """The first note of every kind, then the second of each, so that fewer of them are as varied."""
    kinds = [json.loads(line) for line in _EXTRACTION.read_text(encoding="utf-8").splitlines()]
    turns = [(index, kind, note) for kind in kinds for index, note in enumerate(kind["notes"], start=1)]
    return [
        Item(f"{kind['kind']}-{index}", _chat(kind["examples"], note["note"]), kind["schema"], note["answer"])
        for index, kind, note in sorted(turns, key=lambda turn: turn[0])
    ]


def _chat(examples: list[dict[str, Any]], note: str) -> Messages:
    asked = [example["note"] for example in examples] + [note]
    questions = [f"Note: {text}" for text in asked]
    questions[0] = f"Give the facts of each note as JSON.\n{questions[0]}"
    answers = [json.dumps(example["answer"]) for example in examples]
    turns: Messages = []
    for index, question in enumerate(questions):
        turns.append({"role": "user", "content": question})
        if index < len(answers):
            turns.append({"role": "assistant", "content": answers[index]})
    return turns
