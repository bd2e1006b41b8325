from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from assay.recipe import SPEED_GATES, Evaluate
from assay_evals.evidence import Evidence, Generation, PrefixHit, SpeedRun, read_evidence, write_evidence
from assay_evals.gate import judge
from assay_evals.latency_findings import inter_token_latency
from assay_evals.report import render_report
from assay_evals.verdict import Row, Verdict
from assay_evals.wording import is_control

Make = Callable[..., Evidence]
PROMPTS, NEW = (64, 256), 40
QUALITY = [{"metric": "kl_divergence", "tokens": 2000}]
LATENCIES = ("inter_token_latency", "time_per_output_token", "end_to_end_latency")


def measured(
    make: Make,
    *speed: dict[str, Any],
    gate: dict[str, Any] | None = None,
    noise: float = 0.02,
    change: Callable[[SpeedRun], SpeedRun] = lambda run: run,
    **evaluate: Any,
) -> Evidence:
    """Evidence of a candidate that is 3.3 times as fast at decoding and 1.16 times as slow at the prompt, at two prompt lengths."""
    asked = {"length": 64, "blocks": 6, "quality": QUALITY, "speed": speed} | evaluate
    evidence = make(
        evaluate=json.dumps(asked), gate=json.dumps({"kl_divergence": {"max": 0.1}} | (gate or {})), noise=noise
    )
    return replace(evidence, runs=tuple(change(_two_lengths(run)) for run in evidence.runs))


def _two_lengths(run: SpeedRun) -> SpeedRun:
    first, second = (seconds or 0.0 for seconds in run.generations[0].token_seconds[:2])
    times = [first + (second - first) * number for number in range(NEW)]
    long = tuple(4 * times[0] + 1.5 * (seconds - times[0]) for seconds in times)
    return replace(
        run,
        generations=(
            Generation(prompt_tokens=64, token_seconds=tuple(times), first_token=7),
            Generation(prompt_tokens=256, token_seconds=long, first_token=8),
        ),
        prefix_hits=(PrefixHit(prompt_tokens=256, prefix_tokens=192, seconds=times[0], first_token=8),),
    )


def found(verdict: Verdict, metric: str) -> Row:
    row = verdict.row(metric)
    assert row is not None and row.difference is not None and row.interval is not None, metric
    return row


def arm(evidence: Evidence, name: str) -> list[SpeedRun]:
    return [run for run in evidence.runs if run.arm == name]


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def test_each_metric_is_its_formula(make_evidence: Make) -> None:
    """Computed here once more, from the times themselves."""
    metrics = [{"metric": name, "prompt_tokens": [256], "new_tokens": NEW} for name in LATENCIES]
    metrics += [
        {"metric": name, "prompt_tokens": [256]} for name in ("time_to_first_token", "prefill_tokens_per_second")
    ]
    decode = {"metric": "decode_tokens_per_second", "prompt_tokens": 256, "new_tokens": NEW}
    evidence = measured(make_evidence, *metrics, decode)
    verdict = judge(evidence)
    assert verdict.verdict == "PASS", verdict.reasons
    for name in ("baseline", "candidate"):
        times = [run.generations[1].token_seconds for run in arm(evidence, name)]
        expected = {
            "time_to_first_token": geometric([one[0] for one in times]),
            "prefill_tokens_per_second": geometric([256 / one[0] for one in times]),
            "end_to_end_latency": geometric([one[-1] for one in times]),
            "time_per_output_token": geometric([(one[-1] - one[0]) / (NEW - 1) for one in times]),
            "inter_token_latency": geometric([float(np.mean(np.diff(one))) for one in times]),
        }
        for metric, value in expected.items():
            assert getattr(found(verdict, metric), name) == pytest.approx(value, rel=1e-9), metric
    per_token, rate = found(verdict, "time_per_output_token"), found(verdict, "decode_tokens_per_second")
    assert per_token.candidate == pytest.approx(1 / rate.candidate, rel=1e-9)
    assert per_token.interval == pytest.approx((1 / rate.interval[1], 1 / rate.interval[0]), rel=1e-9)


def test_gaps_are_pooled_and_requests_are_not(make_evidence: Make) -> None:
    """Gaps of the longer prompt are 1.5 times as long: pooled they give the arithmetic mean of both."""
    metric = {"metric": "inter_token_latency", "prompt_tokens": [*PROMPTS], "new_tokens": NEW}
    evidence = measured(make_evidence, metric)
    run = evidence.runs[0]
    gaps = np.concatenate([np.diff(one.token_seconds) for one in run.generations])
    assert gaps[-1] / gaps[0] == pytest.approx(1.5)
    both = found(judge(evidence), "inter_token_latency")
    short = found(judge(measured(make_evidence, metric | {"prompt_tokens": 64})), "inter_token_latency")
    assert both.candidate / short.candidate == pytest.approx(1.25, rel=1e-9)


def test_every_prompt_length_is_a_row_and_a_gate(make_evidence: Make) -> None:
    def slow_at_256(run: SpeedRun) -> SpeedRun:
        short, long = run.generations
        if run.arm == "baseline":
            return run
        return replace(run, generations=(short, replace(long, token_seconds=tuple(9 * t for t in long.token_seconds))))

    metric = {"metric": "time_to_first_token", "prompt_tokens": [*PROMPTS]}
    gate = {"time_to_first_token": {"max_ratio": 1.5}}
    verdict = judge(measured(make_evidence, metric, gate=gate))
    names = ["time_to_first_token@prompt_tokens=64", "time_to_first_token@prompt_tokens=256"]
    assert [row.metric for row in verdict.gates] == ["kl_divergence", *names]
    assert verdict.verdict == "PASS"
    controls = [row.metric for row in verdict.reported if is_control(row.metric)]
    assert controls[:2] == [f"{name}.same_arm" for name in names]
    slow = judge(measured(make_evidence, metric, gate=gate, change=slow_at_256))
    assert [row.verdict for row in slow.gates] == ["PASS", "PASS", "FAIL"]
    assert slow.verdict == "FAIL"
    assert slow.reasons[0].startswith("time to first token, prompt_tokens=256: Even the better end")


def test_times_at_several_lengths_are_drawn_as_curves(make_evidence: Make) -> None:
    metric = {"metric": "time_to_first_token", "prompt_tokens": [*PROMPTS]}
    evidence = measured(make_evidence, metric)
    page = render_report("html", judge(evidence), evidence, {}, {}).decode()
    assert page.count("class='curve baseline'") == page.count("class='curve candidate'") == 1
    section = page[page.index("By length of the prompt") :]
    assert "Time to first token" in section and ">64</text>" in section and ">256</text>" in section
    single = measured(make_evidence, metric | {"prompt_tokens": 64})
    assert "By length of the prompt" not in render_report("html", judge(single), single, {}, {}).decode()


def test_a_length_that_was_not_measured_is_invalid(make_evidence: Make) -> None:
    metric = {"metric": "time_to_first_token", "prompt_tokens": [64, 1024]}
    verdict = judge(measured(make_evidence, metric, gate={"time_to_first_token": {"max_ratio": 1.5}}))
    assert verdict.verdict == "INVALID"
    assert verdict.gates[1].metric == "time_to_first_token"
    assert verdict.gates[1].reason.endswith("no request with a prompt of 1024 tokens.")


@pytest.mark.parametrize("metric", LATENCIES)
def test_a_request_that_stopped_early_is_invalid(make_evidence: Make, metric: str) -> None:
    asked = {"metric": metric, "prompt_tokens": 64, "new_tokens": NEW + 1}
    verdict = judge(measured(make_evidence, asked, gate={metric: {"max_ratio": 9}}))
    assert verdict.verdict == "INVALID"
    said = f"A request for {NEW + 1} new tokens gave {NEW}: it stopped early or ran over."
    assert verdict.gates[1].reason.endswith(said)


def stalling(run: SpeedRun) -> SpeedRun:
    """One gap in 39 of the candidate's takes five times as long."""
    if run.arm == "baseline":
        return run
    times = [seconds or 0.0 for seconds in run.generations[0].token_seconds]
    gaps = np.diff(times)
    gaps[(run.block * 4 + run.position) % len(gaps)] *= 5
    short = replace(run.generations[0], token_seconds=tuple(times[0] + np.concatenate([[0.0], np.cumsum(gaps)])))
    return replace(run, generations=(short, run.generations[1]))


def test_percentiles_show_the_stalls_that_a_mean_hides(make_evidence: Make) -> None:
    metric = {"metric": "inter_token_latency", "prompt_tokens": 64, "new_tokens": NEW}
    gate = {"inter_token_latency": {"max_ratio": 0.5}}
    steady, uneven = (
        judge(measured(make_evidence, metric, gate=gate, change=change, noise=0.01))
        for change in (lambda run: run, stalling)
    )
    assert steady.verdict == uneven.verdict == "PASS"
    for name, ratio in (("p50", 1.0), ("p90", 1.0), ("p99", 5.0)):
        before, after = (found(verdict, f"inter_token_latency.{name}") for verdict in (steady, uneven))
        assert (before.n, before.clusters) == (2 * 2 * 6 * (NEW - 1), 6)
        assert after.difference / before.difference == pytest.approx(ratio, rel=0.15), name
        assert after.interval[0] < after.difference < after.interval[1]


@pytest.mark.parametrize(
    ("new_tokens", "names"), [(8, {"p50", "p90"}), (16, {"p50", "p90"}), (40, {"p50", "p90", "p99"})]
)
def test_a_percentile_is_told_only_where_enough_gaps_stand_behind_it(
    make_evidence: Make, new_tokens: int, names: set[str]
) -> None:
    """12 processes of an arm: 84, 180 and 468 gaps, of which 459 are needed for p99 and 44 for p90."""

    def cut(run: SpeedRun) -> SpeedRun:
        times = tuple(0.1 + 0.01 * number * (1.1 if run.arm == "candidate" else 1.0) for number in range(new_tokens))
        return replace(run, generations=(Generation(prompt_tokens=64, token_seconds=times),))

    metric = {"metric": "inter_token_latency", "prompt_tokens": 64, "new_tokens": new_tokens}
    rows = inter_token_latency(measured(make_evidence, metric, change=cut))
    assert {row.metric.rpartition(".")[2] for row in rows[2:]} == names
    assert rows[0].difference == pytest.approx(1.1)


def test_the_interval_of_a_percentile_holds_the_truth(make_evidence: Make) -> None:
    """Gaps with a tail, in processes that differ: of 120 intervals at 95% at least 100 hold the ratio that they were drawn with."""
    rng = np.random.default_rng(5)
    metric = {"metric": "inter_token_latency", "prompt_tokens": 64, "new_tokens": 64}
    template = measured(make_evidence, metric)

    def drawn(run: SpeedRun) -> SpeedRun:
        gaps = (0.0125 if run.arm == "candidate" else 0.04) * rng.lognormal(0, 0.04, 63) * math.exp(rng.normal(0, 0.02))
        gaps *= np.where(rng.random(63) < 0.03, 1 + rng.exponential(0.5, 63), 1)
        return replace(
            run, generations=(Generation(prompt_tokens=64, token_seconds=tuple(0.5 + np.cumsum([0, *gaps]))),)
        )

    held = dict.fromkeys(("p50", "p90", "p99"), 0)
    for _ in range(120):
        for row in inter_token_latency(replace(template, runs=tuple(map(drawn, template.runs))))[2:]:
            assert row.interval is not None
            held[row.metric.rpartition(".")[2]] += row.interval[0] <= 0.0125 / 0.04 <= row.interval[1]
    assert all(count >= 100 for count in held.values()), held


REUSE = {"metric": "prefix_reuse", "prompt_tokens": 256, "prefix_tokens": 192}


def test_a_prefix_hit_is_compared_with_the_baselines_and_with_no_hit(make_evidence: Make) -> None:
    verdict = judge(measured(make_evidence, REUSE, gate={"prefix_reuse": {"max_ratio": 1.5}}))
    assert verdict.verdict == "PASS", verdict.reasons
    hit, share = found(verdict, "prefix_reuse"), found(verdict, "prefix_reuse.share")
    assert hit.difference == pytest.approx(1.28 / 1.10, rel=0.03)
    assert (share.baseline, share.candidate) == (pytest.approx(0.25), pytest.approx(0.25))
    assert verdict.row("prefix_reuse.same_arm") is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda hit: (replace(hit, first_token=9),),
            "with the prefix in the cache the first token is 9, without it 8: the ",
        ),
        (lambda hit: (), "0 requests found their prefix in the cache; one was to."),
        (lambda hit: (hit, hit), "2 requests found their prefix in the cache; one was to."),
        (lambda hit: (replace(hit, prefix_tokens=100),), "0 requests found their prefix in the cache; one was to."),
        (lambda hit: (replace(hit, seconds=None),), "the value is not a finite number."),
        (lambda hit: (replace(hit, seconds=0.0),), "the value is 0, which no measurement can be."),
    ],
    ids=["broken cache", "none", "two", "another prefix", "no number", "no time"],
)
@pytest.mark.parametrize("gated", [True, False])
def test_a_cache_that_does_not_hold_what_it_should_is_invalid(
    make_evidence: Make, change: Callable[[PrefixHit], tuple[PrefixHit, ...]], reason: str, gated: bool
) -> None:
    def broken(run: SpeedRun) -> SpeedRun:
        """In one process of 24."""
        return replace(run, prefix_hits=change(run.prefix_hits[0])) if (run.block, run.position) == (2, 1) else run

    gate = {"prefix_reuse": {"max_ratio": 1.5}} if gated else {}
    verdict = judge(measured(make_evidence, REUSE, gate=gate, change=broken))
    assert verdict.verdict == "INVALID"
    assert any(reason in told and "Block 2, process 1" in told for told in verdict.reasons), verdict.reasons


def test_a_run_keeps_what_it_measured(make_evidence: Make, tmp_path: Any) -> None:
    evidence = measured(make_evidence, REUSE)
    write_evidence(tmp_path / "evidence", evidence.header, evidence.windows, evidence.runs)
    assert read_evidence(tmp_path / "evidence").runs == evidence.runs


def test_evidence_without_prefixes_and_energy_is_read(make_evidence: Make, tmp_path: Any) -> None:
    """As a release wrote it that did not measure them."""
    line = {
        "block": 0,
        "position": 0,
        "arm": "baseline",
        "load_seconds": 1.0,
        "peak_memory_bytes": 5,
        "generations": [{"prompt_tokens": 8, "token_seconds": [1.0]}],
    }
    evidence = make_evidence()
    write_evidence(tmp_path / "evidence", evidence.header, (), ())
    header = json.loads((tmp_path / "evidence/evidence.json").read_bytes())
    speed = json.dumps(line).encode() + b"\n"
    from assay.files import sha256_bytes

    (tmp_path / "evidence/speed.jsonl").write_bytes(speed)
    header["files"]["speed.jsonl"] = sha256_bytes(speed)
    (tmp_path / "evidence/evidence.json").write_text(json.dumps(header))
    (run,) = read_evidence(tmp_path / "evidence").runs
    assert (run.prefix_hits, run.generations[0].joules, run.generations[0].first_token) == ((), None, None)


def test_every_speed_gate_of_the_recipe_is_a_metric_of_the_recipe() -> None:
    gates = SPEED_GATES
    evaluate = json.dumps(Evaluate.model_json_schema())
    assert all(f'"const": "{name}"' in evaluate for name in gates)
