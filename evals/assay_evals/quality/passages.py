"""What quality is measured on: windows of the evaluation documents, and the cloze questions that lie in them.

A window is a run of tokens of one document; a forward pass over it scores every position at once. Each clause or sentence that ends
inside a window makes a passage, from the window's beginning to that last word before the punctuation, and the word is the cloze
question. One pass thus serves the divergence and all the questions of its window.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from assay.calibration import encode
from assay.errors import UsageError
from assay.recipe import ClozeAccuracyMetric, Evaluate, GreedyAgreementMetric
from assay.text import Document

_LAST_WORD = re.compile(r"(?<=\s)[A-Za-z][A-Za-z-]+(?=[.!?,;:](?:\s|$))")
_FEWEST_WORDS_BEFORE = 8
_CONTEXT_CHARACTERS = 160


@dataclass(frozen=True)
class Question:
    """The last word of a passage: its tokens stand at positions start … stop − 1 of the window."""

    start: int
    stop: int
    word: str
    context: str


@dataclass(frozen=True)
class Passage:
    """One window: the document and its running number, token ids, and the questions in it."""

    document: str
    window: int
    tokens: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Prompt:
    """The beginning of a window, and how many tokens are asked for after it."""

    document: str
    window: int
    tokens: tuple[int, ...]
    new_tokens: int


def select_passages(documents: list[Document], tokenizer: Any, evaluate: Evaluate) -> list[Passage]:
    """Enough windows for the declared tokens and questions, from as many documents as possible.

    Windows are taken round by round, the first of every document before the second of any. UsageError when the text is too
    short for what the recipe declares.
    """
    rounds: list[Passage] = sorted(
        (passage for document in documents for passage in cut(document, tokenizer, evaluate.length)),
        key=lambda passage: (passage.window, passage.document),
    )
    tokens = max((getattr(metric, "tokens", 0) for metric in evaluate.quality), default=0)
    questions = max(
        (metric.samples for metric in evaluate.quality if isinstance(metric, ClozeAccuracyMetric)), default=0
    )
    chosen: list[Passage] = []
    scored = asked = 0
    for passage in rounds:
        if scored >= tokens and asked >= questions:
            break
        chosen.append(passage)
        scored += len(passage.tokens) - 1
        asked += len(passage.questions)
    if scored < tokens or asked < questions:
        raise UsageError(
            f"the evaluation text gives {scored} scored tokens and {asked} cloze questions; the recipe declares {tokens} and "
            f"{questions}. Lower evaluate.quality's tokens or samples, or give more text."
        )
    return chosen


def select_prompts(passages: list[Passage], evaluate: Evaluate) -> list[Prompt]:
    """The beginnings of the first windows that are long enough, as many as are declared; UsageError when there are fewer."""
    metric = next((one for one in evaluate.quality if isinstance(one, GreedyAgreementMetric)), None)
    if metric is None:
        return []
    length = metric.prompt_tokens
    long_enough = [passage for passage in passages if len(passage.tokens) >= length]
    if len(long_enough) < metric.prompts:
        raise UsageError(
            f"the evaluation text gives {len(long_enough)} windows of at least {length} tokens; greedy_agreement asks for "
            f"{metric.prompts} prompts. Lower prompts or prompt_tokens, or raise another metric's tokens or samples."
        )
    return [
        Prompt(passage.document, passage.window, passage.tokens[:length], metric.new_tokens)
        for passage in long_enough[: metric.prompts]
    ]


def cut(document: Document, tokenizer: Any, length: int) -> list[Passage]:
    """The windows of one document; a rest of fewer than 8 tokens is left out."""
    if not isinstance(document.content, str):
        tokens = encode(document, tokenizer)
        spans: list[tuple[int, int]] = []
    else:
        encoded = tokenizer(document.content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, spans = encoded.input_ids, encoded.offset_mapping
    passages: list[Passage] = []
    for number, start in enumerate(range(0, len(tokens), length)):
        window = tokens[start : start + length]
        if len(window) < 8:
            continue
        questions: tuple[Question, ...] = ()
        if isinstance(document.content, str):
            questions = tuple(_questions(document.content, spans[start : start + length]))
        passages.append(Passage(document.name, number, tuple(window), questions))
    return passages


def _questions(text: str, spans: list[tuple[int, int]]) -> list[Question]:
    """Last words of clauses whose tokens lie inside the window; spans: character range of each of its tokens."""
    first = spans[0][0]
    begins = {_skip_space(text, begin, end): index for index, (begin, end) in enumerate(spans)}
    ends = {end: index for index, (_, end) in enumerate(spans)}
    found: list[Question] = []
    # Searched in the whole text: a window that ends within "os.path" ends no sentence there.
    for match in _LAST_WORD.finditer(text, first):
        if match.end() >= spans[-1][1]:
            break
        start, last = begins.get(match.start()), ends.get(match.end())
        before = text[first : match.start()]
        if start is None or last is None or not 0 < start <= last or len(before.split()) < _FEWEST_WORDS_BEFORE:
            continue
        context = " ".join(before[-_CONTEXT_CHARACTERS:].split())
        found.append(Question(start, last + 1, match.group(), context))
    return found


def _skip_space(text: str, begin: int, end: int) -> int:
    """Where a token's first visible character is; byte-level tokens carry the space before them."""
    while begin < end and text[begin].isspace():
        begin += 1
    return begin
