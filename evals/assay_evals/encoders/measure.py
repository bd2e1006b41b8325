"""Measure an encoder: both arms read the same texts on their own runtime, in batches, each with an index of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from assay.progress import Progress
from assay_evals.encoders.texts import COMPARED, EncoderText, Query
from assay_evals.evidence import ClassGiven, Classified, Embedded, Retrieved
from assay_evals.runtimes.base import EncoderRuntime

Arms = tuple[EncoderRuntime, EncoderRuntime]
Vectors = NDArray[np.float64]
_BATCH = 8
_SHOWN_CHARACTERS = 240
_DIGITS = 7


def measure_embeddings(arms: Arms, texts: Sequence[EncoderText], progress: Progress) -> Iterator[Embedded]:
    """Yield for each text how near the two embeddings are, and each arm's similarities to the first texts."""
    before, after = (unit(vectors(arm, texts, progress, "measure embeddings")) for arm in arms)
    similar = [rows @ rows[:COMPARED].T for rows in (before, after)]
    for index, text in enumerate(texts):
        others = [place for place in range(similar[0].shape[1]) if place != index]
        yield Embedded(
            document=text.document,
            window=text.window,
            tokens=len(text.tokens),
            text=text.text[:_SHOWN_CHARACTERS],
            cosine=_rounded(before[index] @ after[index]),
            baseline=tuple(_rounded(similar[0][index, place]) for place in others),
            candidate=tuple(_rounded(similar[1][index, place]) for place in others),
        )


def measure_retrieval(arms: Arms, queries: Sequence[Query], top: int, progress: Progress) -> Iterator[Retrieved]:
    """Yield for each query the passages that each arm finds nearest; of equals the first."""
    if not queries:
        return
    passages, asked = [one.passage for one in queries], [one.query for one in queries]
    nearest: list[list[tuple[str, ...]]] = []
    for arm in arms:
        index = unit(vectors(arm, passages, progress, "index passages"))
        scores = unit(vectors(arm, asked, progress, "ask for passages")) @ index.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        nearest.append([tuple(passages[place].name for place in row) for row in order])
    for number, query in enumerate(asked):
        yield Retrieved(
            document=query.document,
            window=query.window,
            tokens=len(query.tokens),
            text=query.text[:_SHOWN_CHARACTERS],
            own=query.name,
            passages=len(passages),
            baseline=nearest[0][number],
            candidate=nearest[1][number],
        )


def measure_classes(
    arms: Arms, texts: Sequence[EncoderText], labels: dict[str, str], progress: Progress
) -> Iterator[Classified]:
    """Yield the class that each arm puts a text into.  labels: the right one by document, where it is known."""
    scores = [vectors(arm, texts, progress, "measure classes") for arm in arms]
    for index, text in enumerate(texts):
        given = [_class(arm, values[index]) for arm, values in zip(arms, scores, strict=True)]
        yield Classified(
            document=text.document,
            window=text.window,
            tokens=len(text.tokens),
            text=text.text[:_SHOWN_CHARACTERS],
            classes=scores[0].shape[1],
            label=labels.get(text.document),
            baseline=given[0],
            candidate=given[1],
        )


def _class(arm: EncoderRuntime, scores: Vectors) -> ClassGiven:
    picked = int(scores.argmax())
    shares = np.exp(scores - scores.max())
    return ClassGiven(name=arm.labels[picked], share=_rounded(shares[picked] / shares.sum()))


def vectors(arm: EncoderRuntime, texts: Sequence[EncoderText], progress: Progress, what: str) -> Vectors:
    """What an arm makes of texts: float64 [len(texts), width]."""
    starts = range(0, len(texts), _BATCH)
    rows: list[NDArray[np.float32]] = []
    with progress.stage(what, len(starts)) as advance:
        for start in starts:
            rows.append(arm.compute([text.tokens for text in texts[start : start + _BATCH]]))
            advance()
    return np.concatenate(rows).astype(np.float64)


def unit(rows: Vectors) -> Vectors:
    """The same directions, each of length 1; a vector that has none stays as it is."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths == 0, 1, lengths)


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
