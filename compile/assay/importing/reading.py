"""A foreign file that is being read: what is wrong with it, and what of it has no place in a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from assay.errors import Problem, RecipeError
from assay.recipe_yaml import Document, Location


@dataclass(frozen=True)
class Draft:
    """What a file says of a job, in the words of a recipe.

    name: what the file calls the job.  model, calibration: None where the file says nothing of them.  chosen: part of the recipe →
    why the importer had to choose it itself.  remarks: key of `quantize` → what is to be known of it.
    """

    quantize: dict[str, Any]
    target: dict[str, Any]
    name: str | None = None
    model: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    chosen: dict[str, str] = field(default_factory=dict[str, str])
    remarks: dict[str, str] = field(default_factory=dict[str, str])


class Reading:
    """Collects every problem and everything that is left out, each with its line."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.left_out: list[Problem] = []

    def refuse(self, location: Location, message: str) -> None:
        """Something that would make another artifact, or none."""
        self.problems.append(self.document.problem(location, message))

    def leave_out(self, location: Location, why: str) -> None:
        """Something that a recipe does not say."""
        self.left_out.append(self.document.problem(location, f"{_path(location)}: {why}"))

    def give_up(self) -> None:
        """RecipeError with every problem found until now, if there is one."""
        if self.problems:
            raise RecipeError(sorted(self.problems, key=lambda problem: problem.line))

    def mapping(self, value: Any, location: Location) -> dict[str, Any]:
        """The mapping at a place; {} where there is none, which is refused unless it was left empty."""
        if isinstance(value, dict):
            return value
        if value is not None:
            self.refuse(location, f"{_path(location)} is {shown(value)}; it must be a mapping.")
        return {}

    def text(self, value: Any, location: Location) -> str | None:
        if isinstance(value, str) and value:
            return value
        self.refuse(location, f"{_path(location)} is {shown(value)}; it must be a text.")
        return None

    def texts(self, value: Any, location: Location) -> list[str]:
        """A list of texts, or one text alone."""
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, str) and item for item in items):
            return items
        self.refuse(location, f"{_path(location)} is {shown(value)}; it must be a text or a list of texts.")
        return []

    def number(self, value: Any, location: Location, least: float, most: float, whole: bool = False) -> float | None:
        """A number in a range, both ends included."""
        kinds = (int,) if whole else (int, float)
        if isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most:
            return value
        kind = "a whole number" if whole else "a number"
        self.refuse(location, f"{_path(location)} is {shown(value)}; it must be {kind} from {least:g} to {most:g}.")
        return None

    def unknown(self, location: Location, allowed: Iterable[str]) -> None:
        """A key that nobody knows: a typo would change what is made."""
        words = sorted(allowed)
        near = difflib.get_close_matches(str(location[-1]), words, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        self.refuse(location, f"unknown key {shown(location[-1])}{meant}; known: {', '.join(words)}.")


def _path(location: Location) -> str:
    return ".".join(str(part) for part in location) or "the file"


def shown(value: Any) -> str:
    """A value short enough for a message, on one line."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    words = {None: "empty", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
