from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_powercap import fake_powercap

from assay.errors import AssayError
from assay.host import offline_environment
from assay.progress import Progress
from assay.recipe import Evaluate
from assay_evals.evidence import SpeedRun
from assay_evals.speed.measure import measure_speed, requests_of

STREAM = [token % 500 + 1 for token in range(1000)]


def evaluate(*speed: dict[str, Any]) -> Evaluate:
    return Evaluate.model_validate_json(json.dumps({"quality": [{"metric": "kl_divergence"}], "speed": speed}))


def decode(prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    return {"metric": "decode_tokens_per_second", "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}


def first_token(prompt_tokens: int | list[int]) -> dict[str, Any]:
    return {"metric": "time_to_first_token", "prompt_tokens": prompt_tokens}


def request(prompt_tokens: int, new_tokens: int, prefix_tokens: int = 0) -> dict[str, Any]:
    return {"prompt": STREAM[:prompt_tokens], "new_tokens": new_tokens, "prefix_tokens": prefix_tokens}


@pytest.mark.parametrize(
    ("speed", "wanted"),
    [
        ((), []),
        (({"metric": "size_on_disk"},), []),
        ((decode(128, 32),), [(128, 32)]),
        ((first_token(128),), [(128, 1)]),
        ((decode(128, 32), first_token(128)), [(128, 32)]),
        ((first_token(512), decode(128, 32)), [(128, 32), (512, 1)]),
        ((first_token([64, 512]), decode(512, 32)), [(64, 1), (512, 32)]),
        (({"metric": "prefix_reuse", "prompt_tokens": 128, "prefix_tokens": 96},), [(128, 1)]),
        (({"metric": "load_time"},), [(256, 16)]),
        (({"metric": "peak_memory"},), [(256, 16)]),
        (({"metric": "peak_memory"}, first_token(64)), [(64, 1)]),
    ],
    ids=[
        "nothing",
        "size only",
        "decode",
        "first token",
        "one request for both",
        "two",
        "several lengths",
        "prefix",
        "loading",
        "memory",
        "memory on the way",
    ],
)
def test_each_prompt_length_is_one_request(speed: tuple[dict[str, Any], ...], wanted: list[tuple[int, int]]) -> None:
    requests = requests_of(evaluate(*speed), STREAM)
    assert [(len(request["prompt"]), request["new_tokens"]) for request in requests] == wanted
    assert all(request["prompt"] == STREAM[: len(request["prompt"])] for request in requests)


def test_a_request_says_which_prefix_is_to_be_found_in_the_cache() -> None:
    reuse = {"metric": "prefix_reuse", "prompt_tokens": 128, "prefix_tokens": 96}
    requests = requests_of(evaluate(reuse, first_token([64, 128])), STREAM)
    assert [(len(request["prompt"]), request["prefix_tokens"]) for request in requests] == [(64, 0), (128, 96)]


def test_a_text_too_short_for_the_prompt_is_an_error() -> None:
    with pytest.raises(AssayError, match="has 1000 tokens, too few for a prompt of 2000"):
        requests_of(evaluate(first_token(2000)), STREAM)


@pytest.mark.slow
def test_blocks_of_fresh_processes(genai_model: Callable[[str], Path], tmp_path: Path) -> None:
    baseline = genai_model("qwen3")
    candidate = tmp_path / "candidate"
    shutil.copytree(baseline, candidate)
    requests = [request(16, 8, prefix_tokens=12), request(255, 1)]
    rows = list(
        measure_speed(
            {"baseline": baseline, "candidate": candidate},
            "onnxruntime-genai",
            requests,
            range(2, 5),
            Progress(),
            powercap=tmp_path / "no counters",
        )
    )
    assert [(row.block, row.position) for row in rows] == [
        (block, position) for block in (2, 3, 4) for position in range(4)
    ]
    orders = ["".join(row.arm[0] for row in rows if row.block == block) for block in (2, 3, 4)]
    # Drawn by a fixed seed: both come up, and every measurement has the same.
    assert orders == ["bccb", "cbbc", "cbbc"]
    for row in rows:
        assert isinstance(row, SpeedRun)
        assert row.load_seconds is not None
        assert row.load_seconds > 0
        assert row.peak_memory_bytes > 20_000_000
        assert [one.prompt_tokens for one in row.generations] == [16, 255]
        assert [len(one.token_seconds) for one in row.generations] == [8, 1]
        seconds = [second for second in row.generations[0].token_seconds if second is not None]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0
        assert {one.joules for one in row.generations} == {None}
        (hit,) = row.prefix_hits
        assert (hit.prompt_tokens, hit.prefix_tokens, hit.first_token) == (16, 12, row.generations[0].first_token)


@pytest.mark.slow
def test_a_run_that_fails_is_an_error_with_its_last_lines(genai_model: Callable[[str], Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(genai_model("qwen3"), broken)
    (broken / "model.onnx").write_bytes(b"not a graph")
    requests = [request(16, 8)]
    arms: Any = {"baseline": broken, "candidate": broken}
    with pytest.raises(AssayError, match=r"broken failed \(exit code 1\):\n(.*\n)*.*onnxruntime-genai cannot load it"):
        next(measure_speed(arms, "onnxruntime-genai", requests, range(3), Progress()))


@pytest.mark.slow
def test_a_request_that_does_not_fit_is_an_error(genai_model: Callable[[str], Path]) -> None:
    arms: Any = dict.fromkeys(("baseline", "candidate"), genai_model("qwen3"))
    requests = [request(250, 10)]
    with pytest.raises(AssayError, match=r"failed \(exit code 1\):\n(.*\n)*.*exceed the model's context of 256"):
        next(measure_speed(arms, "onnxruntime-genai", requests, range(3), Progress()))


@pytest.mark.slow
def test_a_worker_reports_one_line_of_json(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever its libraries print, the last line of its output is the report."""
    powercap = fake_powercap(tmp_path, {"intel-rapl:0": ("package-0", 5, 100)})
    workload = {
        "runtime": "transformers",
        "directory": str(tiny_model("llama")),
        "requests": [request(20, 3, prefix_tokens=7)],
        "powercap": str(powercap),
    }
    finished = subprocess.run(
        [sys.executable, "-m", "assay_evals.speed.worker"],
        input=json.dumps(workload),
        capture_output=True,
        text=True,
        env=offline_environment(),
        check=True,
    )
    report = json.loads(finished.stdout.splitlines()[-1])
    assert set(report) == {"load_seconds", "peak_memory_bytes", "generations", "prefix_hits"}
    (generation,), (hit,) = report["generations"], report["prefix_hits"]
    assert generation["prompt_tokens"] == 20
    assert len(generation["token_seconds"]) == 3
    assert generation["joules"] == 0, "counters that stand still"
    assert (hit["prompt_tokens"], hit["prefix_tokens"]) == (20, 7)
    assert hit["first_token"] == generation["first_token"]
    assert hit["seconds"] > 0
