"""Names of modules as llm-compressor gives them, and as globs of a recipe's overrides.

There, "re:…" is a regular expression that has to match from the beginning of a name, anything else a whole name or the name of a class.
The expressions that recipes hold are simple, and only those are read: letters, `.`, `.*`, `[…]`, `\\d`, alternatives in brackets, `$`. An
expression is never run unless it was read, so that none can take for ever.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

_EXPRESSION = "re:"
_MOST_CHARACTERS, _MOST_WILDCARDS, _MOST_GLOBS = 200, 3, 64
_SPECIAL = set("*?[")
_CLASS = re.compile(r"\[(\^?)([A-Za-z0-9_-]+)\]")


class UnreadableError(Exception):
    """What of an expression is not read, in words."""


def is_expression(target: str) -> bool:
    return target.startswith(_EXPRESSION)


def matches(target: str, names: Iterable[str]) -> bool:
    """Whether a target means a module, by one of its names. The target is one that `globs` reads."""
    if is_expression(target):
        expression = re.compile(target.removeprefix(_EXPRESSION))
        return any(expression.match(name) for name in names)
    return target in names


def globs(target: str) -> tuple[str, ...]:
    """The globs that mean what a target does, up to `+`, which a glob can only take for `*`; UnreadableError where there are none."""
    if not is_expression(target):
        return ("".join(map(_literal, target)),)
    expression = target.removeprefix(_EXPRESSION)
    if len(expression) > _MOST_CHARACTERS:
        raise UnreadableError(f"it is longer than {_MOST_CHARACTERS} characters")
    found = [_joined(alternative) for alternative in _alternatives(expression)]
    if len(found) > _MOST_GLOBS:
        raise UnreadableError(f"it has more than {_MOST_GLOBS} alternatives")
    if any(glob.count("*") > _MOST_WILDCARDS + 1 for glob in found):
        raise UnreadableError(f"it has more than {_MOST_WILDCARDS} wildcards")
    return tuple(dict.fromkeys(found))


def _alternatives(expression: str) -> list[str]:
    """What an expression is without its alternatives, each written out."""
    parts: list[list[str]] = [[""]]
    whole: list[str] = []
    position = 0
    while position < len(expression):
        character = expression[position]
        if character == "(":
            end = expression.find(")", position)
            inner = expression[position + 1 : end].removeprefix("?:")
            if (
                end < 0
                or re.search(r"[(?*+{]", inner.replace(".*", ""))
                or expression[end + 1 : end + 2] in tuple("?*+{")
            ):
                raise UnreadableError("brackets are read where they hold plain alternatives, as in (q|k|v)_proj")
            parts.append(inner.split("|"))
            position = end + 1
        elif character == "|":
            whole += _products(parts)
            parts, position = [[""]], position + 1
        else:
            width = _width(expression, position)
            parts.append([expression[position : position + width]])
            position += width
    whole += _products(parts)
    return whole


def _products(parts: list[list[str]]) -> list[str]:
    size = 1
    for part in parts:
        size *= len(part)
        if size > _MOST_GLOBS:
            raise UnreadableError(f"it has more than {_MOST_GLOBS} alternatives")
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _width(expression: str, position: int) -> int:
    """How many characters one step of an expression has, its repetition left out."""
    if expression[position] == "\\":
        return 2
    if expression[position] == "[":
        found = _CLASS.match(expression, position)
        if found is None:
            raise UnreadableError("of characters in square brackets, only letters, digits, _ and ranges are read")
        return found.end() - position
    return 1


def _joined(alternative: str) -> str:
    """One alternative as a glob."""
    glob, position = "", 0
    alternative = alternative.removeprefix("^")
    while position < len(alternative):
        if alternative[position:] == "$":
            return re.sub(r"\*+", "*", glob)
        width = _width(alternative, position)
        step = alternative[position : position + width]
        position += width
        repeated = alternative[position : position + 1]
        if repeated in ("*", "+", "?", "{"):
            position += 1
            if step == "." and repeated == "*":
                glob += "*"
                continue
            if repeated != "+" or not (step in (".", "\\d") or step.startswith("[")):
                raise UnreadableError(f"{step}{repeated} cannot be said with a glob's * and ?")
            glob += f"{_one(step)}*"
            continue
        glob += _one(step)
    return re.sub(r"\*+", "*", f"{glob}*")


def _one(step: str) -> str:
    """The glob for one character."""
    if step == ".":
        return "?"
    if step == "\\d":
        return "[0-9]"
    if step.startswith("["):
        return step.replace("[^", "[!", 1)
    if step.startswith("\\"):
        if len(step) < 2 or step[1].isalnum():
            raise UnreadableError(f"{step} is not read")
        return _literal(step[1])
    if step in "$^{})]*+?":
        raise UnreadableError(f"{step} is not read there")
    return _literal(step)


def _literal(character: str) -> str:
    return f"[{character}]" if character in _SPECIAL else character
