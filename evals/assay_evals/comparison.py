"""Several candidates against each other, by the evidence of their runs: each against the first, on the very samples that both answered.

Quality is paired by window and question and clustered by document, as a verdict's is. Speeds were measured at different times, each against
its own baseline in the same blocks: what is compared is the ratios to these baselines, and the errors of both add up (Welch 1947).
All intervals of one comparison hold together: with k candidates each is at 1 − 0.10 / (k − 1) (Bonferroni), so that the best of many is
not believed for being the luckiest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from assay.errors import UsageError
from assay_evals.encoder_findings import declared_top, rank_correlation, shared
from assay_evals.evidence import Evidence, Window
from assay_evals.findings import bounded_exp
from assay_evals.statistics import (
    Interval,
    cautious_interval,
    clustered_mean,
    grouped,
    t_half_width,
)
from assay_evals.task_findings import cluster, judged_items
from assay_evals.verdict import Outcome, Row, Verdict
from assay_evals.wording import SAME_ARM, TASK, words

ERROR = 0.10
# What a candidate is chosen for and by: the first that all runs have.
_GAINS = ("decode_tokens_per_second", "encode_throughput", "size_on_disk")
_QUALITIES = ("kl_divergence", "cloze_accuracy", "top1_agreement", "embedding_cosine", "class_agreement")


@dataclass(frozen=True)
class Finished:
    """A run as it is compared: its name, what was measured, and what came of it."""

    name: str
    evidence: Evidence
    verdict: Verdict


@dataclass(frozen=True)
class Contrast:
    """A metric of one candidate beside the first one's.

    value: as in the run's own verdict.  change: from the first candidate, in the terms of `Row.difference` (a factor, or a difference);
    None for the first itself.  interval: of the change.  reason: why there is no change, where there could be.
    """

    metric: str
    value: float | None
    change: float | None
    interval: Interval | None
    reason: str = ""


@dataclass(frozen=True)
class Place:
    """A candidate against its own baseline on one axis: the difference as in its verdict, and its interval."""

    metric: str
    value: float
    interval: Interval


@dataclass(frozen=True)
class Compared:
    """One candidate: its verdict and its contrasts, of every metric that one of the runs has.

    places: gain and quality, where all runs have both.  dominated_by: a candidate that is no worse in either and better in one, going
    by what was found, without regard to the intervals.
    """

    name: str
    verdict: Outcome
    scheme: str
    contrasts: tuple[Contrast, ...]
    places: tuple[Place, Place] | None
    dominated_by: str | None


def compare(runs: Sequence[Finished]) -> tuple[Compared, ...]:
    """Each run beside the first; UsageError for fewer than two."""
    if len(runs) < 2:
        raise UsageError("a comparison takes at least two runs.")
    first, confidence = runs[0], 1 - ERROR / (len(runs) - 1)
    metrics = [row.metric for run in runs for row in (*run.verdict.gates, *run.verdict.reported)]
    shown = [metric for metric in dict.fromkeys(metrics) if not metric.endswith(SAME_ARM)]
    gains, qualities = (_common(metrics, runs) for metrics in (_GAINS, _QUALITIES))
    placed = {run.name: (gain, quality) for run, gain, quality in zip(runs, gains, qualities, strict=False)}
    return tuple(
        Compared(
            run.name,
            run.verdict.verdict,
            run.evidence.header.candidate.scheme,
            tuple(_contrast(metric, first, run, confidence) for metric in shown),
            placed.get(run.name),
            _dominating(run.name, placed),
        )
        for run in runs
    )


def _common(metrics: Sequence[str], runs: Sequence[Finished]) -> list[Place]:
    """The places of all runs in the first of these metrics that they all have; none when there is no such metric."""
    for metric in metrics:
        rows = [run.verdict.row(metric) for run in runs]
        places = [
            Place(metric, row.difference, row.interval)
            for row in rows
            if row is not None and row.difference is not None and row.interval is not None
        ]
        if len(places) == len(runs):
            return places
    return []


def _dominating(name: str, placed: dict[str, tuple[Place, Place]]) -> str | None:
    if name not in placed:
        return None
    own = [_better(place) for place in placed[name]]
    for other, places in placed.items():
        theirs = [_better(place) for place in places]
        if theirs != own and all(their >= mine for their, mine in zip(theirs, own, strict=True)):
            return other
    return None


def _better(place: Place) -> float:
    """A number that is the higher the better."""
    return place.value if words(place.metric).higher_is_better else -place.value


def _contrast(metric: str, first: Finished, run: Finished, confidence: float) -> Contrast:
    row, reference = run.verdict.row(metric), first.verdict.row(metric)
    value = None if row is None else row.candidate
    if run is first or row is None or row.candidate is None:
        return Contrast(metric, value, None, None)
    if reference is None or reference.candidate is None:
        return Contrast(metric, value, None, None, "not measured for the first")
    if metric in _PAIRED:
        if not _same_samples(first.evidence, run.evidence):
            return Contrast(metric, value, None, None, "measured on other samples than the first")
        change, interval = _PAIRED[metric](first.evidence, run.evidence, confidence)
        return Contrast(metric, value, change, interval)
    if metric.startswith(TASK) and "." not in metric.removeprefix(TASK):
        return _task_contrast(metric, value, (first.evidence, run.evidence), confidence)
    if words(metric).difference != "factor" or row.interval is None or reference.interval is None:
        return Contrast(metric, value, None, None)
    if metric == "size_on_disk":
        ratio = row.candidate / reference.candidate
        return Contrast(metric, value, ratio, (ratio, ratio))
    return Contrast(metric, value, *_ratio_of_ratios(reference, row, confidence))


def _task_contrast(
    metric: str, value: float | None, evidence: tuple[Evidence, Evidence], confidence: float
) -> Contrast:
    """By the items that both answered; declared alike, or they would be scored by other rules."""
    name = metric.removeprefix(TASK)
    declared = [[task for task in one.header.recipe.evaluate.tasks if task.name == name] for one in evidence]
    first, other = ({item.row.item: item for item in judged_items(one, name)} for one in evidence)
    used = [one.header.tasks.get(name) for one in evidence]
    if declared[0] != declared[1] or used[0] != used[1] or list(first) != list(other):
        return Contrast(metric, value, None, None, "measured on other samples than the first")
    changes = [other[item].scores[1] - first[item].scores[1] for item in first]
    return Contrast(metric, value, *_by_item(changes, [cluster(one.row) for one in first.values()], confidence))


def _same_samples(first: Evidence, other: Evidence) -> bool:
    """Whether both answered the same windows and questions of the same text."""

    def samples(evidence: Evidence) -> tuple[object, ...]:
        windows = [(window.document, window.window, window.tokens) for window in evidence.windows]
        questions = [(cloze.document, cloze.window, cloze.position, cloze.word) for cloze in evidence.clozes]
        prompts = [(row.document, row.window, row.prompt_tokens, row.new_tokens) for row in evidence.continuations]
        encoded = [(row.kind, row.document, row.window, row.tokens) for row in evidence.encoded]
        return (evidence.header.text.digest, windows, questions, prompts, encoded)

    return samples(first) == samples(other)


def _by_window(
    first: Evidence, other: Evidence, sum_of: Callable[[Window], float], confidence: float
) -> tuple[float, Interval]:
    pairs = list(zip(first.windows, other.windows, strict=True))
    changes = [sum_of(after) - sum_of(before) for before, after in pairs]
    labels, counts = [before.document for before, _ in pairs], [before.tokens for before, _ in pairs]
    groups = grouped(changes, labels, counts)
    return clustered_mean(groups).mean, cautious_interval(groups, confidence)


def _divergence(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    return _by_window(
        first, other, lambda window: math.fsum(value for value in window.kl if value is not None), confidence
    )


def _agreement(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    return _by_window(first, other, lambda window: float(sum(window.agreed)), confidence)


def _perplexity(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    mean, (low, high) = _by_window(
        first, other, lambda window: (window.nll_candidate or 0.0) * window.tokens, confidence
    )
    return bounded_exp(mean), (bounded_exp(low), bounded_exp(high))


def _continuations(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    pairs = zip(first.continuations, other.continuations, strict=True)
    changes = [int(after.alike) - int(before.alike) for before, after in pairs]
    return _by_item(changes, [row.document for row in first.continuations], confidence)


def _cloze(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    pairs = zip(first.clozes, other.clozes, strict=True)
    changes = [int(after.candidate.correct) - int(before.candidate.correct) for before, after in pairs]
    return _by_item(changes, [cloze.document for cloze in first.clozes], confidence)


def _by_item(changes: Sequence[float], labels: Sequence[str], confidence: float) -> tuple[float, Interval]:
    groups = grouped(changes, labels)
    return clustered_mean(groups).mean, cautious_interval(groups, confidence)


def _cosine(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    pairs = zip(first.embeddings, other.embeddings, strict=True)
    changes = [(after.cosine or 0.0) - (before.cosine or 0.0) for before, after in pairs]
    return _by_item(changes, [row.document for row in first.embeddings], confidence)


def _rank(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    pairs = zip(first.embeddings, other.embeddings, strict=True)
    changes = [rank_correlation(after) - rank_correlation(before) for before, after in pairs]
    return _by_item(changes, [row.document for row in first.embeddings], confidence)


def _retrieval(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    pairs = zip(first.retrievals, other.retrievals, strict=True)
    top = min(declared_top(first), declared_top(other))
    changes = [shared(after, top) - shared(before, top) for before, after in pairs]
    return _by_item(changes, [row.document for row in first.retrievals], confidence)


def _own_passage(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    pairs = zip(first.retrievals, other.retrievals, strict=True)
    changes = [int(after.candidate[0] == after.own) - int(before.candidate[0] == before.own) for before, after in pairs]
    return _by_item(changes, [row.document for row in first.retrievals], confidence)


def _class(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    pairs = zip(first.classes, other.classes, strict=True)
    alike = [[int(one.baseline.name == one.candidate.name) for one in pair] for pair in pairs]
    changes = [after - before for before, after in alike]
    return _by_item(changes, [row.document for row in first.classes], confidence)


def _right_class(first: Evidence, other: Evidence, confidence: float) -> tuple[float, Interval]:
    pairs = zip(first.classes, other.classes, strict=True)
    right = [[int(one.candidate.name == one.label) for one in pair] for pair in pairs]
    return _by_item([after - before for before, after in right], [row.document for row in first.classes], confidence)


_PAIRED: dict[str, Callable[[Evidence, Evidence, float], tuple[float, Interval]]] = {
    "kl_divergence": _divergence,
    "top1_agreement": _agreement,
    "perplexity": _perplexity,
    "cloze_accuracy": _cloze,
    "greedy_agreement": _continuations,
    "embedding_cosine": _cosine,
    "similarity_rank": _rank,
    "retrieval_agreement": _retrieval,
    "retrieval_accuracy": _own_passage,
    "class_agreement": _class,
    "class_accuracy": _right_class,
}


def _ratio_of_ratios(reference: Row, row: Row, confidence: float) -> tuple[float, Interval]:
    """How much more a candidate changed than the first did, each against its own baseline; logarithms and Welch's degrees of freedom."""
    change = math.log(row.difference or 1.0) - math.log(reference.difference or 1.0)
    errors = [_error(one) for one in (reference, row)]
    total = sum(error**2 for error, _ in errors)
    spread = sum(error**4 / degrees for error, degrees in errors)
    degrees = total**2 / spread if spread else math.inf
    half = t_half_width(math.sqrt(total), degrees, confidence)
    return bounded_exp(change), (bounded_exp(change - half), bounded_exp(change + half))


def _error(row: Row) -> tuple[float, int]:
    """Standard error of a ratio's logarithm, as its interval has it, and its degrees of freedom."""
    assert row.interval is not None and row.confidence is not None and row.clusters is not None
    half = (math.log(row.interval[1]) - math.log(row.interval[0])) / 2
    degrees = row.clusters - 1
    return half / t_half_width(1.0, degrees, row.confidence), degrees
