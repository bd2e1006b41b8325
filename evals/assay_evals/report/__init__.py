"""The report of a run: one HTML file for people, and a table for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from assay.files import write_atomic
from assay_evals.evidence import Evidence
from assay_evals.verdict import Verdict


def write_report(
    path: Path, verdict: Verdict, evidence: Evidence, manifest: dict[str, Any], lock: dict[str, Any]
) -> None:
    """Write one self-contained HTML file: no network, no script; the same run gives the same bytes.

    manifest, lock: the JSON of the candidate's manifest.json and assay.lock.json.
    """
    from assay_evals.report.page import render

    write_atomic(path, render(verdict, evidence, manifest, lock).encode())
