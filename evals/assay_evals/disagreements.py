"""The worst of a run, for people to read: answers that went wrong, structured output that got worse, windows that diverged most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from assay_evals.evidence import Cloze, Continuation, Evidence, StructuredRow, Window, Written


@dataclass(frozen=True)
class Disagreements:
    """flips: questions that the baseline got right and the candidate wrong. windows: by falling mean divergence. continuations: that parted.

    outputs: structured ones without enforcement that are worse from the candidate.
    """

    flips: tuple[Cloze, ...]
    continuations: tuple[Continuation, ...]
    windows: tuple[Window, ...]
    outputs: tuple[StructuredRow, ...]


def worst_disagreements(evidence: Evidence, count: int) -> Disagreements:
    """At most `count` of each, worst first; the same evidence gives the same order.

    A flip ranks by the mean divergence of the window it lies in: there the candidate is furthest from the baseline. Continuations
    rank by how soon they part, those first that the candidate goes on with where the baseline ended. An output ranks by what the
    candidate's is, no JSON before invalid before wrong, then by what was lost.
    """
    divergences = {(window.document, window.window): mean_divergence(window) for window in evidence.windows}
    lost = [cloze for cloze in evidence.clozes if cloze.baseline.correct and not cloze.candidate.correct]

    def flip_order(cloze: Cloze) -> tuple[float, str, int, int]:
        place = (cloze.document, cloze.window)
        return (-divergences.get(place, 0.0), *place, cloze.position)

    windows = sorted(evidence.windows, key=lambda window: (-mean_divergence(window), window.document, window.window))
    parted = sorted((row for row in evidence.continuations if not row.alike), key=_parting)
    outputs = sorted(worse_outputs(evidence), key=lambda row: (_worth(row.candidate), -_worth(row.baseline), row.item))
    return Disagreements(
        flips=tuple(sorted(lost, key=flip_order)[:count]),
        continuations=tuple(parted[:count]),
        windows=tuple(windows[:count]),
        outputs=tuple(outputs[:count]),
    )


def _parting(row: Continuation) -> tuple[bool, int, str, int]:
    return (row.candidate.ended or not row.baseline.ended, row.same, row.document, row.window)


def worse_outputs(evidence: Evidence) -> list[StructuredRow]:
    """Structured output that is worth less from the candidate than from the baseline, without enforcement."""
    return [row for row in evidence.structured if _worth(row.candidate) < _worth(row.baseline)]


def _worth(written: Written) -> int:
    return written.parsed + written.valid + bool(written.correct)


def mean_divergence(window: Window) -> float:
    """Mean KL of a window in nats; infinite when a value is not a finite number."""
    values = [value for value in window.kl if value is not None]
    return math.fsum(values) / len(values) if len(values) == window.tokens else math.inf
