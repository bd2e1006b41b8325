"""Measure quality: both artifacts read the same windows on their own runtime, one window after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from assay.progress import Progress
from assay_evals.evidence import Answer, Cloze, Continuation, Continued, Window
from assay_evals.quality.divergence import divergence
from assay_evals.quality.passages import Passage, Prompt, Question
from assay_evals.runtimes.base import Runtime

_PROMPT_CHARACTERS = 160


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


def measure_continuations(
    baseline: Runtime, candidate: Runtime, prompts: Sequence[Prompt], progress: Progress
) -> Iterator[Continuation]:
    """Yield what both arms make of each prompt, token by token on their own paths: what forced text hides shows here."""
    if not prompts:
        return
    with progress.stage("measure continuations", len(prompts)) as advance:
        for prompt in prompts:
            found = [
                runtime.generate(list(prompt.tokens), prompt.new_tokens, stops=True).tokens
                for runtime in (baseline, candidate)
            ]
            pairs = zip(*found, strict=False)
            same = next((index for index, pair in enumerate(pairs) if pair[0] != pair[1]), min(map(len, found)))
            before, after = (
                Continued(tokens=len(tokens), ended=len(tokens) < prompt.new_tokens, text=_text(runtime, tokens))
                for runtime, tokens in zip((baseline, candidate), found, strict=True)
            )
            yield Continuation(
                document=prompt.document,
                window=prompt.window,
                prompt_tokens=len(prompt.tokens),
                new_tokens=prompt.new_tokens,
                prompt=_text(baseline, prompt.tokens)[-_PROMPT_CHARACTERS:],
                same=same,
                together=_text(baseline, found[0][:same]),
                baseline=before,
                candidate=after,
            )
            advance()


def _text(runtime: Runtime, tokens: Sequence[int]) -> str:
    return runtime.decode(list(tokens)) if tokens else ""


def _answer(runtime: Runtime, guesses: NDArray[np.int64], passage: Passage, question: Question) -> Answer:
    """Greedy completion of the word: each of its tokens must be the most likely one after those before it."""
    wanted = list(passage.tokens[question.start : question.stop])
    guessed = [int(token) for token in guesses[question.start - 1 : question.stop - 1]]
    wrong = next((index for index, pair in enumerate(zip(wanted, guessed, strict=True)) if pair[0] != pair[1]), None)
    shown = guessed if wrong is None else guessed[: wrong + 1]
    return Answer(correct=wrong is None, answer=runtime.decode(shown).strip())
