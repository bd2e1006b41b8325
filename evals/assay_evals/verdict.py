"""The verdict: what was asked, what was found, and one word for all of it; the form of verdict.json.

Reads and writes only; imports no numerics, so that a verdict can be shown wherever an artifact can be pulled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from assay.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_INVALID, EXIT_OK, IntegrityError
from assay.files import read_json, readable_json, write_atomic
from assay_evals.evidence import Check

VERDICT_VERSION = 1

Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE", "INVALID"]
EXIT_CODES: dict[Outcome, int] = {
    "PASS": EXIT_OK,
    "FAIL": EXIT_FAIL,
    "INCONCLUSIVE": EXIT_INCONCLUSIVE,
    "INVALID": EXIT_INVALID,
}
_WORST_FIRST: tuple[Outcome, ...] = ("INVALID", "FAIL", "INCONCLUSIVE", "PASS")
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric as measured: every number is null where it could not be measured.

    difference: in the metric's own terms: candidate − baseline for accuracies, candidate / baseline for speeds, sizes
    and perplexity, the mean itself where the baseline has none (KL divergence, top-1 agreement).
    interval: of the difference, at `confidence`; an exact number (size on disk) has itself twice, and no confidence.
    n, clusters: samples, and how many independent groups they fall into (documents, blocks).
    minimum_detectable: distance of the truth from the margin that such a measurement resolves with 80% probability;
    for ratios a factor.
    """

    __pydantic_config__ = _STRICT
    metric: str
    baseline: float | None
    candidate: float | None
    difference: float | None
    interval: tuple[float, float] | None
    confidence: float | None
    n: int
    clusters: int | None
    minimum_detectable: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class GateRow(Row):
    """A metric that the recipe gates: its row, the recipe's criterion and number, and what follows."""

    criterion: dict[str, float]
    margin: float
    verdict: Outcome


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Where a gate stands on the axis of a row's difference, and which side passes."""

    value: float
    at_least: bool


def limit_of(criterion: dict[str, float]) -> Limit:
    """The limit that a criterion such as {"max_drop": 0.03} puts on the difference: here, at least −0.03."""
    ((name, value),) = criterion.items()
    return Limit(value=-value if name == "max_drop" else value, at_least=name in ("max_drop", "min", "min_speedup"))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One word on a candidate, with the digests of exactly what it was said of.

    slices: the quality of parts of the text (slices.py), gated or not, as far as it can be told.
    """

    __pydantic_config__ = _STRICT
    verdict: Outcome
    candidate: str
    baseline: str
    recipe: str
    evidence: str
    gates: tuple[GateRow, ...]
    reported: tuple[Row, ...]
    slices: tuple[Row, ...]
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.verdict == "PASS"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def row(self, metric: str) -> Row | None:
        """The row of a metric, gated or only reported."""
        return next((row for row in (*self.gates, *self.reported) if row.metric == metric), None)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERDICT_VERSION, "exit_code": self.exit_code, **asdict(self)}

    @staticmethod
    def from_json(value: Any) -> Verdict:
        """Parse what `to_json` gave; IntegrityError when it is something else or contradicts itself."""
        if not isinstance(value, dict) or value.get("version") != VERDICT_VERSION:
            raise IntegrityError(f"not a version {VERDICT_VERSION} verdict; use the Assay release that wrote it.")
        body = {name: item for name, item in value.items() if name not in ("version", "exit_code")}
        try:
            verdict = _VERDICT.validate_json(readable_json(body))
        except (ValidationError, ValueError) as error:
            raise IntegrityError(f"not a verdict of the right form: {error}") from error
        if value.get("exit_code") != verdict.exit_code:
            raise IntegrityError(f"the verdict is {verdict.verdict}, but its exit code is {value.get('exit_code')}.")
        if verdict.verdict != (follows := overall(verdict.gates, verdict.checks)):
            raise IntegrityError(f"the verdict is {verdict.verdict}, but {follows} follows from its gates and checks.")
        return verdict


_VERDICT = TypeAdapter(Verdict)


def verdict_schema() -> dict[str, Any]:
    """JSON Schema of verdict.json."""
    schema = _VERDICT.json_schema(mode="serialization")
    schema["properties"] |= {"version": {"const": VERDICT_VERSION}, "exit_code": {"enum": sorted(EXIT_CODES.values())}}
    schema["required"] += ["version", "exit_code"]
    return schema


def overall(gates: Iterable[GateRow], checks: Iterable[Check]) -> Outcome:
    """INVALID before FAIL before INCONCLUSIVE before PASS; INVALID when a check failed or nothing was gated."""
    found = {row.verdict for row in gates}
    if not found or not all(check.passed for check in checks):
        return "INVALID"
    return next(outcome for outcome in _WORST_FIRST if outcome in found)


def write_verdict(path: Path, verdict: Verdict) -> None:
    """Write verdict.json; the same verdict gives the same bytes."""
    write_atomic(path, readable_json(verdict.to_json()))


def read_verdict(path: Path) -> Verdict:
    """Read verdict.json; IntegrityError when it is missing, damaged or of another form."""
    try:
        value = read_json(path)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: missing.") from error
    try:
        return Verdict.from_json(value)
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from error
