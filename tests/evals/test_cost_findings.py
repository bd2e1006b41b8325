from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from assay_evals.evidence import Evidence, SpeedRun
from assay_evals.gate import judge
from assay_evals.report import render_report
from assay_evals.report.table import verdict_table

Make = Callable[..., Evidence]
DECODE = {"metric": "decode_tokens_per_second", "prompt_tokens": 128, "new_tokens": 16}
ENERGY = {"metric": "energy_per_output_token", "prompt_tokens": 128, "new_tokens": 16}
WHY = "This machine shows no energy counters: /sys/class/powercap has no intel-rapl package."


def measured(
    make: Make, *, gated: bool = False, joules: Callable[[SpeedRun], float | None] | None = None, **evaluate: Any
) -> Evidence:
    asked = {
        "length": 64,
        "blocks": 6,
        "quality": [{"metric": "kl_divergence", "tokens": 2000}],
        "speed": [DECODE, ENERGY],
    }
    gate: dict[str, Any] = {"kl_divergence": {"max": 0.1}}
    gate |= {"energy_per_output_token": {"max_ratio": 0.6}} if gated else {}
    evidence = make(evaluate=json.dumps(asked | evaluate), gate=json.dumps(gate))
    header = evidence.header
    if joules is None:
        return replace(evidence, header=replace(header, environment=header.environment | {"energy": WHY}))
    runs = [
        replace(run, generations=tuple(replace(one, joules=joules(run)) for one in run.generations))
        for run in evidence.runs
    ]
    return replace(evidence, runs=tuple(runs))


def taken(run: SpeedRun) -> float:
    """16 tokens at 20 W and at 22 W, for as long as they took."""
    return (20 if run.arm == "baseline" else 22) * (run.generations[0].token_seconds[-1] or 0.0)


def test_energy_is_joules_by_tokens_and_can_be_gated(make_evidence: Make) -> None:
    evidence = measured(make_evidence, gated=True, joules=taken)
    verdict = judge(evidence)
    row = verdict.row("energy_per_output_token")
    assert row is not None and row.baseline is not None and row.difference is not None
    seconds = [run.generations[0].token_seconds[-1] or 0.0 for run in evidence.runs if run.arm == "baseline"]
    assert row.baseline == pytest.approx(20 * sum(seconds) / len(seconds) / 16, rel=0.01)
    assert row.difference == pytest.approx(1.1 * (1.28 + 15 / 72.6) / (1.1 + 15 / 22), rel=0.03)
    assert verdict.verdict == "FAIL"
    assert judge(
        measured(make_evidence, gated=True, joules=lambda run: taken(run) / (1 + (run.arm == "candidate")))
    ).passed


def test_without_counters_energy_is_absent_with_the_reason_in_every_report(make_evidence: Make) -> None:
    evidence = measured(make_evidence)
    verdict = judge(evidence)
    assert verdict.verdict == "PASS"
    (row,) = [row for row in verdict.reported if row.metric == "energy_per_output_token"]
    assert (row.n, row.candidate, row.difference, row.interval, row.reason) == (0, None, None, None, WHY)
    for form in ("html", "markdown", "junit"):
        text = render_report(form, verdict, evidence, {"layers": []}, {}).decode()
        assert WHY in text.replace("\\", ""), form
    console = Console(file=StringIO(), width=120)
    console.print(verdict_table(verdict))
    assert f"energy per output token not measured: {WHY}" in " ".join(console.file.getvalue().split())


def test_a_gate_on_energy_without_counters_is_invalid(make_evidence: Make) -> None:
    verdict = judge(measured(make_evidence, gated=True))
    assert verdict.verdict == "INVALID"
    assert verdict.gates[1].reason == WHY
    assert not [row for row in verdict.reported if row.metric == "energy_per_output_token"]


@pytest.mark.parametrize("joules", [None, 0.0])
def test_counters_that_fail_now_and_then_are_no_measurement(make_evidence: Make, joules: float | None) -> None:
    def now_and_then(run: SpeedRun) -> float | None:
        return joules if run.block == 3 else taken(run)

    verdict = judge(measured(make_evidence, gated=True, joules=now_and_then))
    assert verdict.verdict == "INVALID"
    assert verdict.gates[1].reason.startswith("Block 3, process ")


def test_other_metrics_are_not_excused(make_evidence: Make) -> None:
    evidence = measured(make_evidence)
    without = replace(evidence, runs=tuple(replace(run, generations=()) for run in evidence.runs))
    assert judge(without).verdict == "INVALID"


@pytest.mark.parametrize(("currency", "name"), [(None, ""), ("EUR", "@EUR")])
def test_what_a_million_tokens_cost_follows_from_the_decode_speed(
    make_evidence: Make, currency: str | None, name: str
) -> None:
    price = {"price_per_hour": 0.12} | ({"currency": currency} if currency else {})
    verdict = judge(measured(make_evidence, **price))
    cost, rate = verdict.row(f"cost_per_million_tokens{name}"), verdict.row("decode_tokens_per_second")
    assert cost is not None and rate is not None and cost.interval is not None and rate.interval is not None
    assert cost.baseline == pytest.approx(0.12 / 3600 * 1e6 / rate.baseline, rel=1e-9)
    assert cost.candidate == pytest.approx(0.12 / 3600 * 1e6 / rate.candidate, rel=1e-9)
    assert cost.interval == pytest.approx((1 / rate.interval[1], 1 / rate.interval[0]), rel=1e-9)
    assert 1.2 < cost.baseline < 1.8 and cost.n == rate.n
    console = Console(file=StringIO(), width=200)
    console.print(verdict_table(verdict))
    assert "quality 90%, n tokens or questions in documents; speed 95%, n processes in blocks" in " ".join(
        console.file.getvalue().split()
    )


def test_without_a_price_nothing_costs_anything(make_evidence: Make) -> None:
    assert not [row for row in judge(measured(make_evidence)).reported if row.metric.startswith("cost")]


def test_bits_per_weight_stand_beside_the_size(make_evidence: Make) -> None:
    evidence = make_evidence()
    row = judge(evidence).row("bits_per_weight")
    assert row is not None and (row.candidate, row.interval) == (4.6, (4.6, 4.6))
    arm = replace(evidence.header.candidate, bits_per_weight=None)
    assert judge(replace(evidence, header=replace(evidence.header, candidate=arm))).row("bits_per_weight") is None
