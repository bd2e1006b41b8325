"""What is asked of a load test: service-level objectives of each request, and limits on how many may miss them or fail."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from assay.errors import UsageError
from assay_evals.load.records import Request


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Seconds that a request may take at most: to its first token, per token after that, and to its end."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met_by(self, request: Request) -> bool:
        """Whether a request keeps every objective. One that failed keeps none; nor one that has no such time, as of a single token."""
        found = (request.time_to_first_token, request.time_per_output_token, request.end_to_end_latency)
        asked = (self.ttft, self.tpot, self.e2e)
        return request.succeeded and all(
            limit is None or (time is not None and time <= limit) for time, limit in zip(found, asked, strict=True)
        )

    def __str__(self) -> str:
        return ", ".join(
            f"{name} ≤ {value:g} s" for name, value in dataclasses.asdict(self).items() if value is not None
        )


_NAMES = tuple(field.name for field in dataclasses.fields(Objectives))


def read_objectives(text: str) -> Objectives:
    """Objectives from a list such as ttft=0.5,tpot=0.05,e2e=10, in seconds; UsageError says which part is none."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if name not in _NAMES or not equals or name in found or not 0 < seconds < math.inf:
            raise UsageError(
                f"--slo {text}: {part.strip()!r} is not one objective; write each of {', '.join(_NAMES)} at most once, with its seconds, as in "
                "ttft=0.5,tpot=0.05,e2e=10."
            )
        found[name] = seconds
    return Objectives(**found)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the figures are set against.

    max_error_rate, min_goodput: shares of the measured requests, as they were observed; they decide the exit code.
    price_per_hour: of all that serves the endpoint, in `currency`.
    """

    objectives: Objectives | None = None
    max_error_rate: float
    min_goodput: float | None = None
    price_per_hour: float | None = None
    currency: str = "USD"


def read_asked(
    slo: str | None, max_error_rate: float, min_goodput: float | None, price_per_hour: float | None, currency: str
) -> Asked:
    """What the command line asks; UsageError when a share of goodput is asked for without objectives."""
    if min_goodput is not None and slo is None:
        raise UsageError("--min-goodput counts requests that meet the objectives of --slo, and none are declared.")
    return Asked(
        objectives=None if slo is None else read_objectives(slo),
        max_error_rate=max_error_rate,
        min_goodput=min_goodput,
        price_per_hour=price_per_hour,
        currency=currency,
    )
