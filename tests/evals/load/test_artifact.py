"""Load tests of an artifact on its own runtime: what is timed, how requests share it, and every way in which it can fail."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sleeping_server
from load_levels import SETTINGS
from sleeping_server import BEHAVIOUR

from assay.artifact import directory_digest
from assay.errors import AssayError, IntegrityError, NotSupportedError, UsageError
from assay.progress import Progress
from assay_evals.load.artifact import Artifact
from assay_evals.load.objectives import read_asked
from assay_evals.load.records import Level, Measured
from assay_evals.load.result import conclude, read_measured, write_result
from assay_evals.load.session import measure, read_settings

LoadTest = Callable[..., Measured]
QUICK = {"per_prompt_token": 0.0005, "per_token": 0.004}


@pytest.fixture
def load_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadTest:
    """Measure a runtime that behaves as it is told; other keywords replace settings."""
    monkeypatch.setenv("PYTHONPATH", str(Path(sleeping_server.__file__).parent))
    directory = tmp_path / "artifact"
    directory.mkdir()
    write_manifest(directory, "onnxruntime-genai")

    def run(does: dict[str, Any], **changes: Any) -> Measured:
        (directory / BEHAVIOUR).write_text(json.dumps(does))
        settings = read_settings(**(SETTINGS | {"directory": directory} | changes))
        assert isinstance(settings.target, Artifact)
        target = dataclasses.replace(settings.target, runtime="sleeping", worker="sleeping_server")
        return measure(dataclasses.replace(settings, target=target), Progress())

    return run


def write_manifest(directory: Path, runtime: str) -> None:
    (directory / "manifest.json").write_text(json.dumps({"version": 1, "name": "tiny", "runtime": runtime}))


def kinds(level: Level) -> list[str | None]:
    return [request.answer.failure and request.answer.failure.kind for request in level.requests]


def test_tokens_are_timed_where_they_are_made(load_test: LoadTest, tmp_path: Path) -> None:
    measured = load_test({"per_prompt_token": 0.005, "per_token": 0.03}, requests=5, output_tokens=6)
    (level,) = measured.levels
    assert kinds(level) == [None] * 6
    first = [request.time_to_first_token or 0 for request in level.measured]
    gaps = [gap for request in level.measured for gap in request.inter_token_latencies]
    # Sixteen tokens of a prompt, and a byte is a token.
    assert len(gaps) == 5 * 5 and min(first) > 0.07 and statistics.median(first) < 0.2
    assert 0.9 * 0.03 < statistics.median(gaps) < 2 * 0.03
    for request in level.requests:
        answer = request.answer
        assert (answer.tokens, answer.output_tokens, answer.finish_reason) == (6, 6, "length")
        assert answer.sent < answer.chunks[0] <= answer.ended and 12 <= (answer.prompt_tokens or 0) <= 20
    used = measured.parameters.artifact
    assert used is not None and measured.parameters.endpoint is None and measured.parameters.model == "tiny"
    assert used.digest == directory_digest(tmp_path / "artifact") and used.runtime == "sleeping 1.0"


def test_requests_side_by_side_take_turns(load_test: LoadTest) -> None:
    (level,) = load_test(QUICK, concurrency="3", requests=9, output_tokens=20).levels
    assert kinds(level) == [None] * len(level.requests)
    start, end = level.measured[0].due, max(request.answer.ended for request in level.measured)
    for moment in (start + (end - start) * part for part in (0.2, 0.5, 0.8)):
        assert 2 <= sum(request.due <= moment <= request.answer.ended for request in level.requests) <= 3
    # Each waits for two others between its tokens: none is served before the others are.
    alone = statistics.median(gap for request in level.measured for gap in request.inter_token_latencies)
    assert alone > 2.5 * QUICK["per_token"]


def test_arrivals_do_not_wait(load_test: LoadTest) -> None:
    (level,) = load_test(QUICK, rate="50", requests=20, output_tokens=10).levels
    assert kinds(level) == [None] * len(level.requests)
    assert max(sum(one.due <= at.due < one.answer.ended for one in level.requests) for at in level.requests) > 2


def test_a_text_may_end_before_its_limit(load_test: LoadTest) -> None:
    (level,) = load_test(QUICK | {"ends_after": 2}, output_tokens=6).levels
    assert {(request.answer.tokens, request.answer.finish_reason) for request in level.requests} == {(2, "stop")}
    measured = load_test(QUICK | {"ends_after": 2}, output_tokens=6, body='{"ignore_eos": true}')
    assert {request.answer.tokens for request in measured.levels[0].requests} == {6}
    assert measured.parameters.extra == {"ignore_eos": True}
    (level,) = load_test(QUICK | {"ends_after": 0}).levels
    assert set(kinds(level)) == {"empty"}


def test_a_crash_ends_the_test_and_what_the_runtime_printed_is_kept(load_test: LoadTest, tmp_path: Path) -> None:
    measured = load_test(QUICK | {"crash": 8}, concurrency="2,4", requests=500)
    (level,) = measured.levels
    assert level.stopped is not None and "was killed by SIGABRT" in level.stopped
    assert "the kernel met an illegal instruction" in level.stopped and "says something" in level.stopped
    assert kinds(level).count(None) >= 6 and set(kinds(level)) <= {None, "crashed"}
    result = conclude(measured, read_asked(None, 1.0, None, None, "USD"))
    assert (result.verdict, result.exit_code) == ("INVALID", 4) and "illegal instruction" in result.reasons[0]
    write_result(tmp_path / "result.json", result)
    assert read_measured(tmp_path / "result.json") == measured


def test_a_hang_ends_the_test_after_some_timeouts(load_test: LoadTest) -> None:
    measured = load_test(QUICK | {"hang": 4}, requests=500, timeout=0.4)
    (level,) = measured.levels
    assert level.stopped is not None and level.stopped.startswith("nobody answered 3 requests in a row; timeout: ")
    assert "waiting for a lock" in level.stopped
    assert kinds(level) == [None] * 4 + ["timeout"] * 3
    assert conclude(measured, read_asked(None, 1.0, None, None, "USD")).exit_code == 4


def test_a_request_that_takes_too_long_is_dropped(load_test: LoadTest) -> None:
    """Were it computed on, the next ones would wait for it."""
    (level,) = load_test({"per_token": 0.05}, requests=2, warm_up=0, output_tokens=900, timeout=0.3).levels
    assert kinds(level) == ["timeout"] * 2
    sent = [request.answer.sent for request in level.requests]
    assert sent[1] - sent[0] < 1


@pytest.mark.parametrize(
    ("load", "words"), [("fails", "no such model"), ("crashes", r"failed \(exit code 7\):\s+a library says something")]
)
def test_an_artifact_that_cannot_be_loaded_is_not_measured(load_test: LoadTest, load: str, words: str) -> None:
    with pytest.raises(AssayError, match=words) as caught:
        load_test({"load": load})
    assert caught.value.exit_code == 4


def test_requests_must_fit_the_context(load_test: LoadTest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="990 prompt tokens and 20 new ones exceed the model's context of 1000"):
        load_test(QUICK, input_tokens=990, output_tokens=20)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (2000, 5)))
    with pytest.raises(UsageError, match="2000 prompt tokens"):
        load_test(QUICK, prompts=prompts, input_tokens=None)
    # Only the first of them is tried beforehand.
    prompts.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (5, 2000)))
    (level,) = load_test(QUICK, prompts=prompts, input_tokens=None, requests=4, warm_up=0).levels
    assert kinds(level) == [None, "refused", None, "refused"]


@pytest.mark.parametrize(
    ("runtime", "changes", "error", "words"),
    [
        ("transformers", {"concurrency": "1,2"}, NotSupportedError, "computes one request at a time, so it cannot take concurrency 2;"),
        ("transformers", {"rate": "0.5"}, NotSupportedError, "cannot take rate 0.5/s; measure --concurrency 1"),
        ("tensorrt", {}, NotSupportedError, "there is no runtime tensorrt; this release has onnxruntime-genai, "),
        ("onnxruntime-genai", {"model": "x"}, UsageError, "--model and --api-key-env are for an --endpoint"),
        ("onnxruntime-genai", {"api_key_env": "X"}, UsageError, "--model and --api-key-env are for an --endpoint"),
        ("onnxruntime-genai", {"endpoint": "http://127.0.0.1:1/v1"}, UsageError, "either an artifact directory, or --endpoint"),
        ("onnxruntime-genai", {"body": '{"top_k": 1}'}, UsageError, "a runtime knows one field"),
        ("onnxruntime-genai", {"body": '{"ignore_eos": 1}'}, UsageError, "a runtime knows one field"),
        ("onnxruntime-genai", {"body": "{"}, UsageError, "not JSON"),
    ],
)  # fmt: skip
def test_what_an_artifact_cannot_take_is_refused_before_it_is_loaded(
    tmp_path: Path, runtime: str, changes: dict[str, Any], error: type[AssayError], words: str
) -> None:
    write_manifest(tmp_path, runtime)
    with pytest.raises(UsageError) as caught:
        read_settings(**(SETTINGS | {"directory": tmp_path} | changes))
    assert type(caught.value) is error and words in str(caught.value)


def test_a_directory_that_is_no_artifact_or_brings_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"no manifest\.json"):
        read_settings(**(SETTINGS | {"directory": tmp_path}))
    write_manifest(tmp_path, "onnxruntime-genai")
    (tmp_path / "genai_config.json").write_text('{"model": {"custom_ops_library": "evil.so"}}')
    with pytest.raises(IntegrityError, match="custom_ops_library makes a runtime load code"):
        read_settings(**(SETTINGS | {"directory": tmp_path}))
