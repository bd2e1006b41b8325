"""Load tests of an endpoint on loopback: what is timed, what is counted, and every way in which an endpoint can fail."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from load_levels import SETTINGS
from stream_server import Endpoint, Reply

from assay.errors import AssayError, UsageError
from assay_evals.load.objectives import read_asked
from assay_evals.load.records import Level, Measured
from assay_evals.load.result import conclude, read_measured, write_result
from assay_evals.load.session import read_settings

LoadTest = Callable[..., Measured]
TRIALS = 2
SLACK = 0.25


def after_trials(endpoint: Endpoint, reply: Callable[[int], Reply]) -> None:
    """The trials succeed; then request n, from 0, is answered with reply(n)."""
    endpoint.reply = lambda number: Reply() if number < TRIALS else reply(number - TRIALS)


def failures(level: Level) -> list[str | None]:
    return [request.answer.failure and request.answer.failure.kind for request in level.requests]


# Times


def test_chunks_are_timed_as_they_come(load_test: LoadTest, endpoint: Endpoint) -> None:
    endpoint.reply = lambda number: Reply(tokens=5, first=0.1, gap=0.05)
    before = time.perf_counter()
    (level,) = load_test(requests=5, output_tokens=5).levels
    written = endpoint.written[TRIALS:]
    # The client's clock started at some moment after `before`, which has to explain every chunk.
    starts = [
        at - chunk
        for request, times in zip(level.requests, written, strict=True)
        for at, chunk in zip(times, request.answer.chunks, strict=True)
    ]
    assert min(starts) > before - 0.01 and max(starts) - min(starts) < SLACK
    first = [request.time_to_first_token or 0 for request in level.measured]
    per_token = [request.time_per_output_token or 0 for request in level.measured]
    gaps = [gap for request in level.measured for gap in request.inter_token_latencies]
    assert len(gaps) == 4 * 5 and min(first) >= 0.1
    for found, expected in ((first, 0.1), (per_token, 0.05), (gaps, 0.05)):
        assert 0.9 * expected < statistics.median(found) < 2 * expected
    assert all(request.end_to_end_latency >= 0.3 for request in level.measured)


def test_a_closed_loop_keeps_its_requests_in_flight_from_warm_up_to_cool_down(
    load_test: LoadTest, endpoint: Endpoint
) -> None:
    endpoint.reply = lambda number: Reply(first=0.02, gap=0.01)
    (level,) = load_test(concurrency="3", requests=10, warm_up=4).levels
    assert endpoint.most_at_once == 3
    phases = [request.phase for request in level.requests]
    assert phases[:14] == ["warm-up"] * 4 + ["measured"] * 10
    assert set(phases[14:]) == {"cool-down"} and len(phases) == len(endpoint.bodies) - TRIALS
    # While anything was measured there were three.
    start, end = level.measured[0].due, max(request.answer.ended for request in level.measured)
    for moment in (start + (end - start) * part for part in (0.1, 0.5, 0.9)):
        assert 2 <= sum(request.due <= moment <= request.answer.ended for request in level.requests) <= 3


def test_an_open_loop_does_not_wait_and_counts_from_when_a_request_was_due(
    load_test: LoadTest, endpoint: Endpoint
) -> None:
    endpoint.reply = lambda number: Reply(first=0.3)
    (level,) = load_test(rate="40", requests=20, warm_up=2).levels
    assert endpoint.most_at_once > 5
    gaps = [later.due - earlier.due for earlier, later in itertools.pairwise(level.requests)]
    assert 0.25 / 40 < statistics.fmean(gaps) < 4 / 40
    assert all(0 <= request.answer.sent - request.due < SLACK for request in level.requests)
    assert sum(request.phase == "cool-down" for request in level.requests) <= 20


def test_levels_follow_each_other_and_no_prompt_comes_twice(load_test: LoadTest, endpoint: Endpoint) -> None:
    measured = load_test(concurrency="1,2", requests=3, seed=5)
    assert [level.load.value for level in measured.levels] == [1.0, 2.0]
    numbers = [request.number for level in measured.levels for request in level.requests]
    assert numbers == list(range(len(numbers)))
    prompts = [body["prompt"] for body in endpoint.bodies]
    assert len(set(prompts)) == len(prompts)
    # One at a time they come in the same order again.
    endpoint.bodies.clear()
    load_test(requests=3, seed=5)
    assert [body["prompt"] for body in endpoint.bodies] == prompts[: TRIALS + 4]
    endpoint.bodies.clear()
    load_test(requests=3, seed=6)
    assert not {body["prompt"] for body in endpoint.bodies} & set(prompts)


def test_the_client_s_lag_is_known(load_test: LoadTest, endpoint: Endpoint) -> None:
    endpoint.reply = lambda number: Reply(first=0.1)
    (level,) = load_test(requests=5).levels
    assert level.client is not None and level.client.ticks > 10
    assert 0 <= level.client.median_seconds <= level.client.p99_seconds <= level.client.largest_seconds < 1
    assert 0 < level.client.processor_share < 1


# Prompts and tokens


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_prompts_are_about_as_long_as_asked(load_test: LoadTest, endpoint: Endpoint, api: str) -> None:
    """This server has three characters to a token, and ten tokens around a message: neither is known beforehand."""
    (level,) = load_test(input_tokens=200, requests=8, api=api).levels
    counts = [request.answer.prompt_tokens or 0 for request in level.requests]
    assert all(190 <= count <= 210 for count in counts)
    assert all(("messages" in body) == (api == "chat") for body in endpoint.bodies)


def test_without_usage_a_chunk_is_a_token_and_that_is_said(load_test: LoadTest, endpoint: Endpoint) -> None:
    endpoint.reply = lambda number: Reply(usage=False, per_chunk=2)
    measured = load_test()
    assert measured.parameters.notes == ("the endpoint counts no prompt tokens: four characters are taken for one",)
    result = conclude(measured, read_asked(None, 0.01, None, None, "USD"))
    assert result.findings[0].output_tokens_counted == "one per chunk"
    assert any("no usage" in note for note in result.notes)
    assert all(request.answer.tokens == 4 for request in measured.levels[0].measured)


def test_the_server_s_count_of_tokens_comes_before_the_chunks(load_test: LoadTest, endpoint: Endpoint) -> None:
    endpoint.reply = lambda number: Reply(per_chunk=3, gap=0.02)
    (level,) = (measured := load_test()).levels
    assert all(request.answer.tokens == 12 and len(request.answer.chunks) == 4 for request in level.measured)
    first = level.measured[0]
    assert first.time_per_output_token == pytest.approx((first.answer.chunks[-1] - first.answer.chunks[0]) / 11)
    result = conclude(measured, read_asked(None, 0.01, None, None, "USD"))
    assert result.findings[0].output_tokens_counted == "by the server"
    assert any("3.0 tokens on average" in note for note in result.notes)


def test_a_server_that_knows_no_stream_options_is_asked_without(load_test: LoadTest, endpoint: Endpoint) -> None:
    def reply(number: int) -> Reply:
        return Reply(usage=False) if number else Reply(status=400, body="unknown field stream_options")

    endpoint.reply = reply
    measured = load_test()
    assert not any("stream_options" in body for body in endpoint.bodies[1:])
    assert measured.parameters.notes[0].startswith("the endpoint rejects stream_options")
    assert failures(measured.levels[0]) == [None] * 5


def test_a_file_s_prompts_come_in_turn(load_test: LoadTest, endpoint: Endpoint, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    path.write_text("".join(json.dumps({"ask": ask}) + "\n" for ask in ("How?", messages)))
    measured = load_test(prompts=path, field="ask", api="chat", input_tokens=None)
    sent = [body["messages"] for body in endpoint.bodies[1:]]
    assert sent == [[{"role": "user", "content": "How?"}], messages] * 2 + [[{"role": "user", "content": "How?"}]]
    assert measured.parameters.input_tokens is None and "2 prompts come round again" in measured.parameters.notes[0]
    with pytest.raises(UsageError, match=r"prompts\.jsonl:2: chat messages need --api chat"):
        load_test(prompts=path, field="ask", input_tokens=None)
    with pytest.raises(UsageError, match=r"prompts\.jsonl:1: there is no field 'prompt'"):
        load_test(prompts=path, input_tokens=None)


def test_fields_and_the_key_are_sent_and_the_key_is_kept_nowhere(
    load_test: LoadTest, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "sesame")
    url = endpoint.url.replace("http://", "http://user:hunter2@")
    plain = load_test(api_key_env="KEY_OF_TEST", body='{"ignore_eos": true, "temperature": null}')
    assert all(headers["Authorization"] == "Bearer sesame" for headers in endpoint.headers)
    assert all(body["ignore_eos"] and "temperature" not in body for body in endpoint.bodies)
    endpoint.bodies.clear()
    after_trials(endpoint, lambda number: Reply(status=500 if number == 2 else 200))
    with_password = load_test(endpoint=url)
    assert endpoint.headers[-1]["Authorization"].startswith("Basic ")
    for measured in (plain, with_password):
        write_result(tmp_path / "result.json", conclude(measured, read_asked(None, 0.01, None, None, "USD")))
        text = (tmp_path / "result.json").read_text()
        assert "sesame" not in text and "hunter2" not in text and endpoint.url in text
    assert "HTTP 500" in text


def test_the_only_model_is_found_and_one_of_several_is_not(load_test: LoadTest, endpoint: Endpoint) -> None:
    assert load_test().parameters.model == "tiny"
    endpoint.models = ("small", "large")
    with pytest.raises(UsageError, match="serves 2 models: small, large; name the model with --model"):
        load_test()
    assert load_test(model="large").parameters.model == "large"
    with pytest.raises(UsageError, match="/v2/models answers with HTTP 404; name the model"):
        load_test(endpoint=endpoint.url.replace("/v1", "/v2"))
    endpoint.models_status = 401
    with pytest.raises(UsageError, match="/models answers with HTTP 401; the endpoint wants another API key"):
        load_test()


# Endpoints that fail


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (Reply(cut=2), "cut", "the connection broke after 2 events"),
        (Reply(cut=0), "cut", "the connection broke after 0 events"),
        (Reply(ends=False), "cut", "ended after 4 events, without finish_reason and [DONE]"),
        (Reply(raw="{oops"), "malformed", "event 2 is malformed: not JSON"),
        (Reply(raw='{"content": "x"}'), "malformed", 'no list "choices" of objects in it: {"content": "x"}'),
        (
            Reply(content_type="application/json"),
            "malformed",
            "an answer of application/json in place of the event stream",
        ),
        (Reply(raw="x" * 3_000_000), "malformed", "event 2 cannot be read"),
        (Reply(raw='{"error": {"message": "out of memory"}}'), "error event", "in event 2: out of memory"),
        (Reply(tokens=0), "empty", "the model ended its text at once"),
        (Reply(status=500, body="it broke"), "HTTP 500", "it broke"),
        (Reply(status=503, body="loading"), "HTTP 503", "loading"),
        (Reply(status=429, body="slow down"), "HTTP 429", "slow down; the endpoint limits the rate"),
        (Reply(first=9.0), "timeout", "not finished after 0.8 s; nothing had come"),
        (Reply(gap=0.5), "timeout", "not finished after 0.8 s; 2 chunks had come"),
    ],
)
def test_a_failure_in_the_middle_is_counted_by_its_kind(
    load_test: LoadTest, endpoint: Endpoint, reply: Reply, kind: str, words: str
) -> None:
    after_trials(endpoint, lambda number: reply if number in (2, 4) else Reply())
    measured = load_test(requests=5, warm_up=1, timeout=0.8)
    (level,) = measured.levels
    assert failures(level) == [None, None, kind, None, kind, None]
    result = conclude(measured, read_asked(None, 0.01, None, None, "USD"))
    (found,) = result.findings[0].failures
    assert (found.kind, found.count) == (kind, 2) and words in found.first_message
    assert result.findings[0].error_rate and result.findings[0].error_rate.value == 0.4
    assert (result.verdict, result.exit_code) == ("FAIL", 1)
    assert f"2 of 5 requests failed, 40.0%; at most 1% was asked. {kind}: " in result.reasons[0]
    assert conclude(measured, read_asked(None, 0.5, None, None, "USD")).exit_code == 0


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (Reply(status=401, body="no such key"), UsageError, "no such key; the endpoint wants another API key"),
        (Reply(status=403, body="not yours"), UsageError, "not yours; this API key may not use it"),
        (Reply(status=404, body="no such model"), UsageError, "no such model; is the path right"),
        (Reply(status=400, body="context too long"), UsageError, "context too long"),
        (Reply(status=500, body="it broke"), AssayError, "HTTP 500: http://"),
        (Reply(status=429, body="slow down"), AssayError, "slow down"),
        (Reply(first=5.0), AssayError, "timeout: not finished after 0.5 s"),
        (Reply(cut=1), AssayError, "cut: "),
        (Reply(raw="{"), AssayError, "malformed: "),
    ],
)
def test_an_endpoint_that_fails_the_first_request_is_not_asked_again(
    load_test: LoadTest, endpoint: Endpoint, reply: Reply, error: type[AssayError], words: str
) -> None:
    endpoint.reply = lambda number: reply
    with pytest.raises(AssayError) as caught:
        load_test(timeout=0.5, requests=1000, concurrency="8")
    assert type(caught.value) is error and words in str(caught.value)
    assert "nothing was measured" in str(caught.value) and len(endpoint.bodies) == 1


def test_a_wrong_path_is_said_to_be_one(load_test: LoadTest, endpoint: Endpoint) -> None:
    with pytest.raises(UsageError, match=r"HTTP 404: http://\S+/v2/completions: no such path; is the path right"):
        load_test(endpoint=endpoint.url.replace("/v1", "/v2"), model="tiny")


@pytest.mark.parametrize("model", [None, "tiny"])
def test_a_server_that_is_down_is_said_to_be(load_test: LoadTest, free_port: int, model: str | None) -> None:
    with pytest.raises(
        AssayError, match=r"unreachable: no connection to \S+: Connection refused\. Is the server"
    ) as caught:
        load_test(endpoint=f"http://127.0.0.1:{free_port}/v1", model=model)
    assert not isinstance(caught.value, UsageError)


def test_a_level_of_nothing_but_failures_is_given_up(load_test: LoadTest, endpoint: Endpoint) -> None:
    after_trials(endpoint, lambda number: Reply(status=500, body="it broke"))
    measured = load_test(concurrency="2,4", requests=500)
    (level,) = measured.levels
    # Another one may end at the same moment.
    assert 10 <= len(level.requests) <= 12 and level.stopped
    assert level.stopped.startswith("the first 10 requests all failed; HTTP 500: http://")
    result = conclude(measured, read_asked(None, 1.0, None, None, "USD"))
    assert (result.verdict, result.exit_code) == ("INVALID", 4) and "it broke" in result.reasons[0]


def test_a_server_that_stops_answering_is_given_up_after_one_timeout(load_test: LoadTest, endpoint: Endpoint) -> None:
    after_trials(endpoint, lambda number: Reply(first=9.0 if number >= 6 else 0.0))
    started = time.monotonic()
    (level,) = load_test(concurrency="4", requests=500, timeout=0.5).levels
    assert time.monotonic() - started < 5
    assert level.stopped and level.stopped.startswith("nobody answered 4 requests in a row; timeout: ")
    assert failures(level).count(None) == 6 and level.unfinished <= 4


def test_some_failures_are_no_reason_to_stop(load_test: LoadTest, endpoint: Endpoint) -> None:
    after_trials(endpoint, lambda number: Reply(status=429) if number else Reply())
    (level,) = load_test(requests=40, warm_up=1).levels
    assert level.stopped is None and failures(level).count("HTTP 429") == 40


def test_a_kept_connection_that_was_closed_is_opened_anew(load_test: LoadTest, endpoint: Endpoint) -> None:
    """A server may close a connection after any answer; a request that meets it there has not failed."""
    endpoint.closes_idle = True
    (level,) = load_test(requests=20).levels
    assert failures(level) == [None] * 21


# The result


def test_a_result_is_computed_again_from_its_requests(load_test: LoadTest, endpoint: Endpoint, tmp_path: Path) -> None:
    after_trials(endpoint, lambda number: Reply(status=500) if number == 7 else Reply(first=0.01, gap=0.005))
    measured = load_test(requests=30, concurrency="1,2")
    asked = read_asked("ttft=5", 0.5, 0.9, 2.5, "EUR")
    result = conclude(measured, asked)
    write_result(tmp_path / "result.json", result)
    again = conclude(read_measured(tmp_path / "result.json"), asked)
    assert again == result and again.exit_code == 0
    document = json.loads((tmp_path / "result.json").read_bytes())
    assert document["version"] == 1 and len(document["levels"][0]["requests"]) >= 31
    assert document["findings"][0]["goodput_requests_per_second"]["value"] > 0
    assert conclude(again.measured, read_asked("ttft=0.000001", 0.5, 0.9, None, "EUR")).exit_code == 1


@pytest.mark.parametrize("change", [{"version": 2}, {"levels": None}, {"levels": [{"load": 3}]}, {"started": 3}])
def test_another_file_is_no_result(load_test: LoadTest, tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "result.json"
    write_result(path, conclude(load_test(), read_asked(None, 0.01, None, None, "USD")))
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(AssayError, match=r"result\.json: "):
        read_measured(path)


# Settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"endpoint": None}, "give either an artifact directory, or --endpoint"),
        ({"endpoint": "localhost:8000"}, "not the base URL of an API"),
        ({"endpoint": "http://"}, "not the base URL"),
        ({"endpoint": "http://[::1"}, "not a URL"),
        ({"endpoint": "http://x/v1?a=b"}, "not the base URL"),
        ({"concurrency": "1", "rate": "1"}, "give one of them"),
        ({"prompts": Path("x.jsonl")}, "give one of them"),
        ({"body": "{"}, "not JSON"),
        ({"body": "[]"}, "give a JSON object"),
        ({"body": '{"stream": false}'}, "without prompt, messages, stream"),
        ({"api_key_env": "NO_SUCH_KEY"}, "--api-key-env NO_SUCH_KEY: this environment variable is not set"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match="--") as caught:
        read_settings(**(SETTINGS | {"endpoint": "http://127.0.0.1:1/v1"} | changes))
    assert words in str(caught.value)
