"""Prompts with schemas: those that ship with Assay, and files of people's own."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from assay.errors import RecipeError, UsageError
from assay.recipe import Structured
from assay_evals.structured.items import items_digest, load_items, prompt_tokens
from assay_evals.structured.outputs import expectation_fault, judged, schema_fault

GOOD: dict[str, Any] = {"prompt": "a", "schema": {"type": "object"}, "expected": {"a": 1}}


def settings(**parts: Any) -> Structured:
    return Structured.model_validate_json(json.dumps(parts))


def write(path: Path, *rows: Any) -> None:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")


def test_what_ships_is_sound_and_varied() -> None:
    items = load_items(settings(samples=50), Path())
    assert len({item.name for item in items}) == 50
    for item in items:
        assert schema_fault(item.schema) is None
        # Whole, not some of its properties: the examples in the prompts teach whole ones.
        assert judged(json.dumps(item.expected), item.schema, item.expected, ordered=True).correct
        assert expectation_fault(item.schema, item.expected) is None
        *_, question = item.prompt
        assert isinstance(question, dict) and question["role"] == "user"
    examples = {turn["content"] for item in items for turn in item.prompt[:-1] if isinstance(turn, dict)}
    assert not examples & {item.prompt[-1]["content"] for item in items if isinstance(item.prompt[-1], dict)}


def test_fewer_of_what_ships_are_as_varied() -> None:
    kinds = Counter(item.name.partition("-")[0] for item in load_items(settings(samples=20), Path()))
    assert set(kinds.values()) == {2} and len(kinds) == 10


def test_a_chat_ends_where_the_answer_begins(tiny_model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    item = load_items(settings(samples=2), Path())[0]
    assert tokenizer.decode(prompt_tokens(item, tokenizer)).endswith(f"{item.prompt[-1]['content']}\n[assistant] ")
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="holds chat messages, but the model has no chat template"):
        prompt_tokens(item, tokenizer)


def test_a_file_gives_its_first_items_by_the_fields_that_the_recipe_names(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    rows = [{"ask": "a", "form": {"type": "array"}}, {"ask": chat, "form": {}, "right": [1]}, {"ask": "c", "form": {}}]
    write(tmp_path / "own.jsonl", *rows)
    source = {
        "source": "jsonl",
        "path": "own.jsonl",
        "prompt_field": "ask",
        "schema_field": "form",
        "expected_field": "right",
    }
    items = load_items(settings(items=source, samples=2), tmp_path)
    assert [(one.name, one.prompt, one.expected) for one in items] == [
        ("own.jsonl:1", "a", None),
        ("own.jsonl:2", chat, [1]),
    ]
    assert items_digest(items) != items_digest(items[::-1])
    with pytest.raises(UsageError, match=r"own\.jsonl has 3 items; the recipe asks for 4\. Lower samples"):
        load_items(settings(items=source, samples=4), tmp_path)


def test_every_wrong_line_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    write(
        tmp_path / "own.jsonl",
        GOOD,
        {"prompt": "a"},
        GOOD | {"schema": {"type": "object", "properties": 3}},
        "",
        GOOD | {"expected": [1]},
        GOOD | {"prompt": ["a"]},
        "[1]",
        GOOD | {"prompt": ""},
    )
    with pytest.raises(RecipeError) as caught:
        load_items(settings(items={"source": "jsonl", "path": "own.jsonl"}, samples=2), tmp_path)
    place = f"{tmp_path}/own.jsonl"
    assert str(caught.value).split("\n") == [
        f"{place}:2: there is no field 'schema'; the line has: prompt.",
        f"{place}:3: 'schema' is no JSON Schema: at $.properties, 3 is not of type 'object'.",
        f"{place}:5: 'expected' is not valid by its own schema: at $, [1] is not of type 'object'.",
        f"{place}:6: 'prompt' must be a text, or a list of chat messages whose role and content are texts.",
        f"{place}:7: there is no field 'prompt'; the line has: no object.",
        f"{place}:8: 'prompt' is empty.",
    ]
    write(tmp_path / "own.jsonl", GOOD, "{")
    with pytest.raises(UsageError, match=r"own\.jsonl:2: not valid JSON"):
        load_items(settings(items={"source": "jsonl", "path": "own.jsonl"}, samples=2), tmp_path)
