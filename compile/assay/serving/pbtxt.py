"""Protocol buffers' text format, as far as a Triton model configuration needs it: written from values, never by pasting text.

Source: the text format specification of Protocol Buffers (string escapes, repeated scalars in brackets).
"""

from __future__ import annotations

from collections.abc import Mapping


class Word(str):
    """A value of an enum, which stands without quotes."""

    __slots__ = ()


def write_text(message: Mapping[str, object], indent: int = 0) -> str:
    """A message, one field a line; lists become repeated fields."""
    return "".join(_field(name, value, "  " * indent) for name, value in message.items())


def _field(name: str, value: object, margin: str) -> str:
    if isinstance(value, Mapping):
        return f"{margin}{name} {{\n{write_text(value, len(margin) // 2 + 1)}{margin}}}\n"
    if isinstance(value, list | tuple):
        if all(isinstance(item, Mapping) for item in value):
            return "".join(_field(name, item, margin) for item in value)
        return f"{margin}{name}: [{', '.join(map(_scalar, value))}]\n"
    return f"{margin}{name}: {_scalar(value)}\n"


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word | int):
        return str(value)
    if isinstance(value, str):
        return f'"{"".join(map(_escaped, value))}"'
    raise TypeError(f"{value!r} has no place in a text message")


def _escaped(character: str) -> str:
    if character in '\\"':
        return "\\" + character
    if character.isprintable():
        return character
    return "".join(f"\\{byte:03o}" for byte in character.encode())
