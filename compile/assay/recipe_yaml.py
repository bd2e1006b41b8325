"""YAML as recipes use it: plain data with a line number for every value.

Deliberately less than YAML: no aliases or anchors (they can expand without limit), no tags, no duplicate keys, one
document, at most 1 MiB and 32 levels. Unquoted words follow the YAML 1.2 core schema in decimal, so `no` is a word and
`1e-3` is a number.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import Reader

from assay.errors import Problem, RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 300
Location = tuple[str | int, ...]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"[-+]?[0-9]+")
_INDEX = re.compile(r"[0-9]{1,9}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Document:
    """Parsed data and where each value of it comes from."""

    file: str
    data: dict[str, Any]
    lines: dict[Location, int]
    overrides: tuple[tuple[Location, str], ...] = ()  # what `--set` replaced, and the words it was given
    what: str = "recipe"

    def line(self, location: Location) -> int:
        """The line of a value, or of the nearest thing around it that has one."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 0)

    def problem(self, location: Location, message: str) -> Problem:
        """Something wrong with the value at a location, placed at the line or the `--set` that it came from."""
        for changed, assignment in reversed(self.overrides):
            created = location not in self.lines and changed[: len(location)] == location
            if created or location[: len(changed)] == changed:
                return Problem(f"--set {assignment}", 0, message)
        return Problem(self.file, self.line(location), message)


_BEGINS = "`version: 1`"


def read_document(path: Path, what: str = "recipe", begins: str = _BEGINS) -> Document:
    """Read one YAML mapping; RecipeError with the line of everything that is wrong.

    what: the word for such a file in messages.  begins: what such a file begins with.
    """
    file = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([Problem(file, 0, f"cannot be read: {error.strerror}.")]) from error
    if len(raw) > MAX_BYTES:
        raise RecipeError([Problem(file, 0, f"larger than 1 MiB; a {what} is a page of text. Is this the right file?")])
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError([Problem(file, line, "not UTF-8 text; save it as UTF-8.")]) from error
    return parse_document(file, text, what, begins)


def parse_document(file: str, text: str, what: str = "recipe", begins: str = _BEGINS) -> Document:
    """The same from text that is read already, or that is not in a file yet."""
    data, lines = _parse(file, text, what)
    if not isinstance(data, dict):
        raise RecipeError([Problem(file, 1, f"a {what} is a mapping that begins with {begins}.")])
    return Document(file, data, lines, what=what)


def _parse(file: str, text: str, what: str = "recipe") -> tuple[Any, dict[Location, int]]:
    """Plain data, and the line of every value in it."""
    if match := Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, match.start()) + 1
        raise RecipeError([Problem(file, line, f"the control character {match[0]!a} is not allowed.")])
    try:
        _refuse_what_is_not_plain(file, text, what)
        node = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise RecipeError([Problem(file, line, f"not valid YAML: {error.problem}.")]) from error
    builder = _Builder(file)
    data = builder.build(node, ()) if node is not None else None
    if builder.problems:
        raise RecipeError(builder.problems)
    return data, builder.lines


def _refuse_what_is_not_plain(file: str, text: str, what: str) -> None:
    """Look at the stream of events first: composing recurses once a level, and follows aliases."""
    depth = documents = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            message = "anchors and aliases are not allowed; write the value out."
        elif (tag := getattr(event, "tag", None)) is not None:
            name = tag.replace("tag:yaml.org,2002:", "!!")
            message = f"the tag {name} is not allowed; a {what} is plain data."
        elif depth > MAX_DEPTH:
            message = f"nested more than {MAX_DEPTH} levels deep."
        elif documents > 1:
            message = f"a second document begins here; a file holds one {what}. Put the other into its own file."
        else:
            continue
        raise RecipeError([Problem(file, event.start_mark.line + 1, message)])


class _Builder:
    """Turns YAML nodes into plain data, keeping lines and collecting problems."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[Location, int] = {}
        self.problems: list[Problem] = []

    def build(self, node: yaml.Node, location: Location) -> Any:
        self.lines.setdefault(location, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, location)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        return [self.build(child, (*location, index)) for index, child in enumerate(node.value)]

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, "a key must be a plain word.")
                continue
            key = key_node.value
            if Reader.NON_PRINTABLE.search(key):
                self._problem(key_node, "a control character is not allowed.")
                continue
            if key in result:
                self._problem(key_node, f"the key {key!r} is there already (line {self.lines[(*location, key)]}).")
                continue
            self.lines[(*location, key)] = key_node.start_mark.line + 1
            result[key] = self.build(value_node, (*location, key))
        return result

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if Reader.NON_PRINTABLE.search(node.value):
            self._problem(node, "a control character is not allowed.")
        value = node.value if node.style else scalar(node.value)
        if isinstance(value, float) and not math.isfinite(value):
            self._problem(node, "the number is too large.")
        return value

    def _problem(self, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(self.file, node.start_mark.line + 1, message))


def scalar(text: str) -> Any:
    """One unquoted word by the YAML 1.2 core schema in decimal: null, true, false, integer, float or string."""
    if text in _NULLS:
        return None
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text) and len(text) < MAX_DIGITS:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def apply_overrides(document: Document, assignments: tuple[str, ...]) -> Document:
    """A copy with `--set a.b=value` applied; numbers index lists, values are YAML (`[1, 2]`, `{a: b}`)."""
    data = copy.deepcopy(document.data)
    overrides: list[tuple[Location, str]] = []
    problems: list[Problem] = []
    for assignment in assignments:
        shown = assignment.encode(errors="backslashreplace").decode()
        try:
            overrides.append((_assign(data, assignment), shown))
        except RecipeError as error:
            problems += [Problem(f"--set {shown}", 0, problem.message) for problem in error.problems]
    if problems:
        raise RecipeError(problems)
    return replace(document, data=data, overrides=(*document.overrides, *overrides))


def _assign(data: dict[str, Any], assignment: str) -> Location:
    """Put the value of `a.b=value` into its place in data, and return that place."""
    path, separator, text = assignment.partition("=")
    parts = path.split(".")
    if not separator or not all(parts) or len(parts) > MAX_DEPTH or Reader.NON_PRINTABLE.search(path):
        raise _unsettable("write it as key.key=value, for example calibration.samples=32.")
    value, _ = _parse(assignment, text)
    location: Location = ()
    container: Any = data
    for part in parts:
        key = _key(container, part, location)
        location = (*location, key)
        if len(location) == len(parts):
            container[key] = value
        elif isinstance(container, dict) and container.get(key) is None:
            container[key] = {}
        container = container[key]
    return location


def _key(container: Any, part: str, location: Location) -> Any:
    """One part of a path as the container's own kind of key: a word for a mapping, a number for a list."""
    name = ".".join(map(str, location))
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise _unsettable(f"{name} is {container!r}, which has nothing in it to set.")
    if not _INDEX.fullmatch(part) or int(part) >= len(container):
        raise _unsettable(f"{name} is a list of {len(container)}; write a number from 0 instead of {part!r}.")
    return int(part)


def _unsettable(message: str) -> RecipeError:
    return RecipeError([Problem("--set", 0, message)])
