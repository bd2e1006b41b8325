"""Bodies that servers understand, and events as several servers send them."""

from __future__ import annotations

import json

import pytest

from assay_evals.load.wire import (
    ErrorEventError,
    Event,
    MalformedEventError,
    clipped,
    error_message,
    read_event,
    request_body,
)


def test_a_body_streams_and_asks_for_usage() -> None:
    assert request_body("completions", "tiny", "The", 8, usage=True, extra={}) == {
        "model": "tiny",
        "prompt": "The",
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chat = request_body("chat", "tiny", "The", 8, usage=False, extra={"temperature": None, "seed": 3})
    assert chat == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "The"}],
        "max_tokens": 8,
        "seed": 3,
        "stream": True,
    }
    messages = [{"role": "system", "content": "Be brief."}]
    assert request_body("chat", "tiny", messages, 8, usage=True, extra={})["messages"] == messages


@pytest.mark.parametrize(
    ("choice", "has_output"),
    [
        ({"text": " the"}, True),
        ({"text": ""}, False),
        ({"delta": {"role": "assistant", "content": None}}, False),
        ({"delta": {"content": "x"}}, True),
        ({"delta": {"reasoning_content": "x"}}, True),
        ({"delta": {"reasoning": "x"}}, True),
        ({"delta": {"tool_calls": [{"index": 0}]}}, True),
        ({"delta": {}, "finish_reason": "stop"}, False),
        ({"delta": None}, False),
    ],
)
def test_output_is_text_of_any_kind(choice: object, has_output: bool) -> None:
    assert read_event(json.dumps({"choices": [choice]})).has_output is has_output


def test_usage_comes_with_or_without_choices() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 3}}
    assert read_event(json.dumps({"choices": [], "usage": usage})) == Event(False, None, 5, 3, 7)
    last = {"choices": [{"text": "", "finish_reason": "stop"}], "usage": {"completion_tokens": 7}}
    assert read_event(json.dumps(last)) == Event(False, "stop", None, None, 7)
    assert read_event(json.dumps({"choices": [], "usage": None})).output_tokens is None
    assert read_event(json.dumps({"choices": [], "usage": {"completion_tokens": "7"}})).output_tokens is None


@pytest.mark.parametrize(
    "data", ["", "{", "[]", "7", '{"content": "x"}', '{"choices": {}}', '{"choices": [3]}', "[" * 9999]
)
def test_what_is_no_event_is_malformed(data: str) -> None:
    with pytest.raises(MalformedEventError):
        read_event(data)


@pytest.mark.parametrize("error", ['{"error": {"message": "Out of memory."}}', '{"error": "Out of memory"}'])
def test_an_error_in_the_stream_is_one(error: str) -> None:
    with pytest.raises(ErrorEventError, match=r"^Out of memory$"):
        read_event(error)


def test_the_message_of_an_error_is_found() -> None:
    assert error_message('{"error": {"message": "no key", "code": 401}}') == "no key"
    assert error_message('{"detail": "Not Found"}') == "Not Found"
    assert error_message('{"object": "error", "message": "too long"}') == "too long"
    assert error_message("<html>Bad gateway</html>") == "<html>Bad gateway</html>"
    assert error_message("") == ""


def test_what_servers_say_cannot_steer_a_terminal() -> None:
    assert clipped("a\x1b[31m\n b" + "c" * 300) == f"a [31m b{'c' * 192}…"
