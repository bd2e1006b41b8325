"""Settings of a short load test, and levels made to order."""

from __future__ import annotations

from typing import Any

from assay_evals.load.arrivals import Load
from assay_evals.load.records import Answer, ClientLag, Failure, Level, Parameters, Phase, Request

SETTINGS: dict[str, Any] = {
    "directory": None,
    "endpoint": None,
    "model": None,
    "api": "completions",
    "concurrency": None,
    "rate": None,
    "requests": 4,
    "warm_up": 1,
    "input_tokens": 16,
    "output_tokens": 4,
    "prompts": None,
    "field": "prompt",
    "body": None,
    "timeout": 20.0,
    "api_key_env": None,
    "seed": 0,
}


def request(
    number: int,
    due: float,
    *gaps: float,
    phase: Phase = "measured",
    per_chunk: int = 1,
    usage: bool = True,
    failure: str | None = None,
    **counts: Any,
) -> Request:
    """A request with a chunk after each gap, the first from `due`; it ends with its last chunk."""
    chunks, now = [], due
    for gap in gaps:
        now += gap
        chunks.append(now)
    answer = Answer(
        sent=due,
        chunks=tuple(chunks),
        ended=now,
        output_tokens=len(chunks) * per_chunk if usage else None,
        finish_reason="length",
        failure=None if failure is None else Failure(kind=failure, message=f"it was {failure} at {number}"),
        **counts,
    )
    return Request(number=number, phase=phase, due=due, answer=answer)


def level(*requests: Request, load: Load | None = None, **changes: Any) -> Level:
    lag = ClientLag(ticks=100, median_seconds=0.0, p99_seconds=0.0, largest_seconds=0.0, processor_share=0.1)
    values = {"unfinished": 0, "stopped": None, "client": lag} | changes
    return Level(load=load or Load("concurrency", 1.0), requests=requests, **values)


PARAMETERS = Parameters(
    endpoint="http://127.0.0.1:1/v1",
    model="tiny",
    api="completions",
    prompts="python-docs",
    input_tokens=16,
    output_tokens=4,
    requests=4,
    timeout_seconds=20.0,
    seed=0,
    extra={},
    notes=(),
)
