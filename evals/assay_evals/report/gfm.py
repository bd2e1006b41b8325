"""GitHub's flavour of Markdown: tables, and HTML's `details` for what is long.

Text of models and documents is escaped: it can neither end a cell nor become a link, an image or a mention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_STEERING = re.compile(r"([\\`*_{}\[\]()#+!|~@$&])")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; nothing where there are no rows.  columns: as they are; cells are escaped."""
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(sentences: Iterable[str]) -> str:
    """A list, each on a line."""
    return "\n".join(f"- {escaped(str(sentence))}" for sentence in sentences)


def details(title: str, content: str) -> str:
    """What opens on a click; nothing where there is no content."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>" if content else ""


def escaped(text: str) -> str:
    """One line in which nothing is markup."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return _STEERING.sub(r"\\\1", printable).replace("<", "&lt;").replace(">", "&gt;")
