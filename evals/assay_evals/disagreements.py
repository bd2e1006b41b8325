"""The worst of a run, for people to read: answers that went wrong, and windows that diverged most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from assay_evals.evidence import Cloze, Continuation, Evidence, Window


@dataclass(frozen=True)
class Disagreements:
    """flips: questions that the baseline got right and the candidate wrong. windows: by falling mean divergence. continuations: that parted."""

    flips: tuple[Cloze, ...]
    continuations: tuple[Continuation, ...]
    windows: tuple[Window, ...]


def worst_disagreements(evidence: Evidence, count: int) -> Disagreements:
    """At most `count` flips, continuations and windows, worst first; the same evidence gives the same order.

    A flip ranks by the mean divergence of the window it lies in: there the candidate is furthest from the baseline. Continuations
    rank by how soon they part, those first that the candidate goes on with where the baseline ended.
    """
    divergences = {(window.document, window.window): mean_divergence(window) for window in evidence.windows}
    lost = [cloze for cloze in evidence.clozes if cloze.baseline.correct and not cloze.candidate.correct]

    def flip_order(cloze: Cloze) -> tuple[float, str, int, int]:
        place = (cloze.document, cloze.window)
        return (-divergences.get(place, 0.0), *place, cloze.position)

    windows = sorted(evidence.windows, key=lambda window: (-mean_divergence(window), window.document, window.window))
    parted = sorted((row for row in evidence.continuations if not row.alike), key=_parting)
    return Disagreements(tuple(sorted(lost, key=flip_order)[:count]), tuple(parted[:count]), tuple(windows[:count]))


def _parting(row: Continuation) -> tuple[bool, int, str, int]:
    return (row.candidate.ended or not row.baseline.ended, row.same, row.document, row.window)


def mean_divergence(window: Window) -> float:
    """Mean KL of a window in nats; infinite when a value is not a finite number."""
    values = [value for value in window.kl if value is not None]
    return math.fsum(values) / len(values) if len(values) == window.tokens else math.inf
