"""What a metric's measurement comes to: a row of the verdict, or the reason why there is none."""

from __future__ import annotations

import math

from assay.errors import AssayError
from assay_evals.verdict import Row

SIGNIFICANT_DIGITS = 10


class UnmeasurableError(AssayError):
    """A metric cannot be computed from this evidence; the message is the reason, as a sentence."""


def finding(
    metric: str,
    *,
    arms: tuple[float | None, float],
    difference: float,
    interval: tuple[float, float] | None = None,
    confidence: float | None = None,
    samples: int,
    clusters: int | None = None,
    minimum_detectable: float | None = None,
    reason: str = "",
) -> Row:
    """A row with its numbers rounded to 10 significant digits; arms: (baseline, candidate).

    The last bits of a float depend on the processor; the verdict is taken on the rounded numbers, so its bytes do not.
    """
    return Row(
        metric=metric,
        baseline=None if arms[0] is None else _rounded(arms[0]),
        candidate=_rounded(arms[1]),
        difference=_rounded(difference),
        interval=None if interval is None else (_rounded(interval[0]), _rounded(interval[1])),
        confidence=confidence,
        n=samples,
        clusters=clusters,
        minimum_detectable=None if minimum_detectable is None else _rounded(minimum_detectable),
        reason=reason,
    )


def bounded_exp(exponent: float) -> float:
    """e to the exponent, kept within e^±700, so that absurd noise gives an absurd factor and no overflow."""
    return math.exp(max(-700.0, min(700.0, exponent)))


def _rounded(number: float) -> float:
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}")
