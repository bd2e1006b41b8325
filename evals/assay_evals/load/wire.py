"""The OpenAI API as far as a load test speaks it: the body of a request, and what an event of the stream says.

Source: the API reference of OpenAI, "Streaming events" of chat completions and legacy completions. Beside it, what serving engines add: text
in `reasoning_content` or `reasoning` (vLLM, SGLang, llama.cpp), and an `error` object in the middle of a stream.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, cast

Api = Literal["completions", "chat"]
Prompt = str | list[dict[str, str]]
PATHS: dict[Api, str] = {"completions": "/completions", "chat": "/chat/completions"}
DONE = "[DONE]"
_OUTPUT = ("content", "text", "reasoning_content", "reasoning", "tool_calls", "refusal")
_LONGEST = 200


class MalformedEventError(Exception):
    """An event is not what the API promises."""


class ErrorEventError(Exception):
    """The server reports an error inside the stream."""


@dataclass(frozen=True)
class Event:
    """has_output: whether any choice carries text.  Counts are None but in the event that has `usage`."""

    has_output: bool
    finish_reason: str | None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


def request_body(
    api: Api, model: str, prompt: Prompt, output_tokens: int, *, usage: bool, extra: dict[str, Any]
) -> dict[str, Any]:
    """A streaming request, greedy unless `extra` says otherwise; null in `extra` takes a field out."""
    body: dict[str, Any] = {"model": model, "max_tokens": output_tokens, "temperature": 0, "stream": True}
    if usage:
        body["stream_options"] = {"include_usage": True}
    if api == "chat":
        body["messages"] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    else:
        body["prompt"] = prompt
    return {name: value for name, value in (body | extra).items() if value is not None}


def read_event(data: str) -> Event:
    """Parse the data of one event; MalformedEventError or ErrorEventError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedEventError(f"not JSON ({error}): {clipped(data)}") from error
    if isinstance(value, dict) and value.get("error"):
        raise ErrorEventError(error_message(data))
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise MalformedEventError(f'no list "choices" of objects in it: {clipped(data)}')
    has_output, finish_reason = False, None
    for choice in cast("list[dict[str, Any]]", choices):
        # Chat puts its text into `delta`, legacy completions into the choice.
        delta = choice.get("delta")
        has_output |= any(
            isinstance(place, dict) and any(place.get(key) for key in _OUTPUT) for place in (choice, delta)
        )
        finish_reason = choice.get("finish_reason") or finish_reason
    usage = value.get("usage")
    return Event(has_output, None if finish_reason is None else str(finish_reason), *_counts(usage))


def _counts(usage: Any) -> tuple[int | None, int | None, int | None]:
    if not isinstance(usage, dict):
        return None, None, None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    counts = [usage.get("prompt_tokens"), cached, usage.get("completion_tokens")]
    prompt, cached, output = (count if isinstance(count, int) and count >= 0 else None for count in counts)
    return prompt, cached, output


def error_message(text: str) -> str:
    """What a server says went wrong: the message of an OpenAI error object, else the beginning of the text."""
    try:
        found: Any = json.loads(text)
        for key in ("error", "message", "detail"):
            found = found.get(key, found) if isinstance(found, dict) else found
    except (ValueError, RecursionError):
        found = text
    return clipped(found if isinstance(found, str) else json.dumps(found)).removesuffix(".")


def clipped(text: str) -> str:
    """The beginning of a text from elsewhere on one line, without what would steer a terminal."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
