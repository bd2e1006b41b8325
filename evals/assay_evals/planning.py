"""Whether a run can conclude, before it starts: the smallest difference that the declared samples resolve.

Everything here is the power formula of `statistics.detectable` with assumed noise in place of measured noise; the
assumptions are stated with every answer. A plan is a forecast: the gate never reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from assay.recipe import (
    ClassAccuracyMetric,
    ClassAgreementMetric,
    ClozeAccuracyMetric,
    EmbeddingCosineMetric,
    Evaluate,
    Gate,
    GreedyAgreementMetric,
    KlDivergenceMetric,
    RetrievalAccuracyMetric,
    RetrievalAgreementMetric,
    SimilarityRankMetric,
    Strict,
)
from assay_evals import quality_findings as quality
from assay_evals import speed_findings as speed
from assay_evals import wording
from assay_evals.statistics import binomial_upper, detectable, t_half_width
from assay_evals.verdict import limit_of
from assay_evals.wording import TASK

MOST_BLOCKS = 200


@dataclass(frozen=True)
class Assumptions:
    """Noise that a plan reckons with, before anything is measured; the defaults are near a 4-bit SmolLM2 on python-docs.

    discordance: share of cloze answers that flip. design_effect: how much clustering by document inflates the variance
    of answers and agreements. caution: how much wider a `cautious_interval` is than Student's. divergence_variation: standard
    deviation of KL per token over its mean, and divergence_design_effect: documents differ much more in that.
    loss_variation, loss_design_effect: the same of what an encoder's cosine or rank correlation lacks of 1.
    speed_noise, memory_noise: standard deviation of a block's log-ratio on a machine with nothing else to do.
    """

    discordance: float = 0.08
    design_effect: float = 1.5
    caution: float = 1.25
    divergence_variation: float = 1.7
    divergence_design_effect: float = 15.0
    loss_variation: float = 0.8
    loss_design_effect: float = 3.0
    speed_noise: float = 0.05
    memory_noise: float = 0.01


@dataclass(frozen=True)
class Reach:
    """What a gate can be expected to resolve.

    smallest: distance of the truth from the margin that is resolved with 80% probability, in the terms of
    `Row.minimum_detectable`; 0 for exact numbers. in_reach: whether a candidate worth passing would pass.
    """

    metric: str
    criterion: dict[str, float]
    samples: int
    smallest: float
    in_reach: bool
    sentence: str


def plan_gates(
    evaluate: Evaluate,
    gate: Gate,
    assumptions: Assumptions | None = None,
    items: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Reach, ...]:
    """For each gate, the smallest difference that `evaluate` can resolve at its last look, and whether its margin is in reach.

    items: how many each task is asked up to each look, where its `samples` do not say it.
    """
    assumed, last = assumptions or Assumptions(), evaluate.at(evaluate.looks)
    metrics = tuple(_reach(metric, criterion, last, assumed) for metric, criterion in gate.declared().items())
    return metrics + _task_reaches(evaluate, gate, assumed, items or {})


def _task_reaches(
    evaluate: Evaluate, gate: Gate, assumed: Assumptions, items: Mapping[str, Sequence[int]]
) -> tuple[Reach, ...]:
    """Of tasks, with all items that the gate may look at; items without a group are independent."""
    clustered = {task.name: task.group is not None for task in evaluate.tasks}
    counts = {task.name: [task.samples] for task in evaluate.tasks if task.samples} | dict(items)
    # One of so many clusters, counted once more, widens next to nothing.
    alone = replace(assumed, design_effect=1.0, caution=1.0)
    return tuple(
        _accuracy(
            TASK + name,
            criterion.model_dump(),
            (counts[name][-1], "items"),
            quality.ALPHA / len(counts[name]),
            assumed if clustered[name] else alone,
        )
        for name, criterion in (gate.tasks or {}).items()
    )


def _reach(metric: str, criterion: Strict, evaluate: Evaluate, assumed: Assumptions) -> Reach:
    rule: dict[str, float] = criterion.model_dump()
    limit, alpha = limit_of(rule).value, quality.ALPHA / evaluate.looks
    if evaluate.structured is not None and metric == "structured.new_invalid":
        return _new_invalid(rule, evaluate.structured.samples, alpha)
    if evaluate.structured is not None and metric == "structured.correct":
        alone = replace(assumed, design_effect=1.0)
        return _accuracy(metric, rule, (evaluate.structured.samples, "items"), alpha, alone)
    for declared in evaluate.quality:
        if declared.metric != metric:
            continue
        if isinstance(declared, ClozeAccuracyMetric):
            return _accuracy(metric, rule, (declared.samples, "questions"), alpha, assumed)
        if isinstance(declared, KlDivergenceMetric):
            return _divergence(rule, declared.tokens, alpha, assumed)
        if isinstance(declared, GreedyAgreementMetric):
            return _agreement(metric, rule, (declared.prompts, "prompts"), alpha, assumed)
        if isinstance(declared, EmbeddingCosineMetric | SimilarityRankMetric):
            return _loss(metric, rule, declared.texts, alpha, assumed)
        if isinstance(declared, RetrievalAgreementMetric):
            return _agreement(metric, rule, (declared.queries, "queries"), alpha, assumed)
        if isinstance(declared, RetrievalAccuracyMetric):
            return _accuracy(metric, rule, (declared.queries, "queries"), alpha, assumed)
        if isinstance(declared, ClassAgreementMetric):
            return _agreement(metric, rule, (declared.texts, "texts"), alpha, assumed)
        if isinstance(declared, ClassAccuracyMetric):
            return _accuracy(metric, rule, (declared.texts, "texts"), alpha, assumed)
        return _agreement(metric, rule, (declared.tokens, "tokens"), alpha, assumed)
    if metric == "size_on_disk":
        return Reach(metric, rule, 1, 0.0, True, "The size is an exact number; it is compared as it is.")
    noise = assumed.memory_noise if metric == "peak_memory" else assumed.speed_noise
    return _ratio(metric, rule, limit, evaluate, noise)


def _new_invalid(rule: dict[str, float], samples: int, alpha: float) -> Reach:
    """A count is exact; what it shows of the rate is said."""
    most = binomial_upper(0, samples, alpha)
    sentence = (
        f"The count is exact. Were all {samples:,} outputs valid from both arms, that would show a rate of at most {100 * most:.1f}% "
        f"({100 * (1 - alpha):g}% confidence)."
    )
    return Reach("structured.new_invalid", rule, samples, 0.0, True, sentence)


def _accuracy(
    metric: str, rule: dict[str, float], samples: tuple[int, str], alpha: float, assumed: Assumptions
) -> Reach:
    """A candidate without any true loss must show a loss below the margin: M ≥ (caution · z + z) √(ρ · deff / n)."""

    def smallest_with(count: int) -> float:
        error = math.sqrt(assumed.discordance * assumed.design_effect / count)
        return max(_resolved(error, alpha, assumed), binomial_upper(0, count, alpha))

    (margin,), (count, unit) = rule.values(), samples
    smallest = smallest_with(count)
    found = f"{count:,} {unit} resolve {100 * smallest:.2f} points"
    basis = f"(assuming that {100 * assumed.discordance:g}% of answers flip, design effect {assumed.design_effect:g})"
    advice = ""
    if smallest > margin:
        # The first term falls as 1/√n and the exact bound faster, so this count is enough for both.
        needed = _hundreds(count * (smallest / margin) ** 2)
        advice = f" The margin is {100 * margin:g} points: ask for about {needed:,} {unit}."
    return Reach(metric, rule, count, smallest, smallest <= margin, f"{found} {basis}.{advice}")


def _divergence(rule: dict[str, float], tokens: int, alpha: float, assumed: Assumptions) -> Reach:
    """The error grows with the mean: x is resolved when limit − x ≥ k·x, with k = (caution · z + z) · variation · √(deff / n)."""
    limit = limit_of(rule).value
    error = assumed.divergence_variation * math.sqrt(assumed.divergence_design_effect / tokens)
    widening = _resolved(error, alpha, assumed)
    highest = limit / (1 + widening)
    sentence = (
        f"{tokens:,} tokens can show that a divergence of up to {wording.value('kl_divergence', highest)} is within the "
        f"limit (assuming that it varies by {assumed.divergence_variation:g} times its mean between tokens, "
        f"design effect {assumed.divergence_design_effect:g})."
    )
    if widening > 1:
        sentence += f" That is less than half of the limit: ask for about {_hundreds(tokens * widening**2):,} tokens."
    return Reach("kl_divergence", rule, tokens, limit - highest, widening <= 1, sentence)


def _loss(metric: str, rule: dict[str, float], texts: int, alpha: float, assumed: Assumptions) -> Reach:
    """What a cosine lacks of 1 is spread as a divergence is, in proportion to its mean: the same formula."""
    room = 1 - limit_of(rule).value
    error = assumed.loss_variation * math.sqrt(assumed.loss_design_effect / texts)
    widening = _resolved(error, alpha, assumed)
    lowest = 1 - room / (1 + widening)
    sentence = (
        f"{texts:,} texts can show that a mean from {wording.value(metric, lowest)} up is within the limit (assuming that what it lacks "
        f"of 1 varies by {assumed.loss_variation:g} times its mean between texts, design effect {assumed.loss_design_effect:g})."
    )
    if widening > 1:
        sentence += (
            f" That is less than half of what the limit leaves: ask for about {_hundreds(texts * widening**2):,} texts."
        )
    return Reach(metric, rule, texts, lowest - limit_of(rule).value, widening <= 1, sentence)


def _agreement(
    metric: str, rule: dict[str, float], samples: tuple[int, str], alpha: float, assumed: Assumptions
) -> Reach:
    """A candidate halfway between the limit and perfect agreement should pass."""
    limit, (count, unit) = limit_of(rule).value, samples
    halfway = (1 + limit) / 2
    error = math.sqrt(halfway * (1 - halfway) * assumed.design_effect / count)
    smallest, room = _resolved(error, alpha, assumed), halfway - limit
    sentence = (
        f"{count:,} {unit} resolve {wording.distance(metric, smallest)} "
        f"(assuming design effect {assumed.design_effect:g})."
    )
    if smallest > room:
        sentence += f" Too coarse for this limit: ask for about {_hundreds(count * (smallest / room) ** 2):,} {unit}."
    return Reach(metric, rule, count, smallest, smallest <= room, sentence)


def _resolved(error: float, alpha: float, assumed: Assumptions) -> float:
    """(caution · z_{1−alpha} + z_{0.80}) · SE: what an interval that is that much wider resolves."""
    return detectable(error, math.inf, alpha) + (assumed.caution - 1) * t_half_width(error, math.inf, 1 - 2 * alpha)


def _ratio(metric: str, rule: dict[str, float], limit: float, evaluate: Evaluate, noise: float) -> Reach:
    """Speed and memory are in reach when the A/A control can be expected to be quiet enough for a conclusion."""
    blocks = evaluate.blocks
    smallest = math.exp(detectable(noise / math.sqrt(blocks), blocks - 1, speed.ALPHA / evaluate.looks))
    quiet = _control_half_width(noise, blocks) <= speed.noise_tolerance(limit)
    sentence = (
        f"{blocks} blocks resolve a difference of {wording.distance(metric, smallest)} from {wording.difference(metric, limit)} "
        f"(assuming that a block's ratio varies by {100 * noise:g}%)."
    )
    if not quiet:
        counts = range(blocks, MOST_BLOCKS + 1)
        enough = (count for count in counts if _control_half_width(noise, count) <= speed.noise_tolerance(limit))
        needed = next(enough, MOST_BLOCKS)
        sentence += f" Too few for a quiet A/A control at this limit: ask for {needed} blocks."
    return Reach(metric, rule, blocks, smallest, quiet, sentence)


def _control_half_width(noise: float, blocks: int) -> float:
    return t_half_width(noise / math.sqrt(blocks), blocks - 1, speed.CONFIDENCE)


def _hundreds(number: float) -> int:
    return 100 * math.ceil(number / 100)
