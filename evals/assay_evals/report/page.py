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

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from assay_evals import wording
from assay_evals.disagreements import mean_divergence, worse_outputs, worst_disagreements
from assay_evals.encoder_findings import in_common, is_apart, same_class, worst_encoded
from assay_evals.evidence import Continuation, Continued, Evidence
from assay_evals.report.charts import curves, divergence_strip, forest_row, tradeoff
from assay_evals.report.layers import chart_layers, percent, read_layers
from assay_evals.report.views import (
    FLIPS,
    MEANING,
    TILES,
    RowView,
    capital,
    clip,
    ending,
    row_view,
    slice_views,
    summary,
    worth,
)
from assay_evals.task_findings import Judged
from assay_evals.verdict import GateRow, Row, Verdict, limit_of
from assay_evals.wording import SAME_ARM, SLICE

WINDOWS = 5
CONTINUATIONS = 5
LONGEST_TEXT = 240
LONGEST_JSON = 60_000


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


@dataclass(frozen=True)
class TaskView:
    """The worst of the answers to a task that became wrong, of how many."""

    name: str
    items: tuple[Judged, ...]
    total: int


def render(verdict: Verdict, evidence: Evidence, manifest: dict[str, Any], lock: dict[str, Any]) -> str:
    """The page as text."""
    worst = worst_disagreements(evidence, max(FLIPS, WINDOWS))
    encoded = worst_encoded(evidence, WINDOWS)
    sound = verdict.verdict != "INVALID"
    largest = max((value or 0.0 for window in worst.windows[:WINDOWS] for value in window.kl), default=0.0)
    return template("page.html.j2").render(
        verdict=verdict,
        meaning=MEANING[verdict.verdict],
        header=evidence.header,
        bits_per_parameter=_bits_per_parameter(evidence, manifest),
        summary=summary(verdict) if sound else "",
        tiles=_tiles(verdict) if sound else [],
        gates=[_gate_view(row) for row in verdict.gates],
        reported=[row_view(row) for row in verdict.reported if not row.metric.endswith(SAME_ARM)],
        controls=[row_view(row) for row in verdict.reported if row.metric.endswith(SAME_ARM)],
        slices=slice_views(verdict),
        tradeoff=_tradeoff(verdict, evidence),
        latencies=_latencies(verdict),
        layers=chart_layers(read_layers(manifest)),
        fallbacks=[str(sentence) for sentence in manifest.get("fallbacks", [])],
        flips=worst.flips[:FLIPS],
        flips_total=sum(row.baseline.correct and not row.candidate.correct for row in evidence.clozes),
        clozes_total=len(evidence.clozes),
        continuations=[
            (row, _rest(row, row.baseline), _rest(row, row.candidate)) for row in worst.continuations[:CONTINUATIONS]
        ],
        continuations_total=len(evidence.continuations),
        parted_total=sum(not row.alike for row in evidence.continuations),
        outputs=worst.outputs[:FLIPS],
        outputs_worse=len(worse_outputs(evidence)),
        outputs_total=len(evidence.structured),
        tasks=[
            TaskView(name, items, sum(row.task == name for row in evidence.tasks))
            for name, items in worst.tasks.items()
            if items
        ],
        windows=[
            (window, divergence_strip(window, largest), mean_divergence(window)) for window in worst.windows[:WINDOWS]
        ],
        moved=encoded.moved,
        apart=encoded.apart,
        apart_total=sum(map(is_apart, evidence.retrievals)),
        retrieved_total=len(evidence.retrievals),
        reclassified=encoded.reclassified,
        reclassified_total=sum(not same_class(row) for row in evidence.classes),
        classes_total=len(evidence.classes),
        common=in_common,
        environment=_flat(evidence.header.environment),
        lock=clip(json.dumps(lock, indent=2, sort_keys=True, ensure_ascii=False, default=str), LONGEST_JSON),
        shorten=lambda text: clip(text, LONGEST_TEXT),
        ending=lambda text: ending(text, LONGEST_TEXT),
        worth=worth,
        percent=percent,
    )


def template(name: str) -> Template:
    """A page's template, which knows the style sheet; text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(name, globals={"style": style})


def _rest(row: Continuation, arm: Continued) -> str:
    """What an arm wrote after the two parted."""
    rest = arm.text.removeprefix(row.together)
    return f"{rest} ▪" if arm.ended else f"{rest} …"


def _bits_per_parameter(evidence: Evidence, manifest: dict[str, Any]) -> float | None:
    """Bits on disk for each parameter of the model, all files counted; None where the manifest does not say how many it has."""
    parameters = manifest.get("parameters")
    return 8 * evidence.header.candidate.size_bytes / parameters if parameters else None


def _tiles(verdict: Verdict) -> list[Tile]:
    rows = [row for metric in TILES if (row := verdict.row(metric)) and row.difference is not None]
    return [_tile(row) for row in rows]


def _tile(row: Row) -> Tile:
    phrase = wording.headline(row.metric, row.difference or 0.0)
    change = f"{wording.value(row.metric, row.baseline)} → {wording.value(row.metric, row.candidate)}"
    interval = wording.interval(row.metric, row.interval)
    if row.confidence is not None:
        interval = f"{100 * row.confidence:.0f}% interval {interval}"
    return Tile(phrase[0], phrase[1], "" if row.baseline is None else change, interval)


def _gate_view(row: GateRow) -> GateView:
    return GateView(
        **vars(row_view(row, limit_of(row.criterion).value)),
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


def _latencies(verdict: Verdict) -> list[tuple[str, Markup]]:
    """For each time that was measured at several lengths of the prompt, its label and its curve."""
    found: dict[str, list[tuple[int, Row]]] = {}
    for row in (*verdict.gates, *verdict.reported):
        metric, _, length = row.metric.partition(f"{SLICE}prompt_tokens=")
        if length.isdigit() and wording.words(metric).unit == "seconds":
            found.setdefault(metric, []).append((int(length), row))
    charts = [
        (
            capital(wording.words(metric).label),
            curves(sorted(rows, key=lambda pair: pair[0]), f"{wording.words(metric).label}, seconds"),
        )
        for metric, rows in found.items()
    ]
    return [(label, chart) for label, chart in charts if chart]


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (innermost name, text) pairs, in the order it has."""
    if not isinstance(value, dict):
        return [(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]
    return [pair for key, item in value.items() for pair in _flat(item, str(key))]
