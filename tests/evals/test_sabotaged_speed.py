"""Candidates slowed down on purpose, timed in real processes: each is caught by the gate that should catch it, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sleeping_worker import TIMES

from assay.child import run_module
from assay.progress import Progress
from assay.recipe import Evaluate
from assay_evals.evidence import Evidence
from assay_evals.gate import judge
from assay_evals.speed import measure
from assay_evals.speed.measure import measure_speed, requests_of
from assay_evals.verdict import Verdict

pytestmark = pytest.mark.slow
LENGTHS = {"prompt_tokens": 40, "new_tokens": 24}
EVALUATE = {
    "length": 64,
    "blocks": 5,
    "quality": [{"metric": "kl_divergence", "tokens": 2000}],
    "speed": [
        {"metric": "decode_tokens_per_second", **LENGTHS},
        {"metric": "inter_token_latency", **LENGTHS},
        {"metric": "time_to_first_token", "prompt_tokens": 40},
        {"metric": "prefix_reuse", "prompt_tokens": 40, "prefix_tokens": 20},
    ],
}
GATE = {
    "kl_divergence": {"max": 0.1},
    "decode_tokens_per_second": {"min_speedup": 0.9},
    "inter_token_latency": {"max_ratio": 1.1},
    "time_to_first_token": {"max_ratio": 1.1},
    "prefix_reuse": {"max_ratio": 1.1},
}
SECONDS: dict[str, Any] = {"per_token": 0.02, "per_prompt_token": 0.004, "forgets": False}


@pytest.fixture
def judged(
    make_evidence: Callable[..., Evidence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Verdict]:
    """The verdict on a candidate of which the keywords change what it sleeps, timed by the worker in fresh processes."""
    support = Path(__file__).parents[1] / "support"
    monkeypatch.setenv("PYTHONPATH", str(support))
    monkeypatch.setattr(measure, "run_module", lambda what, _, **given: run_module(what, "sleeping_worker", **given))

    def run(**changes: Any) -> Verdict:
        for name, seconds in (("baseline", SECONDS), ("candidate", SECONDS | changes)):
            (tmp_path / name).mkdir()
            (tmp_path / name / TIMES).write_text(json.dumps(seconds))
        evidence = make_evidence(evaluate=json.dumps(EVALUATE), gate=json.dumps(GATE))
        asked = evidence.header.recipe.evaluate
        assert isinstance(asked, Evaluate)
        runs = measure_speed(
            {"baseline": tmp_path / "baseline", "candidate": tmp_path / "candidate"},
            "sleeping",
            requests_of(asked, range(1000)),
            range(asked.blocks),
            Progress(),
        )
        return judge(replace(evidence, runs=tuple(runs)))

    return run


def caught(verdict: Verdict) -> dict[str, str]:
    return {row.metric: row.verdict for row in verdict.gates if row.verdict != "PASS"}


def test_what_is_as_fast_passes(judged: Callable[..., Verdict]) -> None:
    verdict = judged()
    assert verdict.verdict == "PASS", verdict.reasons


def test_decoding_slowed_down_by_a_fifth_is_caught(judged: Callable[..., Verdict]) -> None:
    verdict = judged(per_token=1.2 * SECONDS["per_token"])
    assert caught(verdict) == {"decode_tokens_per_second": "FAIL", "inter_token_latency": "FAIL"}, verdict.reasons


def test_a_prompt_slowed_down_by_a_fifth_is_caught(judged: Callable[..., Verdict]) -> None:
    verdict = judged(per_prompt_token=1.2 * SECONDS["per_prompt_token"])
    assert caught(verdict) == {"time_to_first_token": "FAIL", "prefix_reuse": "FAIL"}, verdict.reasons


def test_a_cache_that_forgets_is_caught(judged: Callable[..., Verdict]) -> None:
    verdict = judged(forgets=True)
    assert caught(verdict) == {"prefix_reuse": "INVALID"}
    assert "with the prefix in the cache the first token is 40, without it 39" in " ".join(verdict.reasons)
