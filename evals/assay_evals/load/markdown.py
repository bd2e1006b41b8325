"""A load test as Markdown, for a step summary or a comment on a pull request: the verdict first, then every figure."""

from __future__ import annotations

from assay_evals.load.findings import LevelFindings
from assay_evals.load.result import Result
from assay_evals.load.table import NOTHING, Figures, basis, figures, loaded
from assay_evals.report.gfm import bullets, details, escaped, table
from assay_evals.report.views import SIGNS


def load_markdown(result: Result) -> str:
    """The whole result but its requests."""
    parameters, environment = result.measured.parameters, result.measured.environment
    levels = result.findings
    rows = [
        (f"{row.name} {row.part}".rstrip(), *(_cell(row, level) for level in levels)) for row in figures(result.asked)
    ]
    facts = {
        "model": parameters.model,
        "loaded": loaded(parameters),
        "prompts": parameters.prompts,
        "started": result.measured.started,
        "processor": f"{environment.get('cpu', 'unknown')}, {environment.get('cores', '?')} cores",
    }
    if parameters.artifact is not None:
        facts["artifact"] = parameters.artifact.digest
    parts = (
        f"## {SIGNS[result.verdict]} {result.verdict}: load test of {escaped(parameters.model)}",
        bullets(result.reasons),
        table(("", *(str(level.load) for level in levels)), rows),
        bullets(basis(result.asked)),
        details("Notes", bullets(result.notes)),
        details("What was loaded", table(("what", "which"), list(facts.items()))),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(row: Figures, level: LevelFindings) -> str:
    """In one line, what stands below the figure in brackets."""
    figure, *below = row.cell(level).split("\n")
    if not below:
        return figure
    return f"{figure} {' '.join(below)}" if figure.startswith(NOTHING) else f"{figure} ({', '.join(below)})"
