"""What the requests say: windows of Python's documentation, each another one, or the lines of a file.

No two windows start at the same word but by chance, and requests are numbered through all levels and warm-ups, so that a server's prefix cache
has nothing to give. A file's prompts come round again when there are more requests than lines.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from assay.errors import UsageError
from assay.recipe import JsonLines
from assay.text import load_documents, python_docs
from assay_evals.load.wire import Api, Prompt

CHARACTERS_PER_TOKEN = 4.0
PromptOf = Callable[[int], Prompt]


def documentation_prompts(characters: int, seed: int) -> PromptOf:
    """For each number a window of about so many characters of Python's documentation: whole words, and at least one."""
    text = " ".join(" ".join(str(document.content) for document in python_docs("evaluation")).split()) + " "
    ring = text * (characters // len(text) + 2)

    def prompt(number: int) -> str:
        place = random.Random(f"{seed}/{number}").randrange(len(text))
        start = ring.index(" ", place) + 1
        return ring[start : ring.index(" ", start + characters - 1)]

    return prompt


def file_prompts(path: Path, field: str, api: Api) -> list[Prompt]:
    """The texts or chat messages in one field of a JSONL file; UsageError names the line that has none."""
    documents = load_documents(JsonLines(source="jsonl", path=str(path), field=field), "evaluation", Path())
    for document in documents:
        if api == "completions" and not isinstance(document.content, str):
            raise UsageError(f"{path.parent / document.name}: chat messages need --api chat.")
    return [document.content for document in documents]
