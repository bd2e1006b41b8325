"""What must hold before an encoder's measurement means anything: the same tokenizer everywhere, and padding that changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from assay_evals.encoders.texts import EncoderText
from assay_evals.evidence import Check
from assay_evals.quality.checks import disjoint_texts
from assay_evals.runtimes.base import EncoderRuntime
from assay_evals.validity import PADDING, TOKENIZER

_SAMPLES = 8
_MOST_CHANGE = 0.03


def same_tokens(arms: Mapping[str, EncoderRuntime], tokenizer: Any, texts: Sequence[EncoderText]) -> Check:
    """Both artifacts, as served, cut text into the tokens that the model was made with, special ones included."""
    samples = texts[:_SAMPLES]
    for text in samples:
        expected = list(tokenizer(text.text, add_special_tokens=True, verbose=False).input_ids)
        for name, arm in arms.items():
            if arm.encode(text.text) != expected:
                detail = f"the {name}'s tokenizer cuts the text {text.name!r} differently from the source model's."
                return Check(name=TOKENIZER, passed=False, detail=detail)
    return Check(name=TOKENIZER, passed=True, detail=f"the same tokens of {len(samples)} texts, special ones included.")


def unseen_texts(calibration: Iterable[Sequence[int]], texts: Iterable[EncoderText]) -> Check:
    """The texts share no longer stretch with the calibration text.

    A run of one token counts as one: WordPiece cuts a rule of dashes into a token for each, which every table has.
    """
    runs = ([token for token, _ in groupby(tokens)] for tokens in calibration)
    return disjoint_texts(runs, ([token for token, _ in groupby(text.tokens)] for text in texts))


def padding_invariance(arms: Mapping[str, EncoderRuntime], texts: Sequence[EncoderText]) -> Check:
    """Each arm makes the same of a text by itself as in a batch with a longer one, but for rounding.

    A mask that is lost in compiling does not show as long as all texts of a batch are as long as each other.
    """
    longest = max(texts, key=lambda text: len(text.tokens))
    samples = [text.tokens[: 1 + len(text.tokens) // 2] for text in texts[:_SAMPLES]]
    found: list[str] = []
    sound = True
    for name, arm in arms.items():
        alone = np.concatenate([arm.compute([tokens]) for tokens in samples])
        padded = arm.compute([*samples, longest.tokens])[: len(samples)]
        change = float(np.max(np.linalg.norm(padded - alone, axis=1) / np.linalg.norm(alone, axis=1)))
        sound = sound and change <= _MOST_CHANGE
        found.append(f"the {name}'s vectors change by {change:.2g} of their length at most")
    detail = f"Beside a longer text, {' and '.join(found)}; {_MOST_CHANGE:g} may be."
    return Check(name=PADDING, passed=sound, detail=detail)
