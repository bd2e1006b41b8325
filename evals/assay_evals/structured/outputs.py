"""What an output is worth: whether it is JSON, whether it follows its schema, and whether it says what is right.

The whole output counts, without white space around it: a fence or a sentence beside the JSON is what a program cannot read.
Validity is jsonschema's, by the dialect that `$schema` names, 2020-12 where it names none; formats are not checked, as is its default.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

# Stands for the validator of a dialect that there is none for.
_UNKNOWN: Any = object()
_ABSENCE = ("required", "minProperties", "dependentRequired", "dependencies")


@dataclass(frozen=True)
class Judged:
    """Each follows from the one before: only JSON is valid, and only what is valid is correct.  correct: None where nobody knows."""

    parsed: bool
    valid: bool
    correct: bool | None


def judged(text: str, schema: dict[str, Any], expected: Any, *, ordered: bool) -> Judged:
    """An output against its schema, and against what is expected of it (None: nothing is)."""
    unknown = None if expected is None else False
    try:
        found = parse(text)
    except (ValueError, RecursionError):
        return Judged(False, False, unknown)
    if not validator(schema).is_valid(found):
        return Judged(True, False, unknown)
    return Judged(True, True, None if expected is None else agrees(found, expected, ordered=ordered))


def parse(text: str) -> Any:
    """The JSON value that a text is; ValueError for anything else, NaN and Infinity too, which Python would take."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def agrees(found: Any, expected: Any, *, ordered: bool) -> bool:
    """Whether what is expected is there: of objects each expected property, numbers by value, strings without space around them.

    ordered: whether the items of an array have to be in the order of the expected ones. There are as many in any case.
    """
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(
            name in found and agrees(found[name], value, ordered=ordered) for name, value in expected.items()
        )
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return False
        if ordered:
            return all(agrees(one, other, ordered=True) for one, other in zip(found, expected, strict=True))
        return _matched(found, expected)
    if isinstance(expected, str):
        return isinstance(found, str) and found.strip() == expected.strip()
    # A boolean is a number to Python.
    return isinstance(found, bool) == isinstance(expected, bool) and found == expected


def _matched(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    """Whether each expected item has a found one of its own: augmenting paths (Kuhn 1955), since one may fit several."""
    fits = [[agrees(one, wanted, ordered=False) for one in found] for wanted in expected]
    holder: dict[int, int] = {}

    def place(wanted: int, tried: set[int]) -> bool:
        for index, fitting in enumerate(fits[wanted]):
            if fitting and index not in tried:
                tried.add(index)
                if index not in holder or place(holder[index], tried):
                    holder[index] = wanted
                    return True
        return False

    return all(place(wanted, set()) for wanted in range(len(expected)))


def validator(schema: dict[str, Any]) -> Any:
    """jsonschema's validator of a schema that has no faults; it fetches nothing."""
    kind: Any = validator_for(schema, default=Draft202012Validator)
    return kind(schema, registry=REGISTRY)


def schema_fault(schema: Any) -> str | None:
    """Why something is no JSON Schema that can be worked with, as the end of a sentence; None for one that is."""
    if not isinstance(schema, dict):
        return "must be an object"
    known: Any = validator_for(schema, default=_UNKNOWN)
    if "$schema" in schema and known is _UNKNOWN:
        return f"names a dialect that jsonschema does not know, {schema['$schema']!r}"
    try:
        type(validator(schema)).check_schema(schema)
    except SchemaError as error:
        return f"is no JSON Schema: at {error.json_path}, {error.message}"
    return _reference_fault(schema)


def _reference_fault(schema: dict[str, Any]) -> str | None:
    resource = Resource.from_contents(schema, default_specification=DRAFT202012)
    name = resource.id() or ""
    resolver = REGISTRY.with_resource(name, resource).crawl().resolver(name)
    for reference in _references(schema):
        try:
            resolver.lookup(reference)
        except Unresolvable:
            return f"refers to {reference!r}, which is not in it; nothing is fetched, so put it under $defs"
    return None


def _references(value: Any) -> list[str]:
    if isinstance(value, list):
        return [reference for item in value for reference in _references(item)]
    if not isinstance(value, dict):
        return []
    own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
    return own + [reference for item in value.values() for reference in _references(item)]


def expectation_fault(schema: dict[str, Any], expected: Any) -> str | None:
    """Why what is expected could never be right by its own schema; None where it could. Properties may be left out of it."""
    errors = validator(schema).iter_errors(expected)
    wrong = next((error for error in errors if not _only_absent(error)), None)
    return None if wrong is None else f"at {wrong.json_path}, {wrong.message}"


def _only_absent(error: ValidationError) -> bool:
    return error.validator in _ABSENCE or any(_only_absent(part) for part in error.context or ())
