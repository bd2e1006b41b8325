"""What tokens cost, in joules and in money, from evidence to rows."""

from __future__ import annotations

from collections.abc import Callable

from assay.recipe import EnergyMetric
from assay_evals.evidence import Evidence, Generation
from assay_evals.findings import UnmeasurableError, finding
from assay_evals.speed_findings import all_times, declared, decode_tokens_per_second, per_request, ratio
from assay_evals.verdict import Row
from assay_evals.wording import SLICE

# What the evaluator writes into the environment: which counters there are, or why there are none.
ENERGY = "energy"
# Absent, with the reason, where the machine has no means of measuring it; a gate on it is INVALID then.
MACHINE_PERMITTING = ("energy_per_output_token",)


def energy_per_output_token(evidence: Evidence) -> list[Row]:
    """Joules from the request to its last token, over all that was generated: the prompt's share and the idle machine's are in it."""
    metric = declared(evidence, EnergyMetric)

    def joules_per_token(generation: Generation) -> float:
        if generation.joules is None:
            raise UnmeasurableError("No energy was recorded.")
        return generation.joules / len(all_times(generation, metric.new_tokens))

    recorded = [generation.joules for run in evidence.runs for generation in run.generations]
    if recorded and all(joules is None for joules in recorded):
        raise UnmeasurableError(str(evidence.header.environment.get(ENERGY, "No energy was recorded.")))
    return [*ratio(metric.metric, evidence, lambda run: per_request(run, metric.prompt_tokens, joules_per_token))]


def cost_per_million_tokens(evidence: Evidence) -> list[Row]:
    """Price of an hour / (tokens per second · 3600) · 10⁶: decode alone, one request at a time, which is the dearest way to serve."""
    evaluate = evidence.header.recipe.evaluate
    if evaluate.price_per_hour is None:
        raise UnmeasurableError("The recipe names no price_per_hour.")
    rate, _ = decode_tokens_per_second(evidence)
    if rate.baseline is None or rate.candidate is None or rate.difference is None or rate.interval is None:
        raise UnmeasurableError("Decode speed was not measured.")
    dear = evaluate.price_per_hour / 3600 * 1e6
    return [
        finding(
            "cost_per_million_tokens" + (f"{SLICE}{evaluate.currency}" if evaluate.currency else ""),
            arms=(dear / rate.baseline, dear / rate.candidate),
            difference=1 / rate.difference,
            interval=(1 / rate.interval[1], 1 / rate.interval[0]),
            confidence=rate.confidence,
            samples=rate.n,
            clusters=rate.clusters,
        )
    ]


MEASURES: dict[str, Callable[[Evidence], list[Row]]] = {
    "energy_per_output_token": energy_per_output_token,
    "cost_per_million_tokens": cost_per_million_tokens,
}
