"""What a load test keeps: a row per request with its timestamps, from which every figure can be computed again.

All times are seconds of one monotonic clock that starts with the run. This module keeps and names; statistics are in findings.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from assay_evals.load.arrivals import Load
from assay_evals.load.wire import Api

_STRICT = ConfigDict(extra="forbid", strict=True)
Phase = Literal["warm-up", "measured", "cool-down"]
Seconds = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request failed: its kind, by which failures are counted, and a message that a person can act on."""

    __pydantic_config__ = _STRICT
    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request as the client saw it.

    sent: before the connection was asked for.  chunks: arrival of each event that carried output.  ended: of the stream, or of the attempt.
    prompt_tokens, cached_tokens, output_tokens: the server's own count (usage), None where it gives none.
    """

    __pydantic_config__ = _STRICT
    sent: Seconds
    chunks: tuple[Seconds, ...]
    ended: Seconds
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    failure: Failure | None = None

    @property
    def tokens(self) -> int:
        """Output tokens: the server's count, else one per chunk."""
        return len(self.chunks) if self.output_tokens is None else self.output_tokens


@dataclass(frozen=True, kw_only=True)
class Request:
    """An answer with its place in the run.  due: when the request should have been sent; latencies count from then.

    In a closed loop that is when it was sent; in an open loop it is the scheduled arrival, so that a client or a server that falls behind
    makes latencies longer instead of requests fewer (no coordinated omission).
    """

    __pydantic_config__ = _STRICT
    number: int
    phase: Phase
    due: Seconds
    answer: Answer

    @property
    def succeeded(self) -> bool:
        return self.answer.failure is None

    @property
    def time_to_first_token(self) -> float | None:
        """First chunk with output − due."""
        return self.answer.chunks[0] - self.due if self.answer.chunks else None

    @property
    def end_to_end_latency(self) -> float:
        """End of the stream − due."""
        return self.answer.ended - self.due

    @property
    def time_per_output_token(self) -> float | None:
        """(last chunk − first chunk) / (output tokens − 1); None for fewer than two tokens or chunks, which have no such time."""
        chunks, tokens = self.answer.chunks, self.answer.tokens
        return (chunks[-1] - chunks[0]) / (tokens - 1) if len(chunks) > 1 and tokens > 1 else None

    @property
    def inter_token_latencies(self) -> list[float]:
        """Gaps between successive chunks."""
        chunks = self.answer.chunks
        return [after - before for before, after in itertools.pairwise(chunks)]


@dataclass(frozen=True, kw_only=True)
class ClientLag:
    """How late the client's event loop served a timer that fires every 20 ms, and the share of one core that the client used."""

    __pydantic_config__ = _STRICT
    ticks: int
    median_seconds: Seconds
    p99_seconds: Seconds
    largest_seconds: Seconds
    processor_share: Seconds


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load with its requests, in the order in which they were due.

    unfinished: requests that were in flight when the level was stopped.  stopped: why, None when it ran to its end.
    """

    __pydantic_config__ = _STRICT
    load: Load
    requests: tuple[Request, ...]
    unfinished: int
    stopped: str | None
    client: ClientLag | None

    @property
    def measured(self) -> list[Request]:
        return [request for request in self.requests if request.phase == "measured"]


@dataclass(frozen=True, kw_only=True)
class ArtifactUsed:
    """An artifact that was loaded on its own runtime.

    digest: of its bytes.  shared: how requests share the runtime.  cores: that it may use.  load_seconds: until it could be asked.
    """

    __pydantic_config__ = _STRICT
    directory: str
    digest: str
    runtime: str
    shared: str
    cores: int
    load_seconds: Seconds


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What was sent, to an endpoint or to an artifact.

    input_tokens: None where the prompts come from a file.  extra: fields of --body.  notes: of the trial requests.
    """

    __pydantic_config__ = _STRICT
    endpoint: str | None = None
    artifact: ArtifactUsed | None = None
    model: str
    api: Api
    prompts: str
    input_tokens: int | None
    output_tokens: int
    requests: int
    timeout_seconds: float
    seed: int
    extra: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run's raw data.  started: UTC.  environment: of the client's machine."""

    __pydantic_config__ = _STRICT
    started: str
    environment: dict[str, Any]
    parameters: Parameters
    levels: tuple[Level, ...]
