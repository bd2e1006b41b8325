"""A load test in figures: a row for each, a column for each level, intervals below them; and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from assay_evals.load.findings import LevelFindings, Percentile, Share, Spread, Throughput
from assay_evals.load.objectives import Asked
from assay_evals.load.quantiles import CONFIDENCE, LEVELS
from assay_evals.load.records import Parameters
from assay_evals.load.result import Result
from assay_evals.load.wire import clipped

_LEVELS_BESIDE = 3
NOTHING = "–"
_LATENCIES: tuple[tuple[str, Callable[[LevelFindings], tuple[Percentile, ...]]], ...] = (
    ("time to first token", lambda level: level.time_to_first_token),
    ("inter-token latency", lambda level: level.inter_token_latency),
    ("time per output token", lambda level: level.time_per_output_token),
    ("end to end", lambda level: level.end_to_end_latency),
)


@dataclass(frozen=True)
class Figures:
    """One row.  part: which percentile of what is named, else empty.  cell: of a level, its interval on a line of its own."""

    name: str
    part: str
    cell: Callable[[LevelFindings], str]


def figures(asked: Asked) -> list[Figures]:
    """The rows, in the order in which a reader wants them."""
    goodput = [
        Figures("met every objective", "", lambda level: _share(level.good_share)),
        Figures("goodput", "", lambda level: _throughput(level.goodput_requests_per_second, "req/s")),
    ]
    cost = Figures(
        "cost of 1M output tokens", "", lambda level: _throughput(level.cost_per_million_output_tokens, asked.currency)
    )
    return [
        Figures("requests", "", lambda level: f"{level.requests:,}\nafter {level.warm_up:,} more"),
        Figures("failed", "", _failed),
        *(goodput if asked.objectives else []),
        Figures("request throughput", "", lambda level: _throughput(level.requests_per_second, "req/s")),
        Figures("output throughput", "", lambda level: _throughput(level.output_tokens_per_second, "tok/s")),
        *(
            Figures(name, f"p{100 * quantile:.0f}", lambda level, at=at, of=of: _percentile(of(level), at))
            for name, of in _LATENCIES
            for at, quantile in enumerate(LEVELS)
        ),
        *([] if asked.price_per_hour is None else [cost]),
        Figures("prompt tokens", "", lambda level: _spread(level.prompt_tokens)),
        Figures("output tokens", "", lambda level: _spread(level.output_tokens)),
    ]


def load_tables(result: Result) -> list[Table]:
    """Three levels to a table, which fits 80 columns."""
    levels = result.findings
    return [_table(result, levels[first : first + _LEVELS_BESIDE]) for first in range(0, len(levels), _LEVELS_BESIDE)]


def _table(result: Result, levels: Sequence[LevelFindings]) -> Table:
    parameters = result.measured.parameters
    table = Table(
        title=Text(f"{clipped(parameters.model)}\n{loaded(parameters)}"),
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
        caption=Text("\n".join(basis(result.asked))),
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for level in levels:
        table.add_column(str(level.load), justify="right", no_wrap=True)
    named = ""
    for row in figures(result.asked):
        label = f"{'' if row.name == named else row.name:<21} {row.part}" if row.part else row.name
        table.add_row(label, *(Text(row.cell(level)) for level in levels))
        named = row.name
    return table


def loaded(parameters: Parameters) -> str:
    """What the load was on."""
    artifact = parameters.artifact
    if artifact is None:
        return f"{parameters.api} of {parameters.endpoint}"
    return f"{artifact.directory} on {artifact.runtime}, {artifact.cores} cores: {artifact.shared}"


def basis(asked: Asked) -> list[str]:
    """What the figures are of, a line each."""
    lines = [f"intervals at {100 * CONFIDENCE:.0f}%; latencies of the requests that succeeded"]
    return [*lines, f"objectives of a request: {asked.objectives}"] if asked.objectives else lines


def _failed(level: LevelFindings) -> str:
    counts = [f"{failures.count:,} {failures.kind}" for failures in level.failures]
    return "\n".join((_share(level.error_rate), *counts))


def _share(share: Share | None) -> str:
    if share is None:
        return NOTHING
    low, high = (100 * bound for bound in share.interval)
    return f"{100 * share.value:.1f}%\n{low:.1f} to {high:.1f}"


def _throughput(found: Throughput | None, unit: str) -> str:
    if found is None:
        return NOTHING
    value = f"{_figures(found.value)} {unit}"
    if found.interval is None:
        return value if found.needs_requests is None else f"{value}\n{_needs(found.needs_requests)}"
    low, high = (_figures(bound) for bound in found.interval)
    return f"{value}\n{low} to {high}"


def _percentile(percentiles: tuple[Percentile, ...], position: int) -> str:
    if not percentiles:
        return NOTHING
    found = percentiles[position]
    if found.seconds is None or found.interval is None:
        return _needs(found.needs_requests)
    scale, unit = (1.0, "s") if found.seconds >= 1 else (1000.0, "ms")
    low, high = (_figures(scale * bound) for bound in found.interval)
    return f"{_figures(scale * found.seconds)} {unit}\n{low} to {high}"


def _needs(requests: int | None) -> str:
    return f"{NOTHING}, needs\n{requests:,} requests"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return NOTHING
    if spread.smallest == spread.largest:
        return f"{spread.smallest:,}"
    return f"{spread.median:,.0f}\n{spread.smallest:,} to {spread.largest:,}"


def _figures(number: float) -> str:
    """Three significant digits or all before the point: 0.0412, 1.23, 51.2, 1,204."""
    if number >= 100 or number == 0:
        return f"{number:,.0f}"
    for digits in (1, 2, 3):
        if number >= 10 ** (2 - digits):
            return f"{number:.{digits}f}"
    return f"{number:.3g}"
