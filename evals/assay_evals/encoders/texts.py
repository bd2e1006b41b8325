"""What an encoder is evaluated on: texts between its special tokens, and queries taken out of passages.

A query is the beginning of a text and its passage is the rest, so that no query stands in the passage that is to be found (the inverse
cloze task: Lee et al. 2019, "Latent retrieval for weakly supervised open domain question answering").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from assay.calibration import encode, frame_of
from assay.errors import UsageError
from assay.recipe import ClassAccuracyMetric, ClassMetric, Evaluate, RetrievalMetric
from assay.text import Document

# How many texts every text is compared with, where similarities are: the first ones, of different documents as far as there are.
COMPARED = 32
_FEWEST_TOKENS = 8


@dataclass(frozen=True)
class EncoderText:
    """A stretch of a document: its token ids, special ones included, and its text.  tag: of its document."""

    document: str
    window: int
    tokens: tuple[int, ...]
    text: str
    tag: str | None

    @property
    def name(self) -> str:
        return f"{self.document}#{self.window}"


@dataclass(frozen=True)
class Query:
    """The beginning of a text, and the passage that the rest of it is."""

    query: EncoderText
    passage: EncoderText


def texts_wanted(evaluate: Evaluate) -> int:
    """How many texts the recipe's metrics of texts need; 0 where there are none."""
    return max((getattr(metric, "texts", 0) for metric in evaluate.quality), default=0)


def queries_wanted(evaluate: Evaluate) -> tuple[int, int]:
    """How many queries, and of how many tokens."""
    metrics = [metric for metric in evaluate.quality if isinstance(metric, RetrievalMetric)]
    return max((one.queries for one in metrics), default=0), max((one.query_tokens for one in metrics), default=0)


def classifies(evaluate: Evaluate) -> bool:
    """Whether the recipe measures classes."""
    return any(isinstance(metric, ClassMetric) for metric in evaluate.quality)


def label_field(evaluate: Evaluate) -> str | None:
    """The field of a row that names its class, where accuracy is measured."""
    return next((metric.label for metric in evaluate.quality if isinstance(metric, ClassAccuracyMetric)), None)


def select_texts(documents: list[Document], tokenizer: Any, evaluate: Evaluate) -> list[EncoderText]:
    """As many texts as are declared, the first of every document before the second of any; UsageError when there are too few.

    A classifier reads each document once, from its beginning.
    """
    wanted, once = texts_wanted(evaluate), classifies(evaluate)
    found = [text for text in _rounds(documents, tokenizer, evaluate.length) if not (once and text.window)][:wanted]
    if len(found) < wanted:
        raise UsageError(
            f"the evaluation text gives {len(found)} texts of up to {evaluate.length} tokens; the recipe declares {wanted}. "
            "Lower evaluate.quality's texts or evaluate.length, or give more text."
        )
    return found


def select_queries(documents: list[Document], tokenizer: Any, evaluate: Evaluate) -> list[Query]:
    """As many queries as are declared, each with its passage; UsageError when there are too few."""
    wanted, length = queries_wanted(evaluate)
    before, after = frame_of(tokenizer)
    found: list[Query] = []
    for text in _rounds(documents, tokenizer, evaluate.length) if wanted else ():
        if len(found) == wanted:
            break
        inner = text.tokens[len(before) : len(text.tokens) - len(after)]
        if len(inner) < 2 * length:
            continue
        parts = [
            EncoderText(text.document, text.window, (*before, *ids, *after), tokenizer.decode(ids), text.tag)
            for ids in (inner[:length], inner[length:])
        ]
        found.append(Query(*parts))
    if len(found) < wanted:
        raise UsageError(
            f"the evaluation text gives {len(found)} texts of at least {2 * length} tokens; retrieval asks for {wanted} queries. "
            "Lower queries, query_tokens or evaluate.length, or give more text."
        )
    return found


def _rounds(documents: list[Document], tokenizer: Any, length: int) -> list[EncoderText]:
    """Every text of up to `length` tokens, special ones included, round by round; a rest of fewer than 8 tokens is left out."""
    before, after = frame_of(tokenizer)
    inner = length - len(before) - len(after)
    found: list[EncoderText] = []
    for document in documents:
        tokens = encode(document, tokenizer)
        for number, start in enumerate(range(0, len(tokens), inner)):
            ids = tokens[start : start + inner]
            if number and len(ids) < _FEWEST_TOKENS:
                continue
            shown = tokenizer.decode(ids)
            found.append(EncoderText(document.name, number, (*before, *ids, *after), shown, document.tag))
    return sorted(found, key=lambda text: (text.window, text.document))
