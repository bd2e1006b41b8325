"""The verdict as a table for the terminal: one line per gate, then what was only measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from assay_evals import wording
from assay_evals.comparison import Compared
from assay_evals.report.views import contrast_lines, slice_views
from assay_evals.verdict import Outcome, Row, Verdict, limit_of
from assay_evals.wording import SLICE, is_control

# Each outcome has a sign beside its colour, for terminals without colour and people who do not see it.
_SIGNS: dict[Outcome, tuple[str, str]] = {
    "PASS": ("✓", "green"),
    "FAIL": ("✗", "red"),
    "INCONCLUSIVE": ("~", "yellow"),
    "INVALID": ("!", "magenta"),
}


_WORST = "\nof the slices by tag and by length, only each metric's worst"
_GAPS = "\nof percentiles, n gaps between tokens"


def verdict_table(verdict: Verdict, *, reported: bool = True) -> Table:
    """Metric and its limit, baseline, candidate, difference and its interval, samples, verdict; fits 80 columns.

    reported: also the metrics without a gate, but for the same-arm controls. Print it with rich.
    """
    sign, colour = _SIGNS[verdict.verdict]
    table = Table(
        title=Text(f"{sign} {verdict.verdict}", style=f"bold {colour}"),
        title_justify="left",
        box=None,
        pad_edge=False,
        collapse_padding=True,
        header_style="dim",
        caption=_caption(verdict),
        caption_justify="left",
    )
    table.add_column("metric", min_width=14)
    for name in ("baseline", "candidate", "difference", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in verdict.gates:
        limit = limit_of(row.criterion)
        asked = f"{'≥' if limit.at_least else '≤'} {wording.bare_number(row.metric, limit.value)}"
        table.add_row(*_cells(row, asked, limit.value), _outcome(row.verdict))
    rows = [row for row in verdict.reported if not is_control(row.metric)] if reported else []
    if reported:
        # An average can hide it.
        worst = [views[0].row for views in slice_views(verdict) if len(views) > 1]
        rows += worst
        gaps = any(row.metric.startswith("inter_token_latency.p") for row in rows)
        absent = [f"\n{wording.words(row.metric).label} not measured: {row.reason}" for row in rows if not row.n]
        table.caption = Text("".join((_caption(verdict), _WORST * bool(worst), _GAPS * gaps, *absent)))
    for row in rows:
        table.add_row(*_cells(row, "", None), "", style="dim")
    return table


def _caption(verdict: Verdict) -> str:
    """The confidence of the intervals: several where the gate may look again, because what is only reported is not widened for that."""
    quality, speed = set[float](), set[float]()
    rows = (*verdict.gates, *verdict.reported)
    # What is timed has a control, and what tokens cost follows from it.
    timed = {_whole(row.metric) for row in rows if is_control(row.metric)} | {"cost_per_million_tokens"}
    for row in rows:
        if row.confidence is not None and not is_control(row.metric):
            (speed if _whole(row.metric) in timed else quality).add(row.confidence)
    parts = ((quality, "quality", "tokens or questions in documents"), (speed, "speed", "processes in blocks"))
    told = [
        f"{kind} {', '.join(f'{100 * one:.3g}%' for one in sorted(found))}, n {unit}"
        for found, kind, unit in parts
        if found
    ]
    return f"intervals: {'; '.join(told)}" if told else ""


def _whole(metric: str) -> str:
    """The metric that a row of a length, of a percentile or of the control belongs to."""
    return metric.partition(SLICE)[0].partition(".")[0]


def comparison_table(runs: Sequence[Compared]) -> Table:
    """A row for each metric, a column for each run: its value, and under it the change from the first with its interval."""
    title = Text("each against the first; intervals hold together at 90%")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("metric", min_width=14)
    for run in runs:
        table.add_column(f"{run.name}\n{run.scheme}", justify="right", overflow="fold")
    table.add_row("verdict", *(_outcome(run.verdict) for run in runs))
    if any(run.dominated_by for run in runs):
        table.add_row("dominated by", *(run.dominated_by or "–" for run in runs))
    for contrasts in zip(*(run.contrasts for run in runs), strict=True):
        table.add_row(
            wording.words(contrasts[0].metric).label, *("\n".join(contrast_lines(contrast)) for contrast in contrasts)
        )
    return table


def _cells(row: Row, asked: str, limit: float | None) -> tuple[str, str, str, str, str]:
    interval = "" if row.interval is None else wording.interval(row.metric, row.interval, limit, bare=True)
    return (
        f"{wording.words(row.metric).label}\n  {asked}".rstrip(),
        wording.value(row.metric, row.baseline),
        wording.value(row.metric, row.candidate),
        f"{wording.difference(row.metric, row.difference, limit)}\n{interval}".rstrip(),
        f"{row.n:,}" if row.clusters is None else f"{row.n:,}\nin {row.clusters:,}",
    )


def _outcome(outcome: Outcome) -> Text:
    sign, colour = _SIGNS[outcome]
    return Text(f"{sign} {outcome}", style=colour)
