"""The report of a run: HTML for people, Markdown for a pull request, JUnit XML for CI, and a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from assay.files import readable_json

if TYPE_CHECKING:
    from assay_evals.evidence import Evidence
    from assay_evals.verdict import Verdict

ReportFormat = Literal["html", "markdown", "junit", "json"]


def render_report(
    form: ReportFormat, verdict: Verdict, evidence: Evidence, manifest: dict[str, Any], lock: dict[str, Any]
) -> bytes:
    """One self-contained file: no network, no script; the same run gives the same bytes.

    manifest, lock: the JSON of the candidate's manifest.json and assay.lock.json.
    """
    if form == "json":
        return readable_json(verdict.to_json())
    if form == "junit":
        from assay_evals.report.junit import render_junit

        return render_junit(verdict, evidence.header.recipe.name).encode()
    if form == "markdown":
        from assay_evals.report.markdown import render_markdown

        return render_markdown(verdict, evidence, manifest).encode()
    from assay_evals.report.page import render

    return render(verdict, evidence, manifest, lock).encode()
