"""Encoders, from evidence to rows: how near embeddings stay, whether they rank and retrieve alike, and what classifiers say.

Everything is paired by text and clustered by document, as quality_findings.py has it. Speed is told per shape of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from scipy import stats

from assay.recipe import (
    BatchShape,
    EncodeLatencyMetric,
    EncoderMetric,
    EncodeThroughputMetric,
    Evaluate,
    RetrievalAgreementMetric,
)
from assay_evals.evidence import Classified, Embedded, EncoderRow, Evidence, Retrieved, SpeedRun
from assay_evals.findings import UnmeasurableError, finding
from assay_evals.quality_findings import RARE, alpha_of, gated_mean, paired_accuracy
from assay_evals.speed_findings import declared, ratio
from assay_evals.statistics import Interval, binomial_lower, binomial_upper, cautious_interval, grouped
from assay_evals.verdict import Row
from assay_evals.wording import SLICE


def of_encoder(evaluate: Evaluate) -> bool:
    """Whether a recipe measures an encoder."""
    return any(isinstance(metric, EncoderMetric) for metric in evaluate.quality)


def embedding_cosine(evidence: Evidence) -> Row:
    """Mean cosine of the candidate's embedding of a text and the baseline's."""
    rows, alpha = _embeddings(evidence), alpha_of(evidence)
    groups = grouped([_cosine(row) for row in rows], [row.document for row in rows])
    low, high = cautious_interval(groups, 1 - 2 * alpha)
    return gated_mean("embedding_cosine", groups, (max(low, -1.0), min(high, 1.0)), alpha, worse=low)


def cosine_tail(evidence: Evidence) -> list[Row]:
    """The cosine's first percentile and the least: what a mean hides. No intervals."""
    rows = _embeddings(evidence)
    values = np.array([_cosine(row) for row in rows])
    documents = len({row.document for row in rows})
    found = {"p01": float(np.quantile(values, 0.01)), "min": float(values.min())}
    return [
        finding(f"embedding_cosine.{name}", arms=(None, value), difference=value, samples=len(rows), clusters=documents)
        for name, value in found.items()
    ]


def similarity_rank(evidence: Evidence) -> Row:
    """Mean over texts of Spearman's correlation between the arms' similarities to the same other texts."""
    rows, alpha = _embeddings(evidence), alpha_of(evidence)
    groups = grouped([rank_correlation(row) for row in rows], [row.document for row in rows])
    low, high = cautious_interval(groups, 1 - 2 * alpha)
    return gated_mean("similarity_rank", groups, (max(low, -1.0), min(high, 1.0)), alpha, worse=low)


def rank_correlation(row: Embedded) -> float:
    """Spearman's ρ: the correlation of ranks, equals sharing theirs; where all of an arm's are equal there is none, and it counts as 0."""
    pair = [[value for value in arm if value is not None] for arm in (row.baseline, row.candidate)]
    if len(pair[0]) < len(row.baseline) or len(pair[1]) < len(row.candidate):
        raise UnmeasurableError(
            f"A similarity of text {row.window} of document {row.document!r} is not a finite number."
        )
    ranks = [stats.rankdata(arm) for arm in pair]
    centred = [one - one.mean() for one in ranks]
    size = math.sqrt(float((centred[0] ** 2).sum()) * float((centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / size if size else 0.0


def retrieval_agreement(evidence: Evidence) -> Row:
    """Mean over queries of the share of the first passages that both arms find.

    Where fewer than 25 queries differ at all, exact bounds widen the interval.
    """
    rows, alpha = _retrievals(evidence), alpha_of(evidence)
    top = declared_top(evidence)
    shares = [shared(row, top) for row in rows]
    groups = grouped(shares, [row.document for row in rows])
    interval = _exact_when_rare(cautious_interval(groups, 1 - 2 * alpha), [1 - share for share in shares], alpha)
    return gated_mean("retrieval_agreement", groups, interval, alpha, worse=interval[0])


def retrieval_details(evidence: Evidence) -> list[Row]:
    """Share of queries for which both arms find the same passage first."""
    declared_top(evidence)
    return [
        _share(
            "retrieval_agreement.first",
            _retrievals(evidence),
            lambda row: row.baseline[0] == row.candidate[0],
            evidence,
        )
    ]


def declared_top(evidence: Evidence) -> int:
    """How many passages retrieval_agreement compares; UnmeasurableError where the recipe does not measure it."""
    for metric in evidence.header.recipe.evaluate.quality:
        if isinstance(metric, RetrievalAgreementMetric):
            return metric.top
    raise UnmeasurableError(
        "The recipe does not measure retrieval_agreement, so it is unknown how many passages count."
    )


def shared(row: Retrieved, top: int) -> float:
    """Share of the first `top` passages, or of all where there are fewer, that both arms name."""
    wanted = min(top, row.passages)
    if len(row.baseline) < wanted:
        raise UnmeasurableError(f"The query of {row.own!r} has {len(row.baseline)} passages, not {wanted}.")
    return len(set(row.baseline[:wanted]) & set(row.candidate[:wanted])) / wanted


def retrieval_accuracy(evidence: Evidence) -> Row:
    """Share of queries whose nearest passage is their own, as a paired difference."""
    rows = _retrievals(evidence)
    scores = [(float(row.baseline[0] == row.own), float(row.candidate[0] == row.own)) for row in rows]
    return paired_accuracy("retrieval_accuracy", scores, [row.document for row in rows], alpha_of(evidence))


def class_agreement(evidence: Evidence) -> Row:
    """Share of texts that both arms put into the same class."""
    return _share("class_agreement", _classes(evidence), same_class, evidence)


def class_accuracy(evidence: Evidence) -> Row:
    """Share of texts put into the right class, as a paired difference."""
    rows = _classes(evidence)
    if any(row.label is None for row in rows):
        raise UnmeasurableError(
            "The right class is not known of every text; the recipe does not measure class_accuracy."
        )
    scores = [(float(row.baseline.name == row.label), float(row.candidate.name == row.label)) for row in rows]
    return paired_accuracy("class_accuracy", scores, [row.document for row in rows], alpha_of(evidence))


def chance_level(evidence: Evidence, metric: str) -> float:
    """What guessing gets right at one of these accuracies."""
    rows = (
        evidence.retrievals
        if metric == "retrieval_accuracy"
        else evidence.classes
        if metric == "class_accuracy"
        else ()
    )
    counts = [row.passages if isinstance(row, Retrieved) else row.classes for row in rows]
    return math.fsum(1 / count for count in counts) / len(counts) if counts else 0.0


def encode_latency(evidence: Evidence) -> list[Row]:
    """Seconds of a batch: the mean over a process's repetitions, a row for each shape."""
    metric = declared(evidence, EncodeLatencyMetric)
    return _by_shape(metric, evidence, lambda _, seconds: seconds)


def encode_throughput(evidence: Evidence) -> list[Row]:
    """Texts of a batch / its seconds."""
    metric = declared(evidence, EncodeThroughputMetric)
    return _by_shape(metric, evidence, lambda shape, seconds: shape.batch / seconds)


def shape_name(shape: BatchShape) -> str:
    return f"batch={shape.batch} tokens={shape.tokens}"


def _by_shape(
    metric: EncodeLatencyMetric | EncodeThroughputMetric,
    evidence: Evidence,
    measure: Callable[[BatchShape, float], float],
) -> list[Row]:
    rows: list[Row] = []
    for shape in metric.shapes:
        name = metric.metric if len(metric.shapes) == 1 else f"{metric.metric}{SLICE}{shape_name(shape)}"
        rows += ratio(name, evidence, partial(_seconds, shape, measure))
    return rows


def _seconds(shape: BatchShape, measure: Callable[[BatchShape, float], float], run: SpeedRun) -> float:
    place = f"Block {run.block}, process {run.position} ({run.arm})"
    found = [one for one in run.encodings if (one.batch, one.tokens) == (shape.batch, shape.tokens)]
    if len(found) != 1:
        raise UnmeasurableError(f"{place}: {len(found)} measurements of {shape_name(shape)}; there has to be one.")
    seconds = [value for value in found[0].seconds if value is not None and value > 0]
    if not seconds or len(seconds) < len(found[0].seconds):
        raise UnmeasurableError(f"{place}: a time is missing, or not above zero.")
    return measure(shape, math.fsum(seconds) / len(seconds))


RowOf = TypeVar("RowOf", Retrieved, Classified)


def _share(metric: str, rows: Sequence[RowOf], holds: Callable[[RowOf], bool], evidence: Evidence) -> Row:
    alpha = alpha_of(evidence)
    shares = [float(holds(row)) for row in rows]
    groups = grouped(shares, [row.document for row in rows])
    interval = _exact_when_rare(cautious_interval(groups, 1 - 2 * alpha), [1 - share for share in shares], alpha)
    return gated_mean(metric, groups, interval, alpha, worse=interval[0])


def _exact_when_rare(interval: Interval, losses: Sequence[float], alpha: float) -> Interval:
    """The interval of a share of 1, widened by exact bounds where fewer than 25 samples lost anything; within 0 and 1.

    Below: as many may be lost whole as the bound of those that were allows, none of them too, or lose the most that was seen of one as
    often as the bound of those that lost anything.  Above: those lost whole are lost.
    """
    (low, high), count = interval, len(losses)
    whole, differing = sum(loss >= 1 for loss in losses), sum(loss > 0 for loss in losses)
    if differing < RARE:
        most = max(binomial_upper(whole, count, alpha), max(losses) * binomial_upper(differing, count, alpha))
        low, high = min(low, 1 - most), max(high, 1 - binomial_lower(whole, count, alpha))
    return max(low, 0.0), min(high, 1.0)


def _cosine(row: Embedded) -> float:
    if row.cosine is None:
        raise UnmeasurableError(f"The cosine of text {row.window} of document {row.document!r} is not a finite number.")
    return row.cosine


def _embeddings(evidence: Evidence) -> tuple[Embedded, ...]:
    _need_documents("embedding", evidence.embeddings)
    return evidence.embeddings


def _retrievals(evidence: Evidence) -> tuple[Retrieved, ...]:
    _need_documents("query", evidence.retrievals)
    return evidence.retrievals


def _classes(evidence: Evidence) -> tuple[Classified, ...]:
    _need_documents("class", evidence.classes)
    return evidence.classes


def _need_documents(what: str, rows: Sequence[EncoderRow]) -> None:
    if not rows:
        raise UnmeasurableError(f"No {what} was measured.")
    if len({row.document for row in rows}) < 2:
        raise UnmeasurableError(f"Every {what} is from one document; spread between documents needs at least two.")


# In the order of the recipe's schema; the last ones tell more about the first.
MEASURES: dict[str, Callable[[Evidence], list[Row]]] = {
    "embedding_cosine": lambda evidence: [embedding_cosine(evidence)],
    "similarity_rank": lambda evidence: [similarity_rank(evidence)],
    "retrieval_agreement": lambda evidence: [retrieval_agreement(evidence)],
    "retrieval_accuracy": lambda evidence: [retrieval_accuracy(evidence)],
    "class_agreement": lambda evidence: [class_agreement(evidence)],
    "class_accuracy": lambda evidence: [class_accuracy(evidence)],
}
SPEEDS: dict[str, Callable[[Evidence], list[Row]]] = {
    "encode_latency": encode_latency,
    "encode_throughput": encode_throughput,
}
DETAILS: dict[str, Callable[[Evidence], list[Row]]] = {
    "embedding_cosine.tail": cosine_tail,
    "retrieval_agreement.details": retrieval_details,
}


@dataclass(frozen=True)
class Worst:
    """Texts whose embeddings moved most, queries whose passages have the fewest in common, and texts whose class changed."""

    moved: tuple[Embedded, ...]
    apart: tuple[Retrieved, ...]
    reclassified: tuple[Classified, ...]


def worst_encoded(evidence: Evidence, count: int) -> Worst:
    """At most `count` of each, worst first: of classes those that were right, then those that the candidate is surest of."""
    moved = sorted(
        evidence.embeddings, key=lambda row: (-2.0 if row.cosine is None else row.cosine, row.document, row.window)
    )
    apart = sorted(filter(is_apart, evidence.retrievals), key=lambda row: (in_common(row), row.own))
    changed = [row for row in evidence.classes if not same_class(row)]
    changed.sort(
        key=lambda row: (row.label != row.baseline.name, -(row.candidate.share or 0.0), row.document, row.window)
    )
    return Worst(tuple(moved[:count]), tuple(apart[:count]), tuple(changed[:count]))


def is_apart(row: Retrieved) -> bool:
    """Whether the arms find other passages, or another one first."""
    return in_common(row) < len(row.baseline) or row.baseline[0] != row.candidate[0]


def in_common(row: Retrieved) -> int:
    """How many passages both arms name."""
    return len(set(row.baseline) & set(row.candidate))


def same_class(row: Classified) -> bool:
    return row.baseline.name == row.candidate.name
