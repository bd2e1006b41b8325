"""What pydantic finds wrong with a recipe, as sentences: what, where, what is allowed, what was probably meant."""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from assay.errors import Problem
from assay.recipe_yaml import Document, Location

# A file that is no recipe at all has a problem in each line: more than this helps nobody.
MAX_PROBLEMS = 50


def explain(error: ValidationError, document: Document, root: type[BaseModel]) -> list[Problem]:
    """Every problem of a document that was validated as `root`, by line."""
    details = _causes(error.errors(include_url=False))[:MAX_PROBLEMS]
    return sorted((_explain(document, root, detail) for detail in details), key=lambda problem: problem.line)


def _causes(details: list[Any]) -> list[Any]:
    """Leave out "too short" where it only follows from items that are wrong themselves."""
    wrong = [detail["loc"] for detail in details if detail["type"] != "too_short"]
    return [
        detail
        for detail in details
        if detail["type"] != "too_short" or not any(place[: len(detail["loc"])] == detail["loc"] for place in wrong)
    ]


def _explain(document: Document, root: type[BaseModel], detail: Any) -> Problem:
    """One pydantic error as a sentence: what is wrong, and what is allowed."""
    location, models = _follow(root, detail["loc"])
    name = ".".join(str(part) for part in location) or f"the {document.what}"
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        _, around = _follow(root, detail["loc"][:-1])
        message = f"unknown key {_shown(location[-1])}{_choice(location[-1], _keys(around))}"
    elif kind == "missing":
        message = f"{name} is missing{_described(root, detail['loc'])}"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        word = context["discriminator"].strip("'")
        given = _shown(value[word]) if word in value else "missing"
        location = (*location, word)
        message = f"{name}.{word} is {given}{_choice(value.get(word), [str(_tag(model)) for model in models])}"
    elif kind == "literal_error":
        close = _close(value, re.findall(r"'([^']+)'", context["expected"]))
        message = f"{name} is {_shown(value)}{close}; allowed: {context['expected']}"
    elif kind == "string_pattern_mismatch":
        message = f"{name} is {_shown(value)}{_described(root, detail['loc'])}"
    elif kind in ("model_type", "dict_type"):
        message = f"{name} is {_shown(value)}; it must be a mapping with keys from: {', '.join(_keys(models))}"
    elif kind == "tuple_type":
        message = f"{name} is {_shown(value)}; it must be a list"
    elif kind == "too_short":
        message = f"{name} is empty; list at least {context['min_length']}"
    else:
        must = detail["msg"].replace("Input should be", "it must be").replace("String should", "it must")
        message = f"{name} is {_shown(value)}; {must}"
    return document.problem(location, f"{message}.")


def _shown(value: Any) -> str:
    """A value as a recipe would write it, short enough for a message."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    words = {None: "empty", True: "true", False: "false"}
    shown = words[value] if value is None or isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 80 else f"{shown[:76]} ..."


def _choice(word: Any, allowed: list[str]) -> str:
    return f"{_close(word, allowed)}; allowed: {', '.join(allowed)}"


def _close(word: Any, allowed: list[str]) -> str:
    """The allowed word that was probably meant, as part of a sentence; capitals do not matter."""
    spelled = {choice.casefold(): choice for choice in allowed}
    near = difflib.get_close_matches(str(word)[:80].casefold(), spelled, n=1)
    return f" (did you mean {spelled[near[0]]!r}?)" if near else ""


def _follow(root: type[BaseModel], location: tuple[Any, ...]) -> tuple[Location, list[type[BaseModel]]]:
    """Pydantic's location without the union tags it puts between keys, and the schema classes that may stand there."""
    models = [root]
    place: Location = ()
    named = False
    for part in location:
        if len(models) > 1 and isinstance(part, str):
            models = [model for model in models if _tag(model) == part]
            continue
        place = (*place, part)
        if named:
            # A name that the recipe gives, in a mapping from names to what is said of each.
            named = False
        elif isinstance(part, str):
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [model for field in fields for model in _models_within(field.annotation)]
            named = any(_is_mapping(field.annotation) for field in fields)
    return place, models


def _models_within(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_within(argument)]


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or any(_is_mapping(argument) for argument in get_args(annotation))


def _keys(models: list[type[BaseModel]]) -> list[str]:
    return list(dict.fromkeys(key for model in models for key in model.model_fields))


def _tag(model: type[BaseModel]) -> str | None:
    """The word by which a union tells this class from its siblings: that of its required literal with one value."""
    for field in model.model_fields.values():
        words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        if field.is_required() and len(words) == 1:
            return words[0]
    return None


def _described(root: type[BaseModel], location: tuple[Any, ...]) -> str:
    """What the schema says about the field at a pydantic location, or about the list that holds it."""
    while location and isinstance(location[-1], int):
        location = location[:-1]
    for model in _follow(root, location[:-1])[1]:
        if (field := model.model_fields.get(location[-1])) is not None and field.description:
            return f"; write {field.description}"
    return ""
