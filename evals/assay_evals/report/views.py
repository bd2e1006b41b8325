"""What a report says of a verdict in words, in whichever form it is written."""

from __future__ import annotations

from dataclasses import dataclass

from assay_evals import wording
from assay_evals.comparison import Contrast
from assay_evals.evidence import Written
from assay_evals.verdict import GateRow, Outcome, Row, Verdict
from assay_evals.wording import SLICE, TASK

FLIPS = 10
# Each outcome has a sign of its own, for people who do not see colours.
SIGNS: dict[Outcome, str] = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔", "INVALID": "⚠️"}
# In the order in which a reader wants to know them.
TILES = (
    "decode_tokens_per_second",
    "encode_throughput",
    "size_on_disk",
    "cloze_accuracy",
    "embedding_cosine",
    "class_agreement",
    "time_to_first_token",
    "peak_memory",
    "kl_divergence",
)
# So many of them are told in one sentence, where they were measured.
_TOLD = 6
MEANING: dict[Outcome, str] = {
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


def row_view(row: Row, limit: float | None = None) -> RowView:
    """limit: of its gate, which no shown number may be mistaken for."""
    return RowView(
        row=row,
        label=capital(wording.words(row.metric).label)
        + ("" if row.n or isinstance(row, GateRow) else f" (not measured: {row.reason})"),
        baseline=wording.value(row.metric, row.baseline),
        candidate=wording.value(row.metric, row.candidate),
        difference=wording.difference(row.metric, row.difference, limit),
        interval=wording.interval(row.metric, row.interval, limit),
        confidence="" if row.confidence is None else f"{100 * row.confidence:.0f}%",
        samples=f"{row.n:,}" + ("" if row.clusters is None else f" in {row.clusters:,}"),
        resolves=wording.distance(row.metric, row.minimum_detectable),
    )


def slice_views(verdict: Verdict) -> list[list[RowView]]:
    """For each metric its slices, the worst first."""
    metrics = dict.fromkeys(row.metric.partition(SLICE)[0] for row in verdict.slices)
    ordered: list[list[RowView]] = []
    for metric in metrics:
        better = 1 if wording.words(metric).higher_is_better else -1
        rows = [row for row in verdict.slices if row.metric.partition(SLICE)[0] == metric]
        ordered.append([row_view(row) for row in sorted(rows, key=lambda row: better * (row.difference or 0.0))])
    return ordered


def contrast_lines(contrast: Contrast) -> list[str]:
    """A candidate's value, how it differs from the first one's, and the interval of that."""
    lines = [wording.value(contrast.metric, contrast.value)]
    if contrast.change is None:
        return [*lines, contrast.reason] if contrast.reason else lines
    lines.append(wording.change(contrast.metric, contrast.change))
    if contrast.interval is not None and contrast.interval[0] != contrast.interval[1]:
        low, high = (wording.change(contrast.metric, bound) for bound in contrast.interval)
        lines.append(f"{low} to {high}")
    return lines


def summary(verdict: Verdict) -> str:
    """The consequences in one sentence, for a pull request or a message."""
    rows = [row for metric in TILES[:_TOLD] if (row := verdict.row(metric)) and row.difference is not None]
    rows += [row for row in verdict.gates if row.metric.startswith(TASK) and row.difference is not None]
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


def _in_brackets(row: Row) -> str:
    if row.interval is None or row.confidence is None:
        return ""
    return f" ({100 * row.confidence:.0f}% interval {wording.interval(row.metric, row.interval)})"


def clip(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} … ({len(text) - longest:,} more characters)"


def worth(written: Written) -> str:
    """What a structured output is, in a word or two."""
    if not written.parsed:
        return "cut off" if written.cut_off else "not JSON"
    if not written.valid:
        return "not valid"
    return {None: "valid", True: "right", False: "valid but wrong"}[written.correct]


def ending(text: str, longest: int) -> str:
    """The end of a text, where a prompt says what it asks."""
    return text if len(text) <= longest else f"… {text[-longest:]}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]
