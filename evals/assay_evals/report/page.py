"""The report as one HTML page: what follows first, then the evidence for it, then everything needed to check it.

Nothing is fetched and nothing runs: style and charts are inline, and the page's own content policy forbids the rest.
Text from models and documents is escaped by the template. Left out on purpose: times of day, so that the same run gives
the same page.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from assay_evals import wording
from assay_evals.disagreements import mean_divergence, worst_disagreements
from assay_evals.evidence import Evidence
from assay_evals.report.charts import divergence_strip, forest_row, tradeoff
from assay_evals.report.layers import chart_layers, percent, read_layers
from assay_evals.verdict import GateRow, Row, Verdict, limit_of
from assay_evals.wording import SAME_ARM

FLIPS = 10
WINDOWS = 5
LONGEST_TEXT = 240
LONGEST_JSON = 60_000
# In the order in which a reader wants to know them.
_TILES = (
    "decode_tokens_per_second",
    "size_on_disk",
    "cloze_accuracy",
    "time_to_first_token",
    "peak_memory",
    "kl_divergence",
)
_MEANING = {
    "PASS": "It keeps every limit that its recipe set. It may be published.",
    "FAIL": "It breaks a limit that its recipe set. It is not published.",
    "INCONCLUSIVE": "The evidence does not settle it either way. It is not published.",
    "INVALID": "The measurement is broken, so it says nothing about the candidate. It is not published.",
}


@dataclass(frozen=True)
class RowView:
    """A row in words. `row` is kept for what the template decides on."""

    row: Row
    label: str
    baseline: str
    candidate: str
    difference: str
    interval: str
    confidence: str
    samples: str
    resolves: str


@dataclass(frozen=True)
class GateView(RowView):
    """A gate in words, with its interval drawn."""

    verdict: str
    asked: str
    chart: Markup


@dataclass(frozen=True)
class Tile:
    """One consequence: a large figure and what it is made of."""

    figure: str
    label: str
    change: str
    interval: str


def render(verdict: Verdict, evidence: Evidence, manifest: dict[str, Any], lock: dict[str, Any]) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    worst = worst_disagreements(evidence, max(FLIPS, WINDOWS))
    sound = verdict.verdict != "INVALID"
    largest = max((value or 0.0 for window in worst.windows[:WINDOWS] for value in window.kl), default=0.0)
    return environment.get_template("page.html.j2").render(
        style=Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8")),
        verdict=verdict,
        meaning=_MEANING[verdict.verdict],
        header=evidence.header,
        bits_per_parameter=_bits_per_parameter(evidence, manifest),
        summary=_summary(verdict) if sound else "",
        tiles=_tiles(verdict) if sound else [],
        gates=[_gate_view(row) for row in verdict.gates],
        reported=[_row_view(row) for row in verdict.reported if not row.metric.endswith(SAME_ARM)],
        controls=[_row_view(row) for row in verdict.reported if row.metric.endswith(SAME_ARM)],
        tradeoff=_tradeoff(verdict, evidence),
        layers=chart_layers(read_layers(manifest)),
        fallbacks=[str(sentence) for sentence in manifest.get("fallbacks", [])],
        flips=worst.flips[:FLIPS],
        flips_total=sum(row.baseline.correct and not row.candidate.correct for row in evidence.clozes),
        clozes_total=len(evidence.clozes),
        windows=[
            (window, divergence_strip(window, largest), mean_divergence(window)) for window in worst.windows[:WINDOWS]
        ],
        environment=_flat(evidence.header.environment),
        lock=_clip(json.dumps(lock, indent=2, sort_keys=True, ensure_ascii=False, default=str), LONGEST_JSON),
        shorten=lambda text: _clip(text, LONGEST_TEXT),
        percent=percent,
    )


def _summary(verdict: Verdict) -> str:
    """The consequences in one sentence, for a pull request or a message."""
    rows = [row for metric in _TILES[:3] if (row := verdict.row(metric)) and row.difference is not None]
    rows += [row for row in verdict.gates if row not in rows and _is_worse(row)]
    phrases = [wording.consequence(row.metric, row.difference) + _in_brackets(row) for row in rows]
    sentence = ", ".join(phrases)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else "Nothing was measured."


def _is_worse(row: Row) -> bool:
    """Whether all of a ratio's interval is on the bad side of no change."""
    words = wording.words(row.metric)
    if row.interval is None or words.difference != "factor":
        return False
    return row.interval[1] < 1 if words.higher_is_better else row.interval[0] > 1


def _bits_per_parameter(evidence: Evidence, manifest: dict[str, Any]) -> float | None:
    """Bits on disk for each parameter of the model, all files counted; None where the manifest does not say how many it has."""
    parameters = manifest.get("parameters")
    return 8 * evidence.header.candidate.size_bytes / parameters if parameters else None


def _in_brackets(row: Row) -> str:
    if row.interval is None or row.confidence is None:
        return ""
    return f" ({100 * row.confidence:.0f}% interval {wording.interval(row.metric, row.interval)})"


def _tiles(verdict: Verdict) -> list[Tile]:
    rows = [row for metric in _TILES if (row := verdict.row(metric)) and row.difference is not None]
    return [_tile(row) for row in rows]


def _tile(row: Row) -> Tile:
    phrase = wording.headline(row.metric, row.difference or 0.0)
    change = f"{wording.value(row.metric, row.baseline)} → {wording.value(row.metric, row.candidate)}"
    interval = wording.interval(row.metric, row.interval)
    if row.confidence is not None:
        interval = f"{100 * row.confidence:.0f}% interval {interval}"
    return Tile(phrase[0], phrase[1], "" if row.baseline is None else change, interval)


def _words(row: Row, limit: float | None = None) -> dict[str, Any]:
    groups = "" if row.clusters is None else f" in {row.clusters:,}"
    return {
        "row": row,
        "label": _capital(wording.words(row.metric).label),
        "baseline": wording.value(row.metric, row.baseline),
        "candidate": wording.value(row.metric, row.candidate),
        "difference": wording.difference(row.metric, row.difference, limit),
        "interval": wording.interval(row.metric, row.interval, limit),
        "confidence": "" if row.confidence is None else f"{100 * row.confidence:.0f}%",
        "samples": f"{row.n:,}{groups}",
        "resolves": wording.distance(row.metric, row.minimum_detectable),
    }


def _row_view(row: Row) -> RowView:
    return RowView(**_words(row))


def _gate_view(row: GateRow) -> GateView:
    return GateView(
        **_words(row, limit_of(row.criterion).value),
        verdict=row.verdict,
        asked=wording.criterion(row.metric, row.criterion),
        chart=forest_row(row),
    )


def _tradeoff(verdict: Verdict, evidence: Evidence) -> Markup:
    speed, quality = verdict.row("decode_tokens_per_second"), verdict.row("cloze_accuracy")
    if speed is None or quality is None:
        return Markup("")
    names = ("baseline", f"candidate, {evidence.header.candidate.scheme}")
    return tradeoff(quality, speed, verdict.row(speed.metric + SAME_ARM), names)


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (innermost name, text) pairs, in the order it has."""
    if not isinstance(value, dict):
        return [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
    return [pair for key, item in value.items() for pair in _flat(item, str(key))]


def _clip(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
