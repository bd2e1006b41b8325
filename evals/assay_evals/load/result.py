"""The result of a load test: what was asked, what was measured, and what follows; the form of its JSON.

`levels` holds every request with its timestamps, so that all the rest can be computed again: `assay bench --from result.json`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from assay.errors import EXIT_FAIL, EXIT_INVALID, EXIT_OK, IntegrityError
from assay.files import canonical_json, read_json, write_atomic
from assay_evals.load.findings import LevelFindings, find, reasons_to_fail
from assay_evals.load.objectives import Asked
from assay_evals.load.records import Measured
from assay_evals.load.runner import INTERRUPTED

RESULT_VERSION = 1
EXIT_INTERRUPTED = 130
Word = Literal["PASS", "FAIL", "INVALID"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Measured, what it comes to, and the word on it."""

    measured: Measured
    asked: Asked
    findings: tuple[LevelFindings, ...]
    verdict: Word
    reasons: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know beside the figures, of the whole run and of each level."""
        of_levels = tuple(f"{level.load}: {note}" for level in self.findings for note in level.notes)
        return self.measured.parameters.notes + of_levels

    @property
    def interrupted(self) -> bool:
        return any(level.stopped == INTERRUPTED for level in self.measured.levels)

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return EXIT_INTERRUPTED
        return {"PASS": EXIT_OK, "FAIL": EXIT_FAIL, "INVALID": EXIT_INVALID}[self.verdict]

    def to_json(self, *, raw: bool) -> dict[str, Any]:
        """raw: with every request."""
        measured: dict[str, Any] = _MEASURED.dump_python(self.measured, mode="json")
        if not raw:
            del measured["levels"]
        return measured | {
            "version": RESULT_VERSION,
            "asked": dataclasses.asdict(self.asked),
            "findings": [dataclasses.asdict(level) for level in self.findings],
            "verdict": self.verdict,
            "reasons": self.reasons,
            "exit_code": self.exit_code,
        }


_MEASURED = TypeAdapter(Measured)
_DERIVED = ("version", "asked", "findings", "verdict", "reasons", "exit_code")


def conclude(measured: Measured, asked: Asked) -> Result:
    """Findings and verdict: a level that was stopped makes it INVALID, limits that are not kept FAIL."""
    findings = tuple(find(level, measured.parameters, asked) for level in measured.levels)
    stopped = tuple(f"{level.load}: {level.stopped}." for level in measured.levels if level.stopped)
    reasons = stopped or tuple(reasons_to_fail(findings, asked))
    verdict: Word = "INVALID" if stopped else "FAIL" if reasons else "PASS"
    return Result(measured=measured, asked=asked, findings=findings, verdict=verdict, reasons=reasons)


def write_result(path: Path, result: Result) -> None:
    """Write result.json, whole or not at all."""
    write_atomic(path, canonical_json(result.to_json(raw=True)) + b"\n")


def read_measured(path: Path) -> Measured:
    """The raw data of a result.json; IntegrityError when it is something else."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("version") != RESULT_VERSION or "levels" not in value:
        raise IntegrityError(f"{path}: not a version {RESULT_VERSION} result of assay bench with its requests.")
    try:
        return _MEASURED.validate_json(
            canonical_json({name: item for name, item in value.items() if name not in _DERIVED})
        )
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in detail["loc"])
        raise IntegrityError(f"{path}: {place}: {detail['msg']}. Use the Assay release that wrote it.") from error
