from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from assay.recipe import QUALITY_GATES, SPEED_GATES, Evaluate, Gate, MinSpeedup
from assay_evals.evidence import Answer, Cloze, Evidence
from assay_evals.gate import judge
from assay_evals.planning import Assumptions, Reach, plan_gates


def plan(metric: dict[str, Any], criterion: dict[str, float], blocks: int = 8, **assumed: float) -> Reach:
    speed = metric["metric"] not in QUALITY_GATES
    quality = [{"metric": "kl_divergence"}] if speed else [metric]
    evaluate = {"quality": quality, "speed": [metric] if speed else [], "blocks": blocks}
    (found,) = plan_gates(
        Evaluate.model_validate_json(json.dumps(evaluate)),
        Gate.model_validate_json(json.dumps({metric["metric"]: criterion})),
        Assumptions(**assumed),
    )
    return found


# One-sided 5%, 80% power, no true loss: n = 6.1826 · discordance / margin².
@pytest.mark.parametrize(
    ("discordance", "margin", "samples"),
    [(0.02, 0.02, 309), (0.05, 0.02, 773), (0.10, 0.02, 1546), (0.05, 0.01, 3091), (0.10, 0.005, 24730)],
)
def test_cloze_samples_agree_with_the_published_table(discordance: float, margin: float, samples: int) -> None:
    enough = plan(
        {"metric": "cloze_accuracy", "samples": samples + 1},
        {"max_drop": margin},
        discordance=discordance,
        design_effect=1.0,
        caution=1.0,
    )
    too_few = plan(
        {"metric": "cloze_accuracy", "samples": samples - 1},
        {"max_drop": margin},
        discordance=discordance,
        design_effect=1.0,
        caution=1.0,
    )
    assert enough.in_reach
    assert not too_few.in_reach
    assert enough.smallest == pytest.approx(margin, rel=2e-3)


def test_further_looks_are_planned_for_at_their_size_and_their_error() -> None:
    metric = {"metric": "cloze_accuracy", "samples": 500}
    gate = Gate.model_validate_json('{"cloze_accuracy": {"max_drop": 0.02}, "peak_memory": {"max_ratio": 0.9}}')

    def reach(samples: int, looks: int, blocks: int) -> list[Reach]:
        evaluate = {"quality": [metric | {"samples": samples}], "blocks": blocks, "looks": looks}
        return list(plan_gates(Evaluate.model_validate_json(json.dumps(evaluate)), gate))

    one, three = reach(2000, 1, 32), reach(500, 3, 8)
    assert [row.samples for row in three] == [row.samples for row in one] == [2000, 32]
    # The same samples at a third of the error: (1.25 z(0.05/3) + z(0.2)) / (1.25 z(0.05) + z(0.2)).
    assert three[0].smallest / one[0].smallest == pytest.approx((2.6600 + 0.8416) / (2.0561 + 0.8416), rel=1e-3)
    assert three[1].smallest > one[1].smallest


def test_a_design_effect_stands_for_as_many_times_the_samples() -> None:
    plain = plan({"metric": "cloze_accuracy", "samples": 2000}, {"max_drop": 0.02}, design_effect=1.0)
    clustered = plan({"metric": "cloze_accuracy", "samples": 8000}, {"max_drop": 0.02}, design_effect=4.0)
    assert plain.smallest == pytest.approx(clustered.smallest)


def test_questions_that_never_flip_are_still_needed_in_number() -> None:
    metric = {"metric": "cloze_accuracy", "samples": 299}
    assert plan(metric, {"max_drop": 0.01}, discordance=0.0).in_reach
    assert not plan(metric | {"samples": 298}, {"max_drop": 0.01}, discordance=0.0).in_reach


@pytest.mark.parametrize("samples", [20, 200, 1000])
def test_the_advised_number_of_questions_is_enough(samples: int) -> None:
    found = plan({"metric": "cloze_accuracy", "samples": samples}, {"max_drop": 0.02})
    assert not found.in_reach
    advised = int(found.sentence.rsplit("about ", 1)[1].split(" ")[0].replace(",", ""))
    assert plan({"metric": "cloze_accuracy", "samples": advised}, {"max_drop": 0.02}).in_reach


def test_a_candidate_without_loss_passes_in_four_runs_of_five_at_the_planned_size(
    make_evidence: Callable[..., Evidence],
) -> None:
    """The forecast against the gate itself: 600 independent questions at the margin that they can just resolve."""
    found = plan({"metric": "cloze_accuracy", "samples": 600}, {"max_drop": 0.5}, discordance=0.1, design_effect=1.0)
    template = make_evidence(evaluate='{"length": 64, "quality": [{"metric": "cloze_accuracy", "samples": 600}]}')
    rng = np.random.default_rng(11)
    gate = Gate.model_validate_json(json.dumps({"cloze_accuracy": {"max_drop": found.smallest}}))
    passed = 0
    for _ in range(200):
        changes = rng.choice([-1, 0, 1], size=600, p=[0.05, 0.9, 0.05])
        clozes = tuple(
            Cloze(
                document=f"d{index % 60}",
                window=0,
                position=index,
                word="w",
                context="c",
                baseline=Answer(correct=bool(change <= 0), answer=""),
                candidate=Answer(correct=bool(change >= 0), answer=""),
            )
            for index, change in enumerate(changes)
        )
        passed += judge(replace(template, windows=(), clozes=clozes, runs=()), gate).verdict == "PASS"
    assert 0.72 <= passed / 200 <= 0.88


def test_more_samples_resolve_less() -> None:
    for metric, criterion in (("kl_divergence", {"max": 0.1}), ("top1_agreement", {"min": 0.9})):
        few = plan({"metric": metric, "tokens": 1_000}, criterion)
        many = plan({"metric": metric, "tokens": 4_000}, criterion)
        assert 0 < many.smallest < few.smallest
        assert plan({"metric": metric, "tokens": 20_000}, criterion).in_reach
        assert not plan({"metric": metric, "tokens": 20}, criterion).in_reach
    few = plan({"metric": "decode_tokens_per_second"}, {"min_speedup": 1.5}, blocks=4)
    assert 1 < plan({"metric": "decode_tokens_per_second"}, {"min_speedup": 1.5}, blocks=16).smallest < few.smallest


def test_a_limit_near_one_needs_more_blocks_for_a_quiet_control() -> None:
    metric = {"metric": "time_to_first_token"}
    assert plan(metric, {"max_ratio": 1.5}, blocks=4).in_reach
    found = plan(metric, {"max_ratio": 1.0}, blocks=4)
    assert not found.in_reach
    advised = int(found.sentence.rsplit("ask for ", 1)[1].split(" ")[0])
    assert plan(metric, {"max_ratio": 1.0}, blocks=advised).in_reach
    assert not plan(metric, {"max_ratio": 1.0}, blocks=advised - 1).in_reach


RATIOS = [name for name in SPEED_GATES if name != "size_on_disk"]


@pytest.mark.parametrize("metric", RATIOS)
def test_every_speed_gate_says_how_many_blocks_it_needs(metric: str) -> None:
    """The advised number is enough, and one less is not; with noise twice as large it is more."""
    faster = "min_speedup" if MinSpeedup in get_args(Gate.model_fields[metric].annotation) else "max_ratio"
    noise = {"speed_noise": 0.08, "memory_noise": 0.08}
    found = plan({"metric": metric}, {faster: 1.0}, blocks=3, **noise)
    assert not found.in_reach
    advised = int(found.sentence.rsplit("ask for ", 1)[1].split(" ")[0])
    assert plan({"metric": metric}, {faster: 1.0}, blocks=advised, **noise).in_reach
    assert not plan({"metric": metric}, {faster: 1.0}, blocks=advised - 1, **noise).in_reach
    assert not plan({"metric": metric}, {faster: 1.0}, blocks=advised, speed_noise=0.16, memory_noise=0.16).in_reach


def test_memory_is_planned_with_its_own_noise_and_size_with_none() -> None:
    memory = plan({"metric": "peak_memory"}, {"max_ratio": 0.8})
    assert math.log(memory.smallest) == pytest.approx(
        math.log(plan({"metric": "time_to_first_token"}, {"max_ratio": 0.8}).smallest) / 5
    )
    assert plan({"metric": "size_on_disk"}, {"max_ratio": 0.5}).smallest == 0
    assert plan({"metric": "size_on_disk"}, {"max_ratio": 0.5}).in_reach


def test_every_gate_is_planned_in_the_order_of_the_schema(good: Evidence) -> None:
    recipe = good.header.recipe
    found = plan_gates(recipe.evaluate, recipe.gate)
    assert [reach.metric for reach in found] == list(recipe.gate.declared())
    assert all(reach.sentence.endswith(".") for reach in found)
