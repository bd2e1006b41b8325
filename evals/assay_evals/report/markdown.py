"""The report as Markdown, for a comment on a pull request or a step summary: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay_evals import wording
from assay_evals.disagreements import worst_disagreements
from assay_evals.encoder_findings import worst_encoded
from assay_evals.evidence import Check, Evidence
from assay_evals.report.gfm import bullets, details, escaped, table
from assay_evals.report.views import FLIPS, MEANING, SIGNS, RowView, clip, ending, row_view, slice_views, summary, worth
from assay_evals.task_findings import Judged
from assay_evals.verdict import GateRow, Row, Verdict, limit_of
from assay_evals.wording import SAME_ARM

_LONGEST_TEXT = 160


def render_markdown(verdict: Verdict, evidence: Evidence, manifest: dict[str, Any]) -> str:
    """The report as text. manifest: the candidate's manifest.json."""
    reported = [row for row in verdict.reported if not row.metric.endswith(SAME_ARM)]
    parts = (
        f"## {SIGNS[verdict.verdict]} {verdict.verdict}: {escaped(evidence.header.recipe.name)}",
        "" if verdict.verdict == "INVALID" else summary(verdict),
        MEANING[verdict.verdict],
        "" if verdict.passed else bullets(verdict.reasons),
        _gates(verdict.gates),
        details("Measured, not gated", table(_COLUMNS, [_cells(row) for row in reported])),
        details(
            "Slices, the worst first",
            table(_COLUMNS, [_words(view) for views in slice_views(verdict) for view in views]),
        ),
        details("Checks", bullets(_check(check) for check in verdict.checks)),
        details("Other than the recipe plainly says", bullets(manifest.get("fallbacks", []))),
        *_flips(evidence),
        _outputs(evidence),
        *_encoded(evidence),
        details("What was compared", _facts(verdict, evidence)),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


_COLUMNS = ("metric", "baseline", "candidate", "difference", "interval", "n", "resolves")


def _gates(gates: Sequence[GateRow]) -> str:
    rows = [
        (
            *_cells(row, limit_of(row.criterion).value),
            wording.criterion(row.metric, row.criterion),
            f"{SIGNS[row.verdict]} {row.verdict}",
        )
        for row in gates
    ]
    return table((*_COLUMNS, "asked", "verdict"), rows)


def _cells(row: Row, limit: float | None = None) -> tuple[str, ...]:
    return _words(row_view(row, limit))


def _words(view: RowView) -> tuple[str, ...]:
    interval = f"{view.interval} ({view.confidence})" if view.confidence else view.interval
    return (view.label, view.baseline, view.candidate, view.difference, interval, view.samples, view.resolves)


def _check(check: Check) -> str:
    return f"{check.name}: {'holds' if check.passed else 'FAILED'}. {check.detail}"


def _flips(evidence: Evidence) -> list[str]:
    """The worst answers that went from right to wrong, both beside each other."""
    worst = worst_disagreements(evidence, FLIPS)
    clozes = [
        (f"… {flip.context[-_LONGEST_TEXT:]}", flip.word, flip.baseline.answer, flip.candidate.answer)
        for flip in worst.flips
    ]
    parts = [_flip_table("The {} worst of the answers that became wrong", "text", clozes)]
    for name, items in worst.tasks.items():
        rows = [
            (ending(item.row.prompt, _LONGEST_TEXT), clip(item.expected, _LONGEST_TEXT), *_answers(item))
            for item in items
        ]
        parts.append(_flip_table(f"The {{}} worst of the answers to the task {name} that became wrong", "item", rows))
    return parts


def _answers(item: Judged) -> tuple[str, str]:
    return clip(item.answers[0], _LONGEST_TEXT), clip(item.answers[1], _LONGEST_TEXT)


def _flip_table(title: str, what: str, rows: Sequence[Sequence[str]]) -> str:
    return details(title.format(len(rows)), table((what, "expected", "baseline", "candidate"), rows))


def _outputs(evidence: Evidence) -> str:
    """The worst of the structured outputs that are worse from the candidate, both beside each other."""
    rows = [
        (
            ending(row.prompt, _LONGEST_TEXT),
            clip(row.schema, _LONGEST_TEXT),
            f"{worth(row.baseline)}: {clip(row.baseline.text, _LONGEST_TEXT)}",
            f"{worth(row.candidate)}: {clip(row.candidate.text, _LONGEST_TEXT)}",
        )
        for row in worst_disagreements(evidence, FLIPS).outputs
    ]
    if not rows:
        return ""
    return details(
        f"The {len(rows)} worst of the structured outputs that became worse",
        table(("prompt", "schema", "baseline", "candidate"), rows),
    )


def _encoded(evidence: Evidence) -> list[str]:
    """The worst of what an encoder made of texts."""
    worst = worst_encoded(evidence, FLIPS)
    moved = [(clip(row.text, _LONGEST_TEXT), row.document, f"{row.cosine or 0.0:.4f}") for row in worst.moved]
    apart = [
        (clip(row.text, _LONGEST_TEXT), row.own, ", ".join(row.baseline[:3]), ", ".join(row.candidate[:3]))
        for row in worst.apart
    ]
    classes = [
        (clip(row.text, _LONGEST_TEXT), row.label or "–", row.baseline.name, row.candidate.name)
        for row in worst.reclassified
    ]
    return [
        details(f"The {len(moved)} embeddings that moved most", table(("text", "document", "cosine"), moved)),
        details(
            f"The {len(apart)} queries whose passages have the fewest in common",
            table(("query", "its passage", "baseline", "candidate"), apart),
        ),
        details(
            f"The {len(classes)} worst of the texts whose class changed",
            table(("text", "right", "baseline", "candidate"), classes),
        ),
    ]


def _facts(verdict: Verdict, evidence: Evidence) -> str:
    header = evidence.header
    facts = {
        "candidate": f"{header.candidate.scheme} on {header.candidate.runtime}, {verdict.candidate}",
        "baseline": f"the same model, unquantized, in {header.baseline.dtype}, {verdict.baseline}",
        "text": f"{header.text.source}, {header.text.documents:,} documents, {header.text.digest}",
        "recipe": verdict.recipe,
        "evidence": verdict.evidence,
        "processor": f"{header.environment.get('cpu', 'unknown')}, {header.environment.get('cores', '?')} cores",
    }
    return table(("what", "which"), list(facts.items()))
