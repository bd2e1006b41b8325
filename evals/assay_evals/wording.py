"""Numbers in the words and units of people: one spelling for reasons, for the terminal table and for the report.

Differences follow `verdict.Row.difference`: points for accuracies, a factor for speeds, sizes and perplexity, and the
value itself where the baseline has none. Minus is U+2212.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Unit = Literal[
    "share",
    "nats",
    "tokens per second",
    "texts per second",
    "seconds",
    "bytes",
    "joules",
    "bits",
    "cosine",
    "count",
    "plain",
]
Difference = Literal["points", "factor", "itself"]
SAME_ARM, SLICE, TASK = ".same_arm", "@", "task."
MOST_DIGITS = 8


@dataclass(frozen=True)
class Words:
    """How a metric is called and counted; `higher_is_better` says which way its difference is good."""

    label: str
    unit: Unit
    difference: Difference
    higher_is_better: bool


METRICS: dict[str, Words] = {
    "kl_divergence": Words("KL divergence", "nats", "itself", False),
    "top1_agreement": Words("top-1 agreement", "share", "itself", True),
    "cloze_accuracy": Words("cloze accuracy", "share", "points", True),
    "greedy_agreement": Words("same continuation", "share", "itself", True),
    "greedy_agreement.together": Words("tokens before continuations part", "plain", "itself", True),
    "greedy_agreement.unstopped": Words("continuations cut off by the limit", "share", "points", False),
    "greedy_agreement.length": Words("length of continuations", "plain", "factor", True),
    "embedding_cosine": Words("cosine to the baseline's embedding", "cosine", "itself", True),
    "embedding_cosine.p01": Words("cosine to the baseline's embedding, p01", "cosine", "itself", True),
    "embedding_cosine.min": Words("cosine to the baseline's embedding, least", "cosine", "itself", True),
    "similarity_rank": Words("rank correlation of similarities", "cosine", "itself", True),
    "retrieval_agreement": Words("passages that both find", "share", "itself", True),
    "retrieval_agreement.first": Words("same passage found first", "share", "itself", True),
    "retrieval_accuracy": Words("own passage found first", "share", "points", True),
    "class_agreement": Words("same class", "share", "itself", True),
    "class_accuracy": Words("class accuracy", "share", "points", True),
    "encode_latency": Words("time of a batch", "seconds", "factor", False),
    "encode_throughput": Words("encoding speed", "texts per second", "factor", True),
    "structured.new_invalid": Words("outputs newly invalid", "count", "itself", False),
    "structured.parsed": Words("output is JSON", "share", "points", True),
    "structured.valid": Words("output follows its schema", "share", "points", True),
    "structured.correct": Words("output is right", "share", "points", True),
    "structured.cut_off": Words("output cut off by the limit", "share", "points", False),
    "structured.compiled": Words("schemas that can be enforced", "share", "itself", True),
    "structured.enforced.parsed": Words("enforced output is JSON", "share", "points", True),
    "structured.enforced.valid": Words("enforced output follows its schema", "share", "points", True),
    "structured.enforced.correct": Words("enforced output is right", "share", "points", True),
    "structured.enforced.cut_off": Words("enforced output cut off by the limit", "share", "points", False),
    "structured.cost": Words("enforcing a schema, per token", "seconds", "itself", False),
    "structured.first_use": Words("first use of a schema", "seconds", "itself", False),
    "decode_tokens_per_second": Words("decode speed", "tokens per second", "factor", True),
    "inter_token_latency": Words("time between tokens", "seconds", "factor", False),
    "inter_token_latency.p50": Words("time between tokens, p50", "seconds", "factor", False),
    "inter_token_latency.p90": Words("time between tokens, p90", "seconds", "factor", False),
    "inter_token_latency.p99": Words("time between tokens, p99", "seconds", "factor", False),
    "time_per_output_token": Words("time per output token", "seconds", "factor", False),
    "end_to_end_latency": Words("time to last token", "seconds", "factor", False),
    "time_to_first_token": Words("time to first token", "seconds", "factor", False),
    "prefill_tokens_per_second": Words("prefill speed", "tokens per second", "factor", True),
    "prefix_reuse": Words("time to first token, prefix in cache", "seconds", "factor", False),
    "prefix_reuse.share": Words("share of it that a cached prefix leaves", "share", "factor", False),
    "energy_per_output_token": Words("energy per output token", "joules", "factor", False),
    "cost_per_million_tokens": Words(
        "cost of a million output tokens, one request at a time", "plain", "factor", False
    ),
    "load_time": Words("load time", "seconds", "factor", False),
    "peak_memory": Words("peak memory", "bytes", "factor", False),
    "size_on_disk": Words("size on disk", "bytes", "factor", False),
    "bits_per_weight": Words("bits per quantized weight", "bits", "itself", False),
    "perplexity": Words("perplexity", "plain", "factor", False),
    "kl_divergence.median": Words("KL divergence, median", "nats", "itself", False),
    "kl_divergence.p99": Words("KL divergence, p99", "nats", "itself", False),
    "kl_divergence.max": Words("KL divergence, max", "nats", "itself", False),
    "cloze_disagreement": Words("cloze answers flipped", "share", "itself", False),
}
# What is told of a task beside its accuracy, by the end of the metric's name.
_TASK_PARTS: dict[str, Words] = {
    "": Words("", "share", "points", True),
    "raw": Words(", by the sum of log-likelihoods", "share", "points", True),
    "normalized": Words(", by log-likelihood per character", "share", "points", True),
    "flipped": Words(", answers flipped", "share", "itself", False),
    "unstopped": Words(", answers cut off by the limit", "share", "points", False),
    "length": Words(", length of answers", "plain", "factor", True),
}


def words(metric: str) -> Words:
    """The words of a metric; a part of it, or its same-arm control, borrows those of the metric it belongs to."""
    if is_control(metric):
        base = words(metric.removesuffix(SAME_ARM))
        return Words(f"{base.label}, same build against itself", base.unit, "factor", base.higher_is_better)
    whole, _, part = metric.partition(SLICE)
    if part:
        return replace(words(whole), label=f"{words(whole).label}, {part}")
    if metric.startswith(TASK):
        name, _, part = metric.removeprefix(TASK).partition(".")
        return replace(_TASK_PARTS[part], label=f"task {name}{_TASK_PARTS[part].label}")
    return METRICS[metric]


def is_control(metric: str) -> bool:
    """Whether a row is an A/A control."""
    return metric.endswith(SAME_ARM)


def value(metric: str, number: float | None) -> str:
    """A measured value with its unit: 43.1%, 0.0312 nats, 73.1 tok/s, 12.3 ms, 512 MB."""
    if number is None:
        return "–"
    unit = words(metric).unit
    if unit == "share":
        return f"{100 * number:.1f}%"
    if unit == "nats":
        return f"{number:.4f} nats"
    if unit == "tokens per second":
        return f"{number:.1f} tok/s"
    if unit == "texts per second":
        return f"{number:.1f} texts/s"
    if unit == "cosine":
        return f"{number:.4f}"
    if unit == "seconds":
        return f"{number:.2f} s" if number >= 1 else f"{1000 * number:.{1 if number >= 0.01 else 2}f} ms"
    if unit == "bytes":
        return _bytes(number)
    if unit == "count":
        return f"{number:,.0f}"
    if unit == "joules":
        return f"{number:.3g} J"
    return f"{number:.2f} bits" if unit == "bits" else f"{number:.3f}"


def difference(metric: str, number: float | None, limit: float | None = None) -> str:
    """A difference in the metric's own terms: −0.6 points, 3.31×, 0.0312 nats; told apart from `limit` if it differs."""
    if number is None:
        return "–"
    return _number(metric, number, _digits(metric, (number,), limit)) + _unit(metric)


def interval(metric: str, bounds: tuple[float, float] | None, limit: float | None = None, *, bare: bool = False) -> str:
    """Both ends of an interval with the unit once: −1.6 to +0.4 points; told apart from `limit` where they differ.

    bare: without the unit, for a column beside one that has it.
    """
    if bounds is None:
        return "–"
    if bounds[0] == bounds[1]:
        return "exact"
    digits = _digits(metric, bounds, limit)
    low, high = (_number(metric, bound, digits) for bound in bounds)
    if bare:
        return f"{low} to {high}"
    return f"{low}{'×' if words(metric).difference == 'factor' else ''} to {high}{_unit(metric)}"


def change(metric: str, number: float) -> str:
    """How much one candidate's number differs from another's: +0.6 points, −0.0021 nats, 1.12×."""
    found = words(metric)
    if found.difference == "factor":
        return difference(metric, number)
    if found.unit == "share":
        return f"{_signed(100 * number, 1)} points"
    return f"{_signed(number, 4)}{' nats' * (found.unit == 'nats')}"


def criterion(metric: str, rule: dict[str, float]) -> str:
    """What a gate asks of the difference, as the recipe has it: at most 3 points lower, at least 1.5×."""
    ((name, number),) = rule.items()
    if name == "max_drop":
        return f"at most {100 * number:g} points lower"
    return f"{'at least' if name.startswith('min') else 'at most'} {bare_number(metric, number)}{_unit(metric)}"


def bare_number(metric: str, number: float) -> str:
    """A number on the axis of the difference, as short as it goes, without its unit: −3, 1.5, 92.5."""
    scaled = 100 * number if words(metric).unit == "share" else number
    return f"{scaled:g}".replace("-", "−")


def distance(metric: str, number: float | None) -> str:
    """A smallest detectable distance: 1.2 points, 4.0%, 0.0021 nats."""
    if number is None:
        return "–"
    if words(metric).difference == "factor":
        return f"{100 * (number - 1):.1f}%"
    return f"{100 * number:.1f} points" if words(metric).unit == "share" else value(metric, number)


def consequence(metric: str, number: float | None) -> str:
    """What a difference means, as a phrase: decode 3.3× as fast, cloze accuracy 0.6 points lower."""
    if number is None:
        return f"{words(metric).label} not measured"
    if metric == "decode_tokens_per_second":
        return f"decode {_short_factor(number)} as fast"
    if metric.startswith("encode_throughput"):
        return f"encoding {_short_factor(number)} as fast"
    if metric == "time_to_first_token":
        return f"first token {_percent_change(number, 'later', 'earlier', 'at the same moment')}"
    if metric == "peak_memory":
        return f"peak memory {_percent_change(number, 'higher', 'lower', 'the same')}"
    if metric == "size_on_disk":
        return f"{_percent_change(number, 'larger', 'smaller', 'the same size')} on disk"
    if metric == "cloze_accuracy":
        points = round(100 * number, 1)
        if points == 0:
            return "cloze accuracy the same"
        unit = "point" if abs(points) == 1 else "points"
        return f"cloze accuracy {abs(points):.1f} {unit} {'higher' if points > 0 else 'lower'}"
    if metric == "top1_agreement":
        return f"the same first choice at {100 * number:.1f}% of positions"
    return f"{words(metric).label} {difference(metric, number)}"


def headline(metric: str, number: float) -> tuple[str, str]:
    """A consequence split for large print: the figure, and what it is a figure of."""
    if metric == "decode_tokens_per_second":
        return _short_factor(number), "as fast at decoding"
    if metric.startswith("encode_throughput"):
        return _short_factor(number), "as fast at encoding"
    if metric == "cloze_accuracy":
        return _signed(100 * number, 1), "points of cloze accuracy"
    if words(metric).difference == "factor":
        percent = round(100 * (number - 1))
        label = {"size_on_disk": "bytes on disk"}.get(metric, words(metric).label)
        return f"{_signed(percent, 0)}%", label
    if words(metric).unit == "nats":
        return f"{number:.3f}", f"nats of {words(metric).label}"
    return value(metric, number), words(metric).label


def _unit(metric: str) -> str:
    found = words(metric)
    if found.difference == "factor":
        return "×"
    if found.difference == "points":
        return " points"
    return {"share": "%", "nats": " nats", "bits": " bits", "seconds": " ms"}.get(found.unit, "")


def _number(metric: str, number: float, digits: int) -> str:
    found = words(metric)
    if found.difference == "points":
        return _signed(100 * number, digits)
    scale = {"share": 100, "seconds": 1000}.get(found.unit, 1) if found.difference == "itself" else 1
    return f"{scale * number:.{digits}f}"


def _digits(metric: str, numbers: tuple[float, ...], limit: float | None) -> int:
    """Decimals that show these numbers well, and more where one would read as the limit without being it."""
    digits = max(_usual_digits(metric, number) for number in numbers)
    while limit is not None and digits < MOST_DIGITS:
        shown = _number(metric, limit, digits)
        if not any(number != limit and _number(metric, number, digits) == shown for number in numbers):
            break
        digits += 1
    return digits


def _usual_digits(metric: str, number: float) -> int:
    found = words(metric)
    if found.difference == "factor":
        return 3 if number < 1.05 else 2 if number < 100 else 0
    return {"nats": 4, "cosine": 4, "bits": 2, "seconds": 2, "count": 0}.get(found.unit, 1)


def _signed(number: float, digits: int) -> str:
    text = f"{abs(number):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if number > 0 else '−'}{text}"


def _short_factor(number: float) -> str:
    return f"{number:.1f}×" if number >= 2 else f"{number:.2f}×"


def _percent_change(ratio: float, up: str, down: str, same: str) -> str:
    percent = round(100 * abs(ratio - 1))
    return same if percent == 0 else f"{percent}% {up if ratio > 1 else down}"


def _bytes(number: float) -> str:
    """Decimal units, as disks and registries count."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale:
            scaled = number / scale
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f} {unit}"
    return f"{number:.0f} B"
