"""Quality, from evidence to rows: divergence and agreement per token, accuracy per cloze question.

Everything is paired (both arms saw the same tokens) and clustered by document. Intervals are two-sided 90%, so each
end is the one-sided 95% bound that non-inferiority is judged by; where the gate may look several times, what is gated has wider ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from assay_evals.evidence import Cloze, Continuation, Evidence, Window
from assay_evals.findings import UnmeasurableError, bounded_exp, finding
from assay_evals.statistics import (
    Groups,
    binomial_lower,
    binomial_upper,
    cautious_interval,
    clustered_mean,
    grouped,
    rare_difference_interval,
    resolved,
    t_interval,
)
from assay_evals.verdict import Row

ALPHA = 0.05
CONFIDENCE = 1 - 2 * ALPHA
RARE = 25


def alpha_of(evidence: Evidence) -> float:
    """One-sided error of one look at what is gated: all looks of a run together are wrong no more often than ALPHA (Bonferroni)."""
    return ALPHA / evidence.header.recipe.evaluate.looks


def kl_divergence(evidence: Evidence) -> Row:
    """Mean of KL(baseline ‖ candidate) over tokens, in nats."""
    windows, alpha = _windows(evidence), alpha_of(evidence)
    groups = _by_document(windows, [math.fsum(_finite(window)) for window in windows])
    interval = cautious_interval(groups, 1 - 2 * alpha)
    return gated_mean("kl_divergence", groups, interval, alpha, worse=interval[1])


def gated_mean(metric: str, groups: Groups, interval: tuple[float, float], alpha: float, worse: float) -> Row:
    """The row of a mean that is judged as it is, without a baseline's.  worse: the end of the interval that is held against the limit."""
    estimate = clustered_mean(groups)
    return finding(
        metric,
        arms=(None, estimate.mean),
        difference=estimate.mean,
        interval=interval,
        confidence=1 - 2 * alpha,
        samples=groups.samples,
        clusters=groups.clusters,
        minimum_detectable=resolved(estimate, worse),
    )


def kl_tail(evidence: Evidence) -> list[Row]:
    """Median, 99th percentile and maximum of the divergence over tokens: what a mean hides. No intervals."""
    windows = _windows(evidence)
    values = np.concatenate([np.array(_finite(window)) for window in windows])
    documents = len({window.document for window in windows})
    quantiles = {"median": 0.5, "p99": 0.99, "max": 1.0}
    found = {name: float(np.quantile(values, quantile)) for name, quantile in quantiles.items()}
    return [
        finding(f"kl_divergence.{name}", arms=(None, value), difference=value, samples=values.size, clusters=documents)
        for name, value in found.items()
    ]


def top1_agreement(evidence: Evidence) -> Row:
    """Share of positions at which both arms put the same token first."""
    windows, alpha = _windows(evidence), alpha_of(evidence)
    groups = _by_document(windows, [float(sum(window.agreed)) for window in windows])
    low, high = cautious_interval(groups, 1 - 2 * alpha)
    disagreed = groups.samples - int(groups.sums.sum())
    if disagreed < RARE:
        low = min(low, 1 - binomial_upper(disagreed, groups.samples, alpha))
        high = max(high, 1 - binomial_lower(disagreed, groups.samples, alpha))
    return gated_mean("top1_agreement", groups, (low, min(high, 1.0)), alpha, worse=low)


def perplexity(evidence: Evidence) -> Row:
    """Perplexity of both arms on the same tokens; the interval is that of the mean difference of log-likelihoods."""
    windows = _windows(evidence)
    if any(window.nll_baseline is None or window.nll_candidate is None for window in windows):
        raise UnmeasurableError("The log-likelihood of a window is not a finite number.")
    totals = [(window.nll_baseline or 0.0, window.nll_candidate or 0.0, window.tokens) for window in windows]
    tokens = sum(count for _, _, count in totals)
    groups = _by_document(windows, [(candidate - baseline) * count for baseline, candidate, count in totals])
    low, high = cautious_interval(groups, CONFIDENCE)
    return finding(
        "perplexity",
        arms=(
            bounded_exp(math.fsum(baseline * count for baseline, _, count in totals) / tokens),
            bounded_exp(math.fsum(candidate * count for _, candidate, count in totals) / tokens),
        ),
        difference=bounded_exp(clustered_mean(groups).mean),
        interval=(bounded_exp(low), bounded_exp(high)),
        confidence=CONFIDENCE,
        samples=groups.samples,
        clusters=groups.clusters,
    )


def cloze_accuracy(evidence: Evidence) -> Row:
    """Share of questions answered correctly, as a paired difference in accuracy."""
    clozes = _clozes(evidence)
    scores = [(float(cloze.baseline.correct), float(cloze.candidate.correct)) for cloze in clozes]
    return paired_accuracy("cloze_accuracy", scores, [cloze.document for cloze in clozes], alpha_of(evidence))


def paired_accuracy(
    metric: str, scores: Sequence[tuple[float, float]], labels: Sequence[str], alpha: float = ALPHA
) -> Row:
    """Mean score of both arms on the same items, and their paired difference.  scores: 0 to 1, (baseline, candidate) of each item.

    SE of d = candidate − baseline clustered by label. Where fewer than 25 answers differ, a standard error says little (none differing:
    SE = 0, even of five questions), and the exact bound widens the interval. Scores between 0 and 1 change by less than 1, so there the
    loss that is certain, which brings the upper end down, is not counted.
    """
    changes = [after - before for before, after in scores]
    lost, gained, total = sum(change < 0 for change in changes), sum(change > 0 for change in changes), len(changes)
    groups = grouped(changes, labels)
    estimate, (low, high) = clustered_mean(groups), cautious_interval(groups, 1 - 2 * alpha)
    whole = all(score in (0, 1) for pair in scores for score in pair)
    if lost + gained < RARE:
        exact_low, exact_high = rare_difference_interval(lost, gained, total, alpha)
        if not whole:
            exact_high = binomial_upper(gained, total, alpha)
        low, high = min(low, exact_low), max(high, exact_high)
    return finding(
        metric,
        arms=(math.fsum(before for before, _ in scores) / total, math.fsum(after for _, after in scores) / total),
        difference=estimate.mean,
        interval=(max(low, -1.0), min(high, 1.0)),
        confidence=1 - 2 * alpha,
        samples=total,
        clusters=estimate.degrees + 1,
        minimum_detectable=resolved(estimate, low),
        reason=f"{lost:,} answers went from right to wrong, {gained:,} from wrong to right."
        if whole
        else f"{lost:,} scores fell, {gained:,} rose.",
    )


def cloze_disagreement(evidence: Evidence) -> Row:
    """Share of questions of which exactly one arm was right: how much changed, whichever way."""
    clozes = _clozes(evidence)
    scores = [(float(cloze.baseline.correct), float(cloze.candidate.correct)) for cloze in clozes]
    return paired_disagreement("cloze_disagreement", scores, [cloze.document for cloze in clozes])


def paired_disagreement(metric: str, scores: Sequence[tuple[float, float]], labels: Sequence[str]) -> Row:
    """Share of items on which the arms' scores differ; where they are fewer than 25, an exact bound widens the interval."""
    groups = grouped([float(before != after) for before, after in scores], labels)
    estimate, flipped = clustered_mean(groups), int(groups.sums.sum())
    low, high = t_interval(estimate, CONFIDENCE)
    if flipped < RARE:
        low = min(low, binomial_lower(flipped, len(scores), ALPHA))
        high = max(high, binomial_upper(flipped, len(scores), ALPHA))
    return finding(
        metric,
        arms=(None, estimate.mean),
        difference=estimate.mean,
        interval=(max(low, 0.0), min(high, 1.0)),
        confidence=CONFIDENCE,
        samples=groups.samples,
        clusters=groups.clusters,
    )


def greedy_agreement(evidence: Evidence) -> Row:
    """Share of prompts that both arms continue alike to the end.

    Prompts are few and their outcomes are yes or no, so the spread between documents can vanish by chance; the exact bound of independent
    prompts is the least that the interval is wide.
    """
    rows, alpha = _continuations(evidence), alpha_of(evidence)
    groups = grouped([float(row.alike) for row in rows], [row.document for row in rows])
    alike = int(groups.sums.sum())
    low, high = cautious_interval(groups, 1 - 2 * alpha)
    low = max(0.0, min(low, binomial_lower(alike, len(rows), alpha)))
    high = min(1.0, max(high, binomial_upper(alike, len(rows), alpha)))
    return gated_mean("greedy_agreement", groups, (low, high), alpha, worse=low)


def greedy_details(evidence: Evidence) -> list[Row]:
    """How far the arms go together, and whether the candidate writes more, or does not stop, which broken models do."""
    rows = _continuations(evidence)
    labels = [row.document for row in rows]
    together = clustered_mean(grouped([float(row.same) for row in rows], labels))
    lengths = [(row.baseline.tokens, row.candidate.tokens) for row in rows]
    before, after = (math.fsum(length[arm] for length in lengths) / len(rows) for arm in (0, 1))
    cut = [(not row.baseline.ended, not row.candidate.ended) for row in rows]
    unstopped = clustered_mean(grouped([float(late) - float(early) for early, late in cut], labels))
    found = [
        _reported(
            "greedy_agreement.together", (None, together.mean), together.mean, t_interval(together, CONFIDENCE), rows
        ),
        _reported(
            "greedy_agreement.unstopped",
            (sum(early for early, _ in cut) / len(cut), sum(late for _, late in cut) / len(cut)),
            unstopped.mean,
            t_interval(unstopped, CONFIDENCE),
            rows,
        ),
    ]
    if before > 0:
        ratio, interval = ratio_of_means(lengths, labels)
        found.append(_reported("greedy_agreement.length", (before, after), ratio, interval, rows))
    return found


def ratio_of_means(pairs: Sequence[tuple[float, float]], labels: Sequence[str]) -> tuple[float, tuple[float, float]]:
    """Mean of the second over mean of the first, which is not 0, with its interval.

    The error is that of second − ratio · first, over the mean of the first (the delta method).
    """
    before, after = (math.fsum(pair[arm] for pair in pairs) / len(pairs) for arm in (0, 1))
    ratio = after / before
    spread = clustered_mean(grouped([late - ratio * early for early, late in pairs], labels))
    low, high = t_interval(replace(spread, mean=0.0), CONFIDENCE)
    return ratio, (ratio + low / before, ratio + high / before)


def _reported(
    metric: str,
    arms: tuple[float | None, float],
    difference: float,
    interval: tuple[float, float],
    rows: Sequence[Continuation],
) -> Row:
    documents = len({row.document for row in rows})
    return finding(
        metric,
        arms=arms,
        difference=difference,
        interval=interval,
        confidence=CONFIDENCE,
        samples=len(rows),
        clusters=documents,
    )


def _continuations(evidence: Evidence) -> tuple[Continuation, ...]:
    _need_documents("continuation", [row.document for row in evidence.continuations])
    return evidence.continuations


def _windows(evidence: Evidence) -> tuple[Window, ...]:
    _need_documents("window of text", [window.document for window in evidence.windows])
    return evidence.windows


def _clozes(evidence: Evidence) -> tuple[Cloze, ...]:
    _need_documents("cloze question", [cloze.document for cloze in evidence.clozes])
    return evidence.clozes


def _need_documents(what: str, documents: Sequence[str]) -> None:
    if not documents:
        raise UnmeasurableError(f"No {what} was measured.")
    if len(set(documents)) < 2:
        raise UnmeasurableError(f"Every {what} is from one document; spread between documents needs at least two.")


def _by_document(windows: Sequence[Window], sums: Sequence[float]) -> Groups:
    return grouped(sums, [window.document for window in windows], [window.tokens for window in windows])


def _finite(window: Window) -> list[float]:
    values = [value for value in window.kl if value is not None]
    if len(values) < len(window.kl):
        raise UnmeasurableError(
            f"KL divergence is not a finite number at {len(window.kl) - len(values)} of {len(window.kl)} tokens of "
            f"window {window.window} of document {window.document!r}."
        )
    return values
