"""Speed and memory, from evidence to rows: a ratio over interleaved blocks, with an A/A control.

The block is the unit: four fresh processes in the order ABBA or BAAB. Its log-ratio is free of linear drift, and blocks
are independent, so the interval is Student's over blocks (two-sided 95%). Requests within a process are not independent
and are never counted as samples.

The A/A control compares each arm with itself in the same blocks, with the same noise. It does two things:
- When its interval leaves out 1, the machine drifted in a way that repeats. The drift found is added to both ends of
  the measured interval: a small drift costs precision, and a large one the conclusion.
- `too_noisy`: when its half-width exceeds half of |ln limit|, no conclusion is drawn at all, as slow and disturbed
  hours may not treat both arms alike. Never asked finer than 5%, or a limit of 1 could never be judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar, get_args

from assay.recipe import DecodeMetric
from assay.strict import Strict
from assay_evals.evidence import Evidence, Generation, SpeedRun
from assay_evals.findings import UnmeasurableError, bounded_exp, finding
from assay_evals.statistics import (
    block_log_ratio,
    detectable,
    outliers,
    plain_mean,
    same_arm_log_ratio,
    t_interval,
)
from assay_evals.verdict import Row
from assay_evals.wording import SAME_ARM

ALPHA = 0.025
CONFIDENCE = 1 - 2 * ALPHA
FINEST_TOLERANCE = math.log(1.05)
ORDERS = (("baseline", "candidate", "candidate", "baseline"), ("candidate", "baseline", "baseline", "candidate"))


def alpha_of(evidence: Evidence) -> float:
    """Error on each side of one look: all looks of a run together are wrong no more often than ALPHA (Bonferroni)."""
    return ALPHA / evidence.header.recipe.evaluate.looks


@dataclass(frozen=True)
class Block:
    """The four processes of a block, by arm, each pair in the order of running."""

    baseline: tuple[SpeedRun, SpeedRun]
    candidate: tuple[SpeedRun, SpeedRun]


def blocks_of(evidence: Evidence) -> list[Block]:
    """The blocks in order; UnmeasurableError when one is not four processes in the order ABBA or BAAB."""
    members: dict[int, list[SpeedRun]] = {}
    for run in evidence.runs:
        members.setdefault(run.block, []).append(run)
    blocks: list[Block] = []
    for number, runs in sorted(members.items()):
        runs.sort(key=lambda run: run.position)
        if [run.position for run in runs] != [0, 1, 2, 3] or tuple(run.arm for run in runs) not in ORDERS:
            found = ", ".join(f"{run.position} {run.arm}" for run in runs)
            raise UnmeasurableError(
                f"Block {number} is not four processes in the order ABBA or BAAB; it holds {found}."
            )
        baseline = [run for run in runs if run.arm == "baseline"]
        candidate = [run for run in runs if run.arm == "candidate"]
        blocks.append(Block((baseline[0], baseline[1]), (candidate[0], candidate[1])))
    return blocks


def decode_tokens_per_second(evidence: Evidence) -> tuple[Row, Row]:
    """Tokens per second after the first: (n − 1) / (t_n − t_1)."""
    metric = declared(evidence, DecodeMetric)

    def rate(generation: Generation) -> float:
        seconds = all_times(generation, metric.new_tokens)
        return (len(seconds) - 1) / (seconds[-1] - seconds[0])

    return ratio("decode_tokens_per_second", evidence, lambda run: per_request(run, metric.prompt_tokens, rate))


def peak_memory(evidence: Evidence) -> tuple[Row, Row]:
    """Peak resident bytes of a process that loads the model and generates."""
    return ratio("peak_memory", evidence, lambda run: float(run.peak_memory_bytes))


def load_time(evidence: Evidence) -> tuple[Row, Row]:
    """Seconds that a fresh process takes to load the model."""
    return ratio("load_time", evidence, lambda run: run.load_seconds)


def size_on_disk(evidence: Evidence) -> list[Row]:
    """Bytes of all files of each artifact, and the bits of a quantized weight: exact numbers, each its own interval."""
    sizes = (evidence.header.baseline.size_bytes, evidence.header.candidate.size_bytes)
    if min(sizes) <= 0:
        raise UnmeasurableError(f"The artifacts are said to have {sizes[0]} and {sizes[1]} bytes.")
    share, bits = sizes[1] / sizes[0], evidence.header.candidate.bits_per_weight
    found = [finding("size_on_disk", arms=(*sizes,), difference=share, interval=(share, share), samples=1)]
    if bits is not None:
        found.append(finding("bits_per_weight", arms=(None, bits), difference=bits, interval=(bits, bits), samples=1))
    return found


def noise_tolerance(limit: float) -> float:
    """Largest half-width of the A/A control, as a logarithm, at which a ratio may be judged against `limit`."""
    return max(abs(math.log(limit)) / 2, FINEST_TOLERANCE)


def too_noisy(control: Row, limit: float) -> str:
    """Why no conclusion may be drawn from a machine this restless, or "" when it is quiet enough."""
    if control.interval is None:
        return ""
    half_width = (math.log(control.interval[1]) - math.log(control.interval[0])) / 2
    tolerance = noise_tolerance(limit)
    if half_width <= tolerance:
        return ""
    known, needed = (100 * math.expm1(width) for width in (half_width, tolerance))
    return (
        f"The machine is too restless: the same build compared with itself is only known to ±{known:.0f}%, "
        f"and ±{needed:.0f}% is needed here. Close other programs, or raise evaluate.blocks."
    )


Metric = TypeVar("Metric", bound=Strict)


def declared(evidence: Evidence, kind: type[Metric]) -> Metric:
    """The metric as the recipe declares it; UnmeasurableError where it does not."""
    for metric in evidence.header.recipe.evaluate.speed:
        if isinstance(metric, kind):
            return metric
    (name,) = get_args(kind.model_fields["metric"].annotation)
    raise UnmeasurableError(f"The recipe does not measure {name}, so its lengths are unknown.")


def ratio(metric: str, evidence: Evidence, measure: Callable[[SpeedRun], float | None]) -> tuple[Row, Row]:
    """The row of candidate / baseline, and that of its A/A control."""
    blocks = blocks_of(evidence)
    if len(blocks) < 2:
        raise UnmeasurableError(f"There are {len(blocks)} blocks of processes; spread between blocks needs two.")
    pairs = [(_pair(block.baseline, measure), _pair(block.candidate, measure)) for block in blocks]
    arms = [[math.log(value) for pair in pairs for value in pair[arm]] for arm in (0, 1)]
    change = plain_mean([block_log_ratio(*pair) for pair in pairs])
    drift = plain_mean([same_arm_log_ratio(*pair) for pair in pairs])
    alpha = alpha_of(evidence)
    low, high = t_interval(change, 1 - 2 * alpha)
    drift_low, drift_high = t_interval(drift, CONFIDENCE)
    notes = _outlier_notes(arms)
    if not drift_low <= 0 <= drift_high:
        low, high = low - abs(drift.mean), high + abs(drift.mean)
        percent = 100 * math.expm1(abs(drift.mean))
        notes.append(f"The machine drifted by {percent:.1f}% within blocks; the interval is widened by that.")
    row = finding(
        metric,
        arms=(bounded_exp(math.fsum(arms[0]) / len(arms[0])), bounded_exp(math.fsum(arms[1]) / len(arms[1]))),
        difference=bounded_exp(change.mean),
        interval=(bounded_exp(low), bounded_exp(high)),
        confidence=1 - 2 * alpha,
        samples=4 * len(blocks),
        clusters=len(blocks),
        minimum_detectable=bounded_exp(detectable(change.standard_error, change.degrees, alpha)),
        reason=" ".join(notes),
    )
    control = finding(
        metric + SAME_ARM,
        arms=(None, bounded_exp(drift.mean)),
        difference=bounded_exp(drift.mean),
        interval=(bounded_exp(drift_low), bounded_exp(drift_high)),
        confidence=CONFIDENCE,
        samples=4 * len(blocks),
        clusters=len(blocks),
    )
    return row, control


def _pair(runs: tuple[SpeedRun, SpeedRun], measure: Callable[[SpeedRun], float | None]) -> tuple[float, float]:
    return _positive(runs[0], measure(runs[0])), _positive(runs[1], measure(runs[1]))


def _positive(run: SpeedRun, number: float | None) -> float:
    if number is None or not 0 < number < math.inf:
        said = "not a finite number" if number is None else f"{number:g}, which no measurement can be"
        raise UnmeasurableError(f"Block {run.block}, process {run.position} ({run.arm}): the value is {said}.")
    return number


Found = TypeVar("Found")


def each_request(run: SpeedRun, prompt_tokens: int, measure: Callable[[Generation], Found]) -> list[Found]:
    """What each of a process's requests of this prompt length gives; UnmeasurableError, which says where, when there is none."""
    matching = [generation for generation in run.generations if generation.prompt_tokens == prompt_tokens]
    place = f"Block {run.block}, process {run.position} ({run.arm})"
    if not matching:
        raise UnmeasurableError(f"{place}: no request with a prompt of {prompt_tokens} tokens.")
    try:
        return [measure(generation) for generation in matching]
    except UnmeasurableError as error:
        raise UnmeasurableError(f"{place}: {error}") from error


def per_request(run: SpeedRun, prompt_tokens: int, measure: Callable[[Generation], float]) -> float:
    """The geometric mean over a process's requests of this prompt length; all of them count."""
    found = each_request(run, prompt_tokens, measure)
    return math.exp(math.fsum(map(math.log, found)) / len(found)) if min(found) > 0 else 0.0


def all_times(generation: Generation, new_tokens: int) -> list[float]:
    """Seconds of each token of a request that gave exactly as many as it was asked for."""
    found = times(generation)
    if len(found) != new_tokens:
        raise UnmeasurableError(
            f"A request for {new_tokens} new tokens gave {len(found)}: it stopped early or ran over."
        )
    return found


def times(generation: Generation) -> list[float]:
    """Seconds of each token, checked: finite, above zero, never going back, and more than nothing between ends."""
    found = [seconds for seconds in generation.token_seconds if seconds is not None]
    if not found or len(found) < len(generation.token_seconds):
        raise UnmeasurableError("A request has no token times, or some that are not finite numbers.")
    if found[0] <= 0 or any(later < earlier for earlier, later in pairwise(found)):
        raise UnmeasurableError("The token times of a request go backwards or start at zero.")
    if len(found) > 1 and found[-1] <= found[0]:
        raise UnmeasurableError("All tokens of a request came at the same moment.")
    return found


def _outlier_notes(arms: list[list[float]]) -> list[str]:
    flagged, total = sum(len(outliers(values)) for values in arms), sum(len(values) for values in arms)
    if not flagged:
        return []
    lies = "process lies" if flagged == 1 else "processes lie"
    return [f"{flagged} {lies} far from the others of the same arm (flagged by MAD, kept); {total} were run."]
