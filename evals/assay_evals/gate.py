"""The gate: from evidence to a verdict, and from nothing else. The same evidence gives the same bytes.

Non-inferiority against a declared margin: PASS when the whole interval is on the good side of the limit, FAIL when all
of it is on the bad side, INCONCLUSIVE when it spans the limit. Not finding a difference is never a reason to pass.
Every gate must pass, so no correction for many gates is due (an intersection-union test). Quality is judged one-sided
at 5%, speed by a two-sided 95% interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace

from assay.files import canonical_json, sha256_bytes
from assay.recipe import Gate, MaxDrop, SliceGates
from assay.strict import Strict
from assay_evals import cost_findings as cost
from assay_evals import encoder_findings as encoder
from assay_evals import latency_findings as latency
from assay_evals import quality_findings as quality
from assay_evals import speed_findings as speed
from assay_evals import task_findings, wording
from assay_evals.evidence import Check, Evidence
from assay_evals.findings import UnmeasurableError
from assay_evals.slices import TAG, sliced, slices_of
from assay_evals.statistics import binomial_lower
from assay_evals.structured import findings as structured
from assay_evals.validity import checks_of
from assay_evals.verdict import GateRow, Limit, Outcome, Row, Verdict, limit_of, overall
from assay_evals.wording import SAME_ARM, SLICE, TASK, is_control

# A baseline must be known to answer this many times the margin right.
HEADROOM = 3
# In the order of the recipe's schema. A speed metric gives its row and that of its A/A control.
_MEASURES: dict[str, Callable[[Evidence], list[Row]]] = {
    "kl_divergence": lambda evidence: [quality.kl_divergence(evidence)],
    "top1_agreement": lambda evidence: [quality.top1_agreement(evidence)],
    "cloze_accuracy": lambda evidence: [quality.cloze_accuracy(evidence)],
    "greedy_agreement": lambda evidence: [quality.greedy_agreement(evidence)],
    **encoder.MEASURES,
    "structured.new_invalid": lambda evidence: [structured.new_invalid(evidence)],
    "structured.valid": lambda evidence: [structured.valid(evidence)],
    "structured.correct": lambda evidence: [structured.correct(evidence)],
    "structured.details": structured.details,
    "structured.cost": structured.cost,
    "decode_tokens_per_second": lambda evidence: [*speed.decode_tokens_per_second(evidence)],
    **latency.MEASURES,
    **cost.MEASURES,
    **encoder.SPEEDS,
    "peak_memory": lambda evidence: [*speed.peak_memory(evidence)],
    "size_on_disk": speed.size_on_disk,
    "kl_divergence.tail": quality.kl_tail,
    "perplexity": lambda evidence: [quality.perplexity(evidence)],
    "cloze_disagreement": lambda evidence: [quality.cloze_disagreement(evidence)],
    "greedy_agreement.details": quality.greedy_details,
    **encoder.DETAILS,
    "load_time": lambda evidence: [*speed.load_time(evidence)],
}
_SLICED = ("kl_divergence", "top1_agreement", "cloze_accuracy", "greedy_agreement", *encoder.MEASURES)


def judge(evidence: Evidence, gate: Gate | None = None) -> Verdict:
    """The verdict on a run by its recipe's gate, which was fixed before anything was measured.

    gate: judge by this one instead, to ask "what if". The verdict then names another recipe digest than the run's own,
    so that it can never stand for it when something is published.
    """
    recipe = evidence.header.recipe
    asked = recipe.gate if gate is None else gate
    declared = asked.declared() | {TASK + name: criterion for name, criterion in (asked.tasks or {}).items()}
    tasks = [TASK + task.name for task in recipe.evaluate.tasks]
    found = {metric: _measured(metric, evidence) for metric in dict.fromkeys((*_MEASURES, *tasks, *declared))}
    gates = tuple(row for metric, criterion in declared.items() for row in _gate_rows(metric, criterion, found[metric]))
    gated = {row.metric for row in gates}
    rows = [row for measured in found.values() if isinstance(measured, list) for row in measured]
    rows += [_unmeasured(metric, reason) for metric, reason in _not_to_be_had(evidence, declared, found).items()]
    slices = {
        sliced(metric, name): _renamed(sliced(metric, name), _measured(metric, part))
        for name, part in slices_of(evidence).items()
        for metric in _SLICED
        if isinstance(found[metric], list)
    }
    for metric in tasks:
        slices |= task_findings.task_slices(evidence, metric) if isinstance(found[metric], list) else {}
    gates += _slice_gates(asked.slices, slices)
    checks = (*checks_of(evidence), _all_measured(evidence, declared, found), *_sensitive(evidence, declared, found))
    verdict = overall(gates, checks)
    return Verdict(
        verdict=verdict,
        candidate=evidence.header.candidate.bundle_digest,
        baseline=evidence.header.baseline.bundle_digest,
        recipe=recipe.digest if gate in (None, recipe.gate) else _other_recipe(recipe.digest, gate),
        evidence=evidence.digest,
        gates=gates,
        reported=tuple(row for row in rows if row.metric not in gated),
        slices=tuple(row for measured in slices.values() if isinstance(measured, list) for row in measured),
        checks=checks,
        reasons=_reasons(verdict, gates, checks),
    )


def _gate_rows(metric: str, criterion: Strict, found: list[Row] | str) -> list[GateRow]:
    """What one gate makes of its metric: a row for each length that it was measured at, which is mostly one."""
    rule = criterion.model_dump()
    if isinstance(found, str):
        return [_gate_row(metric, rule, found)]
    names = [row.metric for row in found if row.metric.partition(SLICE)[0] == metric and not is_control(row.metric)]
    return [_gate_row(name, rule, [row for row in found if row.metric in (name, name + SAME_ARM)]) for name in names]


def _renamed(metric: str, found: list[Row] | str) -> list[Row] | str:
    return found if isinstance(found, str) else [replace(row, metric=metric) for row in found]


def _slice_gates(declared: SliceGates | None, slices: dict[str, list[Row] | str]) -> tuple[GateRow, ...]:
    """A row for each gated metric in each slice by tag; one that is INVALID where there is no such slice."""
    if declared is None:
        return ()
    rows: list[GateRow] = []
    of_tasks = {TASK + name: criterion for name, criterion in (declared.tasks or {}).items()}
    for metric, criterion in (declared.declared() | of_tasks).items():
        prefix = sliced(metric, f"{TAG}=")
        found = {name: measured for name, measured in slices.items() if name.startswith(prefix)}
        what = "item of this task" if metric in of_tasks else "document"
        found = found or {sliced(metric, TAG): f"The evidence has no {what} with a tag."}
        rows += [_gate_row(name, criterion.model_dump(), measured) for name, measured in found.items()]
    return tuple(rows)


def _reasons(verdict: Outcome, gates: tuple[GateRow, ...], checks: tuple[Check, ...]) -> tuple[str, ...]:
    if verdict == "PASS":
        return ("The gate passed." if len(gates) == 1 else f"All {len(gates)} gates passed.",)
    failed = [check for check in checks if not check.passed]
    told = " ".join(check.detail for check in failed)
    return (
        *([] if gates else ["The recipe gates nothing, so nothing was shown. Add a gate."]),
        *(f"{check.name}: {check.detail}" for check in failed),
        *(
            f"{wording.words(row.metric).label}: {row.reason}"
            for row in gates
            if row.verdict != "PASS" and row.reason not in told
        ),
    )


def _named(evidence: Evidence) -> list[str]:
    """The metrics that the recipe names, gated or not."""
    evaluate = evidence.header.recipe.evaluate
    named = [metric.metric for metric in (*evaluate.quality, *evaluate.speed)]
    named += ["structured.valid"] if evaluate.structured else []
    return named + [TASK + task.name for task in evaluate.tasks]


def _not_to_be_had(
    evidence: Evidence, declared: dict[str, Strict], found: dict[str, list[Row] | str]
) -> dict[str, str]:
    """Metrics of the recipe that this machine cannot measure and no gate needs, each with the reason."""
    asked = [metric for metric in _named(evidence) if metric in cost.MACHINE_PERMITTING and metric not in declared]
    return {metric: reason for metric in asked if isinstance(reason := found[metric], str)}


def _all_measured(evidence: Evidence, declared: dict[str, Strict], found: dict[str, list[Row] | str]) -> Check:
    """Every metric that the recipe names was measured, gated or not, where the machine can measure it at all."""
    named, without = _named(evidence), _not_to_be_had(evidence, declared, found)
    missing: dict[str, list[str]] = {}
    for metric in named:
        if isinstance(reason := found[metric], str):
            missing.setdefault(reason, []).append(metric)
    sentences = [f"{', '.join(metrics)}: {reason}" for reason, metrics in missing.items()]
    detail = " ".join(sentences) or f"All {len(named)} metrics of the recipe were measured."
    passed = all(metric in without for metrics in missing.values() for metric in metrics)
    return Check(name="every metric measured", passed=passed, detail=detail)


def _sensitive(evidence: Evidence, declared: dict[str, Strict], found: dict[str, list[Row] | str]) -> list[Check]:
    """Whether a loss of the declared margin could show: a baseline that is right no more often than chance has little to lose."""
    return [
        _headroom(
            metric,
            criterion.max_drop,
            measured[0],
            task_findings.chance_level(evidence, metric) or encoder.chance_level(evidence, metric),
        )
        for metric, criterion in declared.items()
        if isinstance(criterion, MaxDrop) and not isinstance(measured := found[metric], str)
    ]


def _headroom(metric: str, margin: float, row: Row, chance: float) -> Check:
    """chance: what guessing would get right."""
    right = round((row.baseline or 0.0) * row.n)
    least = binomial_lower(right, row.n, quality.ALPHA)
    what = "questions" if metric == "cloze_accuracy" else "items"
    name = "a loss would show" if metric == "cloze_accuracy" else f"a loss would show in {metric}"
    detail = f"The baseline answers {right:,} of {row.n:,} {what} right, at least {100 * least:.1f}% of such {what}"
    detail += f", where guessing gets {100 * chance:.1f}%" * bool(chance)
    passed = least - chance >= HEADROOM * margin
    if passed:
        detail += f"; a loss of {100 * margin:g} points would show."
    else:
        apart = "guessing when what is above it" if chance else "its own mistakes when that"
        detail += (
            f". A loss of {100 * margin:g} points can only be told apart from {apart} is {HEADROOM} times as much: "
            f"declare a smaller max_drop, or evaluate on {'text' if what == 'questions' else what} that the model knows better."
        )
    return Check(name=name, passed=passed, detail=detail)


def _other_recipe(digest: str, gate: Gate) -> str:
    return sha256_bytes(canonical_json({"recipe": digest, "gate": gate.model_dump(mode="json", exclude_none=True)}))


def _measured(name: str, evidence: Evidence) -> list[Row] | str:
    """The rows of a metric, or the reason why it has none."""
    try:
        return task_findings.task_rows(evidence, name) if name.startswith(TASK) else _MEASURES[name](evidence)
    except UnmeasurableError as error:
        return str(error)


def gate_row(metric: str, criterion: dict[str, float], evidence: Evidence) -> GateRow:
    """What one gate makes of the evidence, checks aside."""
    return _gate_row(metric, criterion, _measured(metric, evidence))


def _gate_row(metric: str, criterion: dict[str, float], found: list[Row] | str) -> GateRow:
    (margin,) = criterion.values()
    if isinstance(found, str):
        return _invalid_row(metric, criterion, found)
    row, limit = found[0], limit_of(criterion)
    control = next((other for other in found if other.metric == metric + SAME_ARM), None)
    noise = speed.too_noisy(control, limit.value) if control else ""
    verdict: Outcome = "INCONCLUSIVE" if noise else _compare(row, limit)
    reason = noise or _reason(row, criterion, limit, verdict)
    fields = asdict(replace(row, reason=f"{reason} {row.reason}".strip()))
    return GateRow(**fields, criterion=criterion, margin=margin, verdict=verdict)


def _invalid_row(metric: str, criterion: dict[str, float], reason: str) -> GateRow:
    (margin,) = criterion.values()
    return GateRow(**asdict(_unmeasured(metric, reason)), criterion=criterion, margin=margin, verdict="INVALID")


def _unmeasured(metric: str, reason: str) -> Row:
    return Row(
        metric=metric,
        baseline=None,
        candidate=None,
        difference=None,
        interval=None,
        confidence=None,
        n=0,
        clusters=None,
        minimum_detectable=None,
        reason=reason,
    )


def _compare(row: Row, limit: Limit) -> Outcome:
    """Where an interval lies; touching the limit from the good side passes."""
    if row.interval is None:
        return "INVALID"
    low, high = row.interval
    if limit.at_least:
        return "PASS" if low >= limit.value else "FAIL" if high < limit.value else "INCONCLUSIVE"
    return "PASS" if high <= limit.value else "FAIL" if low > limit.value else "INCONCLUSIVE"


def _reason(row: Row, criterion: dict[str, float], limit: Limit, verdict: Outcome) -> str:
    metric, asked = row.metric, f"{wording.criterion(row.metric, criterion)} was asked"
    if row.interval is None or row.difference is None:
        return "Measured without an interval, so nothing can be concluded."
    if row.interval[0] == row.interval[1]:
        return f"It is {wording.difference(metric, row.difference, limit.value)}, exactly; {asked}."
    near, far = row.interval if limit.at_least else row.interval[::-1]
    if verdict == "PASS":
        return f"Even the worse end of the interval is {wording.difference(metric, near, limit.value)}; {asked}."
    if verdict == "FAIL":
        return f"Even the better end of the interval is {wording.difference(metric, far, limit.value)}; {asked}."
    factor = wording.words(metric).difference == "factor"
    scale: Callable[[float], float] = math.log if factor else float
    found, bound = scale(row.difference), scale(limit.value)
    crossing = near if (found > bound) == limit.at_least else far
    more = _more_samples(
        reach=abs(scale(crossing) - found),
        room=abs(found - bound),
        count=row.n if row.clusters is None or not factor else row.clusters,
        unit="blocks" if factor else "samples",
    )
    return f"The interval, {wording.interval(metric, row.interval, limit.value)}, spans the limit; {asked}. {more}"


def _more_samples(reach: float, room: float, count: int, unit: str) -> str:
    """How many samples would bring the interval clear of the limit, were the difference found the true one.

    reach: from the difference to the end of the interval that is past the limit; it shrinks as 1/√n. room: from the
    difference to the limit.
    """
    if reach > 10 * room:
        return "The difference found lies almost on the limit, so more samples would hardly settle it."
    needed = _round_up(count * (reach / room) ** 2)
    return f"About {needed:,} {unit} would settle it if the difference found is the true one; {count:,} were taken."


def _round_up(number: float) -> int:
    """Two significant digits, upwards: an estimate, and said as one."""
    digits = max(0, math.floor(math.log10(number)) - 1) if number > 0 else 0
    return math.ceil(number / 10**digits) * 10**digits
