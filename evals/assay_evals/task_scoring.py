"""What an answer is worth, from evidence alone: no model, no tokenizer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from assay.recipe import ExactMatchTask


def likeliest(log_likelihoods: Sequence[float], choices: Sequence[str], *, normalized: bool) -> int:
    """The index of the likeliest choice, the first of equals; normalized: per character (code point) of its text.

    lm-evaluation-harness's `acc` and `acc_norm` (0.4.13, api/task.py, process_results; its `acc_bytes` would count UTF-8 bytes).
    """
    lengths = [len(choice) if normalized else 1 for choice in choices]
    values = [value / length for value, length in zip(log_likelihoods, lengths, strict=True)]
    return values.index(max(values))


def answer_in(text: str, task: ExactMatchTask) -> str:
    """The answer in a generated text: up to a stop string, what `extract` finds there (nothing, if it does not), normalized."""
    answer = before_stop(text, task.stop)
    if task.extract is not None:
        found = re.search(task.extract, answer)
        answer = "" if found is None else found.group(1 if found.re.groups else 0) or ""
    return normalized(answer, task)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the stop strings in it."""
    return text[: min((found for word in stop if (found := text.find(word)) >= 0), default=len(text))]


def normalized(text: str, task: ExactMatchTask) -> str:
    """A text as it is compared: without punctuation, in one case, without white space around it, as the recipe asks."""
    if "punctuation" in task.normalize:
        # What stood on both sides of a mark stays apart, by one space.
        kept = "".join(" " if unicodedata.category(character)[0] == "P" else character for character in text)
        text = " ".join(kept.split())
    if "casefold" in task.normalize:
        text = text.casefold()
    return text.strip() if "strip" in task.normalize else text
