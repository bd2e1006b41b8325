"""Candidates against each other as one HTML page: which of them is worth its price, then every metric."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from assay_evals import wording
from assay_evals.comparison import Compared, Place
from assay_evals.report.charts import Point, scatter
from assay_evals.report.page import template
from assay_evals.report.views import capital, contrast_lines


def render_comparison(runs: Sequence[Compared]) -> bytes:
    """The page: self-contained, without scripts; the same comparison gives the same bytes."""
    rows = [
        (capital(wording.words(contrasts[0].metric).label), [contrast_lines(contrast) for contrast in contrasts])
        for contrasts in zip(*(run.contrasts for run in runs), strict=True)
    ]
    return template("comparison.html.j2").render(runs=runs, rows=rows, chart=_chart(runs)).encode()


def _chart(runs: Sequence[Compared]) -> Markup:
    placed = [(run, *run.places) for run in runs if run.places]
    if not placed:
        return Markup("")
    points = [
        Point(run.name, _bounds(gain), _bounds(quality), run.dominated_by is not None) for run, gain, quality in placed
    ]
    _, gain, quality = placed[0]
    share = wording.words(quality.metric).unit == "share"
    return scatter(points, (_axis(gain.metric), _axis(quality.metric)), percent=share)


def _bounds(place: Place) -> tuple[float, float, float]:
    return place.interval[0], place.value, place.interval[1]


def _axis(metric: str) -> str:
    unit = {"factor": "candidate / baseline", "points": "points"}.get(wording.words(metric).difference)
    return f"{wording.words(metric).label}, {unit or wording.words(metric).unit}"
