"""Charts as hand-made SVG. Positions are numbers, and names are escaped where the markup is made.

Colours come from the page's style sheet by class, so that charts follow its light and dark themes; every colour has a
second mark (shape, word or hatching) beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from assay_evals import wording
from assay_evals.evidence import Window
from assay_evals.verdict import GateRow, Row, limit_of

_MARKS = {
    "PASS": "<circle r='6'/>",
    "FAIL": "<path d='M-6.5 0 0-6.5 6.5 0 0 6.5Z'/>",
    "INCONCLUSIVE": "<circle r='5' class='hollow'/>",
}


# What is 1 where nothing changed, though the baseline has none.
_ALIKE = (
    "top1_agreement",
    "greedy_agreement",
    "embedding_cosine",
    "similarity_rank",
    "retrieval_agreement",
    "class_agreement",
)


def forest_row(row: GateRow) -> Markup:
    """A gate's interval against its limit, 100% wide and 44 px high: the limit is the middle, good is right.

    Positions are percentages, so that marks and lines keep their size on any screen. Each row has its own scale.
    """
    if row.interval is None or row.difference is None:
        return Markup("")
    scale = math.log if wording.words(row.metric).difference == "factor" else float
    limit = limit_of(row.criterion)
    sign = 1 if limit.at_least else -1
    unchanged = no_change(row.metric)
    distances = [sign * (scale(value) - scale(limit.value)) for value in (*row.interval, row.difference, unchanged)]
    span = max(abs(distance) for distance in distances) * 1.1 or 1.0
    low, high, point, reference = (f"{50 + 50 * distance / span:.2f}%" for distance in distances)
    left, right = (low, high) if sign > 0 else (high, low)
    label = f"{wording.words(row.metric).label}: {row.verdict}. {row.reason}"
    whisker = "" if left == right else f"<line x1='{left}' x2='{right}' y1='22' y2='22'/>{_cap(left)}{_cap(right)}"
    return Markup(
        f"<svg class='forest {row.verdict.lower()}' width='100%' height='44' role='img' aria-label='{escape(label)}'>"
        "<rect class='bad' width='50%' height='44'/><rect class='fine' x='50%' width='50%' height='44'/>"
        f"<line class='unchanged' x1='{reference}' x2='{reference}' y1='8' y2='36'/>"
        "<line class='limit' x1='50%' x2='50%' y1='0' y2='44'/>"
        f"<g class='whisker'>{whisker}</g>"
        f"<svg class='mark' x='{point}' y='22' overflow='visible'>{_MARKS[row.verdict]}</svg></svg>"
    )


def no_change(metric: str) -> float:
    """The difference of a candidate that behaves as its baseline does."""
    if wording.words(metric).difference == "factor" or metric.startswith(_ALIKE):
        return 1.0
    return 0.0


def _cap(x: str) -> str:
    return f"<line x1='{x}' x2='{x}' y1='17' y2='27'/>"


@dataclass(frozen=True)
class Axis:
    """A linear axis: values low … high lie on pixels start … stop."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """About five round values within the axis."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]


def tradeoff(quality: Row, speed: Row, control: Row | None, names: tuple[str, str]) -> Markup:
    """Quality against speed: baseline and candidate, with what the gates allow; names: (baseline, candidate).

    The candidate's bars are the intervals of the paired differences, laid at the baseline. The baseline's own bar is
    the A/A control: how far two runs of one build lie apart.
    """
    if quality.baseline is None or quality.candidate is None or speed.baseline is None or speed.candidate is None:
        return Markup("")
    if quality.interval is None or speed.interval is None:
        return Markup("")
    base_x, base_y = speed.baseline, 100 * quality.baseline
    point_x, point_y = speed.candidate, 100 * quality.candidate
    bar_x = [base_x * end for end in speed.interval]
    bar_y = [base_y + 100 * end for end in quality.interval]
    control_x = [base_x * end for end in control.interval] if control and control.interval else [base_x, base_x]
    lowest_x = base_x * speed.margin if isinstance(speed, GateRow) else None
    lowest_y = base_y - 100 * quality.margin if isinstance(quality, GateRow) else None
    x = _padded([0, base_x, point_x, *bar_x, *control_x, lowest_x or 0], 58, 464, from_zero=True)
    y = _padded([base_y, point_y, *bar_y, base_y if lowest_y is None else lowest_y], 268, 18)
    parts: list[str] = []
    if lowest_x is not None and lowest_y is not None:
        left, bottom = x.at(lowest_x), y.at(lowest_y)
        width, height = max(464 - left, 0), max(bottom - 18, 0)
        parts.append(f"<rect class='allowed' x='{left:.1f}' y='18' width='{width:.1f}' height='{height:.1f}'/>")
        parts.append(f"<text class='allowed-label' x='{left + 8:.1f}' y='{bottom - 8:.1f}'>what the gates allow</text>")
    parts += [
        f"<line class='move' x1='{x.at(base_x):.1f}' y1='{y.at(base_y):.1f}' "
        f"x2='{x.at(point_x):.1f}' y2='{y.at(point_y):.1f}'/>",
        _bar((x.at(control_x[0]), y.at(base_y)), (x.at(control_x[1]), y.at(base_y)), "baseline"),
        _bar((x.at(bar_x[0]), y.at(point_y)), (x.at(bar_x[1]), y.at(point_y)), "candidate"),
        _bar((x.at(point_x), y.at(bar_y[0])), (x.at(point_x), y.at(bar_y[1])), "candidate"),
        _dot(x.at(base_x), y.at(base_y), "baseline", names[0]),
        _dot(x.at(point_x), y.at(point_y), "candidate", names[1]),
    ]
    labels = ("decode speed, tokens per second", wording.words(quality.metric).label)
    return _framed((x, y), parts, labels, title="Quality against decode speed", unit="%")


@dataclass(frozen=True)
class Point:
    """One candidate of several: its place with the interval on each axis."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    dominated: bool


def scatter(points: Sequence[Point], labels: tuple[str, str], percent: bool) -> Markup:
    """Candidates beside each other, (low, value, high) on both axes; hollow: another is no worse in either. labels: of the axes.

    percent: whether the vertical axis is a share.
    """
    scale = 100 if percent else 1
    x = _padded([value for point in points for value in point.x], 58, 464)
    y = _padded([scale * value for point in points for value in point.y], 268, 18)
    parts: list[str] = []
    for point in points:
        across, up = ([x.at(value) for value in point.x], [y.at(scale * value) for value in point.y])
        kind = "baseline" if point.dominated else "candidate"
        parts += [
            _bar((across[0], up[1]), (across[2], up[1]), kind),
            _bar((across[1], up[0]), (across[1], up[2]), kind),
            _dot(across[1], up[1], "dominated" if point.dominated else "candidate", point.name),
        ]
    return _framed((x, y), parts, labels, title=f"{labels[1]} against {labels[0]}")


def curves(rows: Sequence[tuple[int, Row]], label: str) -> Markup:
    """A time at several lengths of the prompt, of both arms; rows: (tokens of the prompt, candidate / baseline), by rising length.

    The candidate's bars are the intervals of the paired ratio, laid at the baseline.
    """
    points = [
        (length, row.baseline, row.candidate, [row.baseline * end for end in row.interval])
        for length, row in rows
        if row.baseline is not None and row.candidate is not None and row.interval is not None
    ]
    if len(points) < 2:
        return Markup("")
    x = _padded([0, *(float(point[0]) for point in points)], 58, 464, from_zero=True)
    y = _padded([0, *(value for _, before, after, bar in points for value in (before, after, *bar))], 268, 18, True)
    parts: list[str] = []
    arms = {
        "baseline": [(x.at(length), y.at(before)) for length, before, _, _ in points],
        "candidate": [(x.at(length), y.at(after)) for length, _, after, _ in points],
    }
    for arm, places in arms.items():
        path = " ".join(f"{across:.1f},{up:.1f}" for across, up in places)
        parts.append(f"<polyline class='curve {arm}' points='{path}'/>")
        for number, (across, up) in enumerate(places):
            parts.append(_dot(across, up, arm, arm if number == len(places) - 1 else ""))
    for length, _, _, (low, high) in points:
        parts.append(_bar((x.at(length), y.at(low)), (x.at(length), y.at(high)), "candidate"))
    return _framed((x, y), parts, ("tokens of the prompt", label), title=label, marks=[point[0] for point in points])


def _framed(
    axes: tuple[Axis, Axis],
    parts: Sequence[str],
    labels: tuple[str, str],
    *,
    title: str,
    unit: str = "",
    marks: Sequence[int] | None = None,
) -> Markup:
    """A chart of two axes with its grid behind it.  unit: of the vertical ticks.  marks: what the horizontal axis shows in place of ticks."""
    x, y = axes
    columns = x.ticks() if marks is None else []
    shown = [(tick, f"{tick:g}") for tick in columns] if marks is None else [(mark, f"{mark:,}") for mark in marks]
    grid = [
        *(f"<line class='grid' x1='{x.at(tick):.1f}' x2='{x.at(tick):.1f}' y1='18' y2='268'/>" for tick in columns),
        *(f"<line class='grid' x1='58' x2='464' y1='{y.at(tick):.1f}' y2='{y.at(tick):.1f}'/>" for tick in y.ticks()),
        *(f"<text x='{x.at(place):.1f}' y='287' class='tick middle'>{text}</text>" for place, text in shown),
        *(f"<text x='50' y='{y.at(tick) + 4:.1f}' class='tick end'>{tick:g}{unit}</text>" for tick in y.ticks()),
    ]
    names = [
        f"<text class='axis middle' x='261' y='312'>{escape(labels[0])}</text>",
        f"<text class='axis middle' transform='translate(13 143) rotate(-90)'>{escape(labels[1])}</text>",
    ]
    return Markup(
        f"<svg class='tradeoff' viewBox='0 0 480 320' role='img' aria-label='{escape(title)}'>"
        f"{''.join([*grid, *parts, *names])}</svg>"
    )


def _padded(values: Sequence[float], start: float, stop: float, from_zero: bool = False) -> Axis:
    low, high = min(values), max(values)
    room = 0.15 * (high - low) or 1.0
    return Axis(low if from_zero else low - room, high + room, start, stop)


def _bar(first: tuple[float, float], last: tuple[float, float], arm: str) -> str:
    across = (0, 5) if first[1] == last[1] else (5, 0)
    ends = "".join(
        f"<line x1='{x - across[0]:.1f}' x2='{x + across[0]:.1f}' y1='{y - across[1]:.1f}' y2='{y + across[1]:.1f}'/>"
        for x, y in (first, last)
    )
    line = f"<line x1='{first[0]:.1f}' y1='{first[1]:.1f}' x2='{last[0]:.1f}' y2='{last[1]:.1f}'/>"
    return f"<g class='bar {arm}'>{line}{ends}</g>"


def _dot(x: float, y: float, arm: str, name: str) -> str:
    """A circle for the candidate and a square for the baseline, with its name on the side that has room."""
    shape = (
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='6.5'/>"
        if arm != "baseline"
        else f"<rect x='{x - 5.5:.1f}' y='{y - 5.5:.1f}' width='11' height='11'/>"
    )
    side, shift = ("end", -12) if x > 300 else ("start", 12)
    return f"<g class='dot {arm}'>{shape}<text class='{side}' x='{x + shift:.1f}' y='{y - 11:.1f}'>{escape(name)}</text></g>"


def bars(heights: Sequence[float | None], most: float, titles: Sequence[str], classes: Sequence[str]) -> Markup:
    """A strip of bars of equal width, stretched to the width there is; None is a gap with a short hollow stump."""
    parts: list[str] = []
    for index, (height, title, kind) in enumerate(zip(heights, titles, classes, strict=True)):
        tall = 3.0 if height is None else max(1.0, 40 * min(height / most, 1.0)) if most > 0 else 1.0
        style = "missing" if height is None else kind
        parts.append(
            f"<rect class='{style}' x='{index * 10 + 1}' y='{42 - tall:.1f}' width='8' height='{tall:.1f}'>"
            f"<title>{escape(title)}</title></rect>"
        )
    width = max(10 * len(heights), 10)
    return Markup(
        f"<svg class='bars' viewBox='0 0 {width} 42' preserveAspectRatio='none' aria-hidden='true'>{''.join(parts)}</svg>"
    )


def divergence_strip(window: Window, most: float, bins: int = 128) -> Markup:
    """The divergence along a window, as the largest value of each stretch of tokens; height is its square root."""
    values = [value if value is not None and value > 0 else 0.0 for value in window.kl]
    count = min(bins, len(values))
    edges = [index * len(values) // count for index in range(count + 1)]
    tops = [max(values[first:last]) for first, last in pairwise(edges)]
    steps = "".join(
        f"H{index}V{36 - 34 * math.sqrt(min(top / most, 1.0)) if most > 0 else 36:.1f}H{index + 1}"
        for index, top in enumerate(tops)
    )
    return Markup(
        f"<svg class='strip' viewBox='0 0 {count} 36' preserveAspectRatio='none' aria-hidden='true'>"
        f"<path d='M0 36{steps}V36Z'/></svg>"
    )
