"""Structured output, from evidence to rows. Items are independent: each is its own cluster.

Without enforcement the rows say what the model does by itself; with it, what a service that enforces the schema would give out, where only
wrong content and endless output can still show damage. Intervals are two-sided 90%, as of all quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from assay_evals.evidence import Evidence, StructuredRow, Written
from assay_evals.findings import UnmeasurableError, finding
from assay_evals.quality_findings import ALPHA, CONFIDENCE, alpha_of, paired_accuracy
from assay_evals.statistics import Groups, binomial_lower, binomial_upper, cautious_interval, clustered_mean
from assay_evals.verdict import Row

_Pair = tuple[Written, Written]


def new_invalid(evidence: Evidence) -> Row:
    """How many outputs were valid from the baseline and are not from the candidate, without enforcement.

    The count is exact; that few were seen among few shows little, so the exact upper bound of the rate (Clopper & Pearson 1934) is said.
    """
    rows = _measured(evidence)
    valid = [row for row in rows if row.baseline.valid]
    if not valid:
        raise UnmeasurableError(
            f"The baseline's own output is valid for none of {len(rows):,} items, so none could become invalid: show the form in the "
            "prompts, or ask for less."
        )
    lost = sum(not row.candidate.valid for row in valid)
    alpha = alpha_of(evidence)
    most = binomial_upper(lost, len(valid), alpha)
    return finding(
        "structured.new_invalid",
        arms=(None, lost),
        difference=lost,
        interval=(lost, lost),
        samples=len(valid),
        reason=f"{lost:,} of {len(valid):,} valid outputs became invalid, which shows a rate of at most {100 * most:.1f}% "
        f"({100 * (1 - alpha):g}% confidence, Clopper–Pearson).",
    )


def valid(evidence: Evidence) -> Row:
    """Share of outputs that are JSON and follow their schema, without enforcement."""
    return _paired("structured.valid", _free(evidence), lambda one: one.valid)


def correct(evidence: Evidence) -> Row:
    """Share of outputs that are valid and say what is expected, without enforcement, of the items that expect something."""
    return _paired("structured.correct", _known(_free(evidence)), lambda one: bool(one.correct), alpha_of(evidence))


def details(evidence: Evidence) -> list[Row]:
    """Parsed and cut off without enforcement; the share of schemas that compile; then the same with enforcement."""
    rows, free, enforced = _measured(evidence), _free(evidence), _enforced(evidence)
    found = [
        _paired("structured.parsed", free, lambda one: one.parsed),
        _paired("structured.cut_off", free, lambda one: one.cut_off),
        _compiled(rows),
    ]
    if len(enforced) > 1:
        found += [
            _paired("structured.enforced.parsed", enforced, lambda one: one.parsed),
            _paired("structured.enforced.valid", enforced, lambda one: one.valid),
            _paired("structured.enforced.cut_off", enforced, lambda one: one.cut_off),
        ]
    if len(known := [pair for pair in enforced if pair[0].correct is not None]) > 1:
        found.append(_paired("structured.enforced.correct", known, lambda one: bool(one.correct)))
    return found


def cost(evidence: Evidence) -> list[Row]:
    """Seconds that enforcing adds to each token after the first, and that the first use of a schema takes; on the candidate."""
    rows = [row for row in _measured(evidence) if row.refused is None]
    steps = [(row.step_seconds, [one for one in row.step_seconds if one is not None]) for row in rows]
    first = [row.compile_seconds for row in rows if row.compile_seconds is not None]
    if len(first) < len(rows) or any(len(kept) < len(taken) for taken, kept in steps):
        raise UnmeasurableError("A time of the enforced output is not a finite number.")
    found: list[Row] = []
    if len(written := [kept for _, kept in steps if kept]) > 1:
        found.append(_seconds("structured.cost", written))
    if len(first) > 1:
        found.append(_seconds("structured.first_use", [[one] for one in first]))
    if not found:
        raise UnmeasurableError("Fewer than two schemas were enforced.")
    return found


def _seconds(metric: str, items: Sequence[Sequence[float]]) -> Row:
    """Mean over all, clustered by item; median and range beside it, since such times have a long tail."""
    groups = Groups(np.array([math.fsum(one) for one in items]), np.array([float(len(one)) for one in items]))
    every = np.concatenate([np.asarray(one) for one in items])
    mean = clustered_mean(groups).mean
    median, low, high = (1000 * float(one) for one in (np.median(every), every.min(), every.max()))
    return finding(
        metric,
        arms=(None, mean),
        difference=mean,
        interval=cautious_interval(groups, CONFIDENCE),
        confidence=CONFIDENCE,
        samples=groups.samples,
        clusters=groups.clusters,
        reason=f"Median {median:.2f} ms, from {low:.2f} to {high:.2f} ms.",
    )


def _compiled(rows: Sequence[StructuredRow]) -> Row:
    refused = [row for row in rows if row.refused is not None]
    compiled, count = len(rows) - len(refused), len(rows)
    named = f" {refused[0].item}: {refused[0].refused}" if refused else ""
    return finding(
        "structured.compiled",
        arms=(None, compiled / count),
        difference=compiled / count,
        interval=(binomial_lower(compiled, count, ALPHA), binomial_upper(compiled, count, ALPHA)),
        confidence=CONFIDENCE,
        samples=count,
        reason=f"{len(refused):,} of {count:,} schemas cannot be enforced.{named}",
    )


def _paired(metric: str, pairs: Sequence[_Pair], holds: Callable[[Written], bool], alpha: float = ALPHA) -> Row:
    outcomes = [(holds(before), holds(after)) for before, after in pairs]
    row = paired_accuracy(metric, outcomes, [str(index) for index in range(len(outcomes))], alpha)
    gone, come = (outcomes.count(change) for change in ((True, False), (False, True)))
    return replace(
        row,
        reason=f"Of {len(outcomes):,} outputs, {gone:,} were so from the baseline only, {come:,} from the candidate only.",
    )


def _measured(evidence: Evidence) -> tuple[StructuredRow, ...]:
    if len(evidence.structured) < 2:
        raise UnmeasurableError("Fewer than two structured outputs were measured.")
    return evidence.structured


def _free(evidence: Evidence) -> list[_Pair]:
    return [(row.baseline, row.candidate) for row in _measured(evidence)]


def _enforced(evidence: Evidence) -> list[_Pair]:
    return [
        (row.baseline_enforced, row.candidate_enforced)
        for row in _measured(evidence)
        if row.baseline_enforced is not None and row.candidate_enforced is not None
    ]


def _known(pairs: Sequence[_Pair]) -> list[_Pair]:
    known = [pair for pair in pairs if pair[0].correct is not None]
    if len(known) < 2:
        raise UnmeasurableError("Fewer than two items say what is expected, so nobody knows what is correct.")
    return known
