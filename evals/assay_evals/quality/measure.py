"""Measure quality: both artifacts read the same windows on their own runtime, one window after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from assay.progress import Progress
from assay_evals.evidence import Answer, Cloze, Window
from assay_evals.quality.divergence import divergence
from assay_evals.quality.passages import Passage, Question
from assay_evals.runtimes.base import Runtime


def measure_quality(
    baseline: Runtime, candidate: Runtime, passages: Sequence[Passage], progress: Progress
) -> Iterator[Window | Cloze]:
    """Yield the evidence of each window: its divergence, and an answer of both arms to each of its questions."""
    with progress.stage("measure quality", len(passages)) as advance:
        for passage in passages:
            tokens = list(passage.tokens)
            before, after = baseline.logits(tokens), candidate.logits(tokens)
            found = divergence(before, after, passage.tokens)
            yield Window(
                document=passage.document,
                window=passage.window,
                tokens=len(found.kl),
                kl=found.kl,
                agreed=tuple(1 if agreed else 0 for agreed in found.agreed),
                nll_baseline=found.nll_baseline,
                nll_candidate=found.nll_candidate,
            )
            guesses = [before.argmax(-1), after.argmax(-1)]
            for question in passage.questions:
                answers = [_answer(baseline, guess, passage, question) for guess in guesses]
                yield Cloze(
                    document=passage.document,
                    window=passage.window,
                    position=question.start,
                    word=question.word,
                    context=question.context,
                    baseline=answers[0],
                    candidate=answers[1],
                )
            advance()


def _answer(runtime: Runtime, guesses: NDArray[np.int64], passage: Passage, question: Question) -> Answer:
    """Greedy completion of the word: each of its tokens must be the most likely one after those before it."""
    wanted = list(passage.tokens[question.start : question.stop])
    guessed = [int(token) for token in guesses[question.start - 1 : question.stop - 1]]
    wrong = next((index for index, pair in enumerate(zip(wanted, guessed, strict=True)) if pair[0] != pair[1]), None)
    shown = guessed if wrong is None else guessed[: wrong + 1]
    return Answer(correct=wrong is None, answer=runtime.decode(shown).strip())
