"""What an output is worth, and which schemas can be worked with."""

from __future__ import annotations

from typing import Any

import pytest

from assay_evals.structured.outputs import Judged, agrees, expectation_fault, judged, schema_fault

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
RIGHT = {"name": "Ada", "age": 36}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"name": "Ada", "age": 36}', Judged(True, True, True)),
        ('\n {"age": 36.0, "name": " Ada "} ', Judged(True, True, True)),
        ('{"name": "Ada", "age": 37}', Judged(True, True, False)),
        ('{"name": "Ada"}', Judged(True, False, False)),
        ('{"name": "Ada", "age": 36, "city": "London"}', Judged(True, False, False)),
        ('```json\n{"name": "Ada", "age": 36}\n```', Judged(False, False, False)),
        ('{"name": "Ada", "age": 36} I hope this helps!', Judged(False, False, False)),
        ('{"name": "Ada", "age": NaN}', Judged(False, False, False)),
        ("[" * 100_000, Judged(False, False, False)),
        ("", Judged(False, False, False)),
    ],
)
def test_only_json_is_valid_and_only_what_is_valid_is_correct(text: str, found: Judged) -> None:
    assert judged(text, SCHEMA, RIGHT, ordered=True) == found


def test_where_nothing_is_expected_nobody_knows_what_is_correct() -> None:
    assert judged('{"name": "Ada", "age": 1}', SCHEMA, None, ordered=True) == Judged(True, True, None)
    assert judged("no", SCHEMA, None, ordered=True) == Judged(False, False, None)


@pytest.mark.parametrize(
    ("found", "expected", "agree"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"b": 2}, {"a": None}, False),
        ({"a": {"b": "x", "c": 0}}, {"a": {"b": "x"}}, True),
        (3.0, 3, True),
        (True, 1, False),
        (0, False, False),
        ("3", 3, False),
        ("Ada", "ada", False),
        ([1, 2], [2, 1], False),
        ([1, 2, 3], [1, 2], False),
        (None, None, True),
        ({"0": 1}, [1], False),
    ],
)
def test_what_is_expected_is_there(found: Any, expected: Any, agree: bool) -> None:
    assert agrees(found, expected, ordered=True) is agree


def test_without_order_each_expected_item_has_a_found_one_of_its_own() -> None:
    assert agrees([1, 2, 2], [2, 1, 2], ordered=False)
    assert not agrees([1, 1, 2], [2, 1, 2], ordered=False)
    # The first found item fits both expected ones, and only it fits the second: whoever takes it first must give it up.
    assert agrees([{"a": 1, "b": 2}, {"a": 1}], [{"a": 1}, {"a": 1, "b": 2}], ordered=False)
    assert not agrees([{"a": 1}, {"a": 1}], [{"a": 1}, {"a": 1, "b": 2}], ordered=False)


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (SCHEMA, None),
        ({}, None),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {}}, "$ref": "#/definitions/a"},
            None,
        ),
        ({"$id": "https://example.org/root", "$defs": {"a": {"$anchor": "here"}}, "$ref": "#here"}, None),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, None),
        ({"properties": {"$ref": {"type": "string"}}}, None),
        ([], "must be an object"),
        ({"type": "text"}, "is no JSON Schema: at $.type, 'text' is not valid under any of the given schemas"),
        ({"$schema": "urn:mine"}, "names a dialect that jsonschema does not know, 'urn:mine'"),
        ({"items": {"$ref": "https://example.org/a"}}, "refers to 'https://example.org/a', which is not in it"),
        ({"$ref": "#/$defs/gone"}, "refers to '#/$defs/gone', which is not in it"),
    ],
)
def test_a_schema_that_cannot_be_worked_with_is_told(schema: Any, fault: str | None) -> None:
    found = schema_fault(schema)
    assert found is None if fault is None else found is not None and found.startswith(fault)


def test_the_dialect_that_a_schema_names_is_its_own() -> None:
    """An array of `items` gives each position its schema in draft 7; 2020-12 has prefixItems for that."""
    old = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "integer"}]}
    new = {"prefixItems": [{"type": "integer"}]}
    for schema in (old, new):
        assert schema_fault(schema) is None
        assert [judged(text, schema, None, ordered=True).valid for text in ("[1]", '["a"]')] == [True, False]
    assert schema_fault({"items": [{"type": "integer"}]}) is not None


def test_what_is_expected_may_leave_out_properties_and_not_contradict() -> None:
    assert expectation_fault(SCHEMA, {"name": "Ada"}) is None
    assert expectation_fault(SCHEMA, {"age": "36"}) == "at $.age, '36' is not of type 'integer'"
    assert expectation_fault(SCHEMA, {"city": "London"}) is not None
    either = {"anyOf": [SCHEMA, {"type": "object", "required": ["id"], "properties": {"id": {"type": "integer"}}}]}
    assert expectation_fault(either, {"name": "Ada"}) is None
    assert expectation_fault(either, 3) is not None
