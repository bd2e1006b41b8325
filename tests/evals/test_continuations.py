"""Prompts that both arms continue on their own: what forced text hides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from assay.errors import UsageError
from assay.progress import Progress
from assay.recipe import Evaluate, Gate
from assay_evals.evidence import Continuation, Continued, Evidence, read_evidence, write_evidence
from assay_evals.gate import gate_row, judge
from assay_evals.planning import plan_gates
from assay_evals.quality.measure import measure_continuations
from assay_evals.quality.passages import Passage, Prompt, select_prompts
from assay_evals.runtimes.base import Runtime, open_runtime
from assay_evals.statistics import binomial_lower, binomial_upper

GATE = {"min": 0.5}


def evaluate(**metric: Any) -> Evaluate:
    quality = [{"metric": "greedy_agreement", "prompt_tokens": 8, "new_tokens": 12} | metric]
    return Evaluate.model_validate_json(json.dumps({"quality": quality}))


def one(number: int, same: int, before: tuple[int, bool], after: tuple[int, bool]) -> Continuation:
    arms = [Continued(tokens=tokens, ended=ended, text="…") for tokens, ended in (before, after)]
    return Continuation(
        document=f"document-{number % 20:02}",
        window=number // 20,
        prompt_tokens=8,
        new_tokens=12,
        prompt="once upon",
        same=same,
        together="a time"[:same],
        baseline=arms[0],
        candidate=arms[1],
    )


def alike(count: int, differ: int = 0) -> tuple[Continuation, ...]:
    """count prompts, of which `differ` part after 5 tokens."""
    return tuple(one(number, 5 if number < differ else 12, (12, False), (12, False)) for number in range(count))


# Prompts


def test_prompts_are_beginnings_of_the_first_windows_that_are_long_enough() -> None:
    passages = [Passage(f"d{number}", 0, tuple(range(length)), ()) for number, length in enumerate((20, 7, 8, 30))]
    assert select_prompts(passages, evaluate(prompts=2)) == [
        Prompt("d0", 0, tuple(range(8)), 12),
        Prompt("d2", 0, tuple(range(8)), 12),
    ]
    with pytest.raises(UsageError, match=r"gives 3 windows of at least 8 tokens; greedy_agreement asks for 4 prompts"):
        select_prompts(passages, evaluate(prompts=4))


def test_nothing_is_continued_unless_it_is_asked_for() -> None:
    quiet = Evaluate.model_validate_json('{"quality": [{"metric": "kl_divergence"}]}')
    assert select_prompts([Passage("d", 0, tuple(range(64)), ())], quiet) == []


@pytest.fixture(scope="module")
def arms(
    tiny_model: Callable[[str], Path], make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Runtime, Runtime]:
    other = make_model(tmp_path_factory.mktemp("other") / "llama", "llama", seed=1)
    return open_runtime("transformers", tiny_model("llama")), open_runtime("transformers", other)


def test_both_arms_go_on_until_they_end_or_part(arms: tuple[Runtime, Runtime]) -> None:
    prompts = [Prompt("d", number, tuple(range(number, number + 8)), 12) for number in range(1, 5)]
    same = list(measure_continuations(arms[0], arms[0], prompts, Progress()))
    assert len(same) == 4 and all(row.alike for row in same)
    apart = list(measure_continuations(*arms, prompts, Progress()))
    for row, prompt in zip(apart, prompts, strict=True):
        found = [arm.generate(list(prompt.tokens), 12, stops=True).tokens for arm in arms]
        assert (row.baseline.tokens, row.candidate.tokens) == (len(found[0]), len(found[1]))
        assert found[0][: row.same] == found[1][: row.same]
        assert row.alike or found[0][row.same : row.same + 1] != found[1][row.same : row.same + 1]
        assert row.baseline.text == arms[0].decode(list(found[0]))
    assert not all(row.alike for row in apart)


def test_more_in_common_than_either_has_is_no_evidence() -> None:
    with pytest.raises(ValueError, match="no more tokens in common"):
        one(0, 6, (5, True), (12, False))


def test_one_that_ends_where_the_other_goes_on_is_not_alike() -> None:
    assert not one(0, 5, (5, True), (12, False)).alike
    assert one(0, 5, (5, True), (5, True)).alike


# Findings and gate


@pytest.mark.parametrize(
    ("count", "differ", "verdict"),
    [(200, 20, "PASS"), (200, 180, "FAIL"), (200, 100, "INCONCLUSIVE"), (4, 0, "INCONCLUSIVE")],
)
def test_the_share_of_prompts_that_go_on_alike_is_gated(good: Evidence, count: int, differ: int, verdict: str) -> None:
    row = gate_row("greedy_agreement", GATE, replace(good, continuations=alike(count, differ)))
    assert row.verdict == verdict and row.difference == pytest.approx(1 - differ / count)
    assert row.interval is not None
    # Every document has the same share, so the spread between documents alone would say nothing is uncertain.
    exact = (binomial_lower(count - differ, count, 0.05), binomial_upper(count - differ, count, 0.05))
    assert row.interval == pytest.approx(exact)


def test_a_candidate_that_does_not_stop_shows(good: Evidence) -> None:
    """A quarter of the prompts: the baseline ends after 6 tokens, the candidate babbles to the limit."""
    rows = tuple(
        one(number, 6, (6, True), (12, False)) if number % 4 == 0 else one(number, 8, (8, True), (8, True))
        for number in range(200)
    )
    found = {row.metric: row for row in judge(replace(good, continuations=rows)).reported}
    assert (found["greedy_agreement"].difference, found["greedy_agreement.together"].difference) == (0.75, 7.5)
    unstopped, length = found["greedy_agreement.unstopped"], found["greedy_agreement.length"]
    assert (unstopped.baseline, unstopped.candidate, unstopped.difference) == (0, 0.25, 0.25)
    assert (length.baseline, length.candidate, length.difference) == (7.5, 9, 1.2)
    assert unstopped.interval and unstopped.interval[0] > 0 and length.interval and 1 < length.interval[0] < 1.2


def test_the_interval_of_the_length_holds_the_truth_as_often_as_it_says(good: Evidence) -> None:
    import numpy as np

    random, held = np.random.default_rng(0), 0
    for _ in range(200):
        lengths = np.minimum(12, random.poisson(6, (160, 2)) + 1)
        rows = tuple(one(n, 0, (int(b), b < 12), (int(c), c < 12)) for n, (b, c) in enumerate(lengths))
        found = {
            row.metric: row for row in judge(replace(good, continuations=rows, windows=(), clozes=(), runs=())).reported
        }
        low, high = found["greedy_agreement.length"].interval or (0, 0)
        held += low <= 1 <= high
    assert 0.85 <= held / 200 <= 0.95


def test_fewer_than_declared_are_invalid(good: Evidence) -> None:
    header = replace(good.header, recipe=replace(good.header.recipe, evaluate=evaluate(prompts=30)))
    enough, short = (replace(good, header=header, continuations=alike(count)) for count in (30, 29))

    def passed(evidence: Evidence) -> dict[str, str]:
        return {check.name: check.detail for check in judge(evidence).checks if not check.passed}

    assert "samples as declared" not in passed(enough)
    assert "Measured only 29 of 30 continuations" in passed(short)["samples as declared"]
    doubled = replace(enough, continuations=(*alike(30), alike(1)[0]))
    assert "continuation ('document-00', 0)" in passed(doubled)["each sample once"]


def test_evidence_keeps_them(good: Evidence, tmp_path: Path) -> None:
    written = write_evidence(tmp_path / "evidence", good.header, (*good.windows, *alike(3, 1)), ())
    assert written.continuations == alike(3, 1) and read_evidence(tmp_path / "evidence") == written


def test_planning_tells_how_many_prompts_it_takes() -> None:
    gate = Gate.model_validate_json('{"greedy_agreement": {"min": 0.8}}')
    (few,), (many,) = (plan_gates(evaluate(prompts=count), gate) for count in (32, 3000))
    assert not few.in_reach and "32 prompts resolve" in few.sentence and "prompts." in few.sentence
    assert many.in_reach and many.samples == 3000
