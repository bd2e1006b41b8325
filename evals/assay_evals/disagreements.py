"""The worst of a run, for people to read: answers that went wrong, structured output that got worse, windows that diverged most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from assay_evals.evidence import ChoiceItem, Cloze, Continuation, Evidence, StructuredRow, Window, Written
from assay_evals.findings import UnmeasurableError
from assay_evals.task_findings import Judged, judged_items


@dataclass(frozen=True)
class Disagreements:
    """flips: questions that the baseline got right and the candidate wrong. windows: by falling mean divergence. continuations: that parted.

    outputs: structured ones without enforcement that are worse from the candidate. tasks: for each the items that it scored lower on.
    """

    flips: tuple[Cloze, ...]
    continuations: tuple[Continuation, ...]
    windows: tuple[Window, ...]
    outputs: tuple[StructuredRow, ...]
    tasks: dict[str, tuple[Judged, ...]]


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
    tasks = [task.name for task in evidence.header.recipe.evaluate.tasks]
    return Disagreements(
        flips=tuple(sorted(lost, key=flip_order)[:count]),
        continuations=tuple(parted[:count]),
        windows=tuple(windows[:count]),
        outputs=tuple(outputs[:count]),
        tasks={name: tuple(sorted(_lost_items(evidence, name), key=_item_order)[:count]) for name in tasks},
    )


def _parting(row: Continuation) -> tuple[bool, int, str, int]:
    return (row.candidate.ended or not row.baseline.ended, row.same, row.document, row.window)


def worse_outputs(evidence: Evidence) -> list[StructuredRow]:
    """Structured output that is worth less from the candidate than from the baseline, without enforcement."""
    return [row for row in evidence.structured if _worth(row.candidate) < _worth(row.baseline)]


def _worth(written: Written) -> int:
    return written.parsed + written.valid + bool(written.correct)


def _lost_items(evidence: Evidence, name: str) -> list[Judged]:
    try:
        return [item for item in judged_items(evidence, name) if item.scores[1] < item.scores[0]]
    except UnmeasurableError:
        return []


def _item_order(item: Judged) -> tuple[float, float, str]:
    """By the loss; of choices, by how much likelier than before another one has become than the right one, in nats."""
    row, shift = item.row, 0.0
    if isinstance(row, ChoiceItem):
        leads = [
            values[row.gold] - max(value for index, value in enumerate(values) if index != row.gold)
            for values in ([value or 0.0 for value in arm] for arm in (row.baseline, row.candidate))
        ]
        shift = leads[1] - leads[0]
    return (item.scores[1] - item.scores[0], shift, row.item)


def mean_divergence(window: Window) -> float:
    """Mean KL of a window in nats; infinite when a value is not a finite number."""
    values = [value for value in window.kl if value is not None]
    return math.fsum(values) / len(values) if len(values) == window.tokens else math.inf
