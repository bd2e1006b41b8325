"""What a load test needs of what it loads: send a request, and say when its output came.

A target is opened into a client: of an endpoint (endpoint.py), or of an artifact on its own runtime (artifact.py).
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any, NoReturn, Protocol

from assay.errors import AssayError, UsageError
from assay_evals.load.records import Answer, Failure
from assay_evals.load.wire import Prompt

# Kinds of failures that end a level: nobody answers, or nobody is there any more.
UNREACHABLE, TIMEOUT, CRASHED = "unreachable", "timeout", "crashed"
_WRONG_REQUEST = ("HTTP 400", "HTTP 401", "HTTP 403", "HTTP 404", "HTTP 405", "HTTP 413", "HTTP 422")


class Client(Protocol):
    """Its clock starts at 0 when it is made; all times are on it.

    notes: what a reader has to know of it.  context_length: tokens that a request may have, None where that is not known.  software: what
    it consists of, for the environment.  counts_alone: whether it counts without answering, which costs next to nothing.
    """

    counts_alone: bool
    notes: list[str]
    context_length: int | None
    software: dict[str, str]

    def now(self) -> float:
        """Seconds since it was made."""
        ...

    async def ask(self, prompt: Prompt, output_tokens: int) -> Answer:
        """Send one request and follow it to its end. Failures are in the answer, never raised."""
        ...

    async def count(self, prompt: Prompt, output_tokens: int) -> int | None:
        """How many tokens it takes a prompt for, None where it does not say.

        Asked before anything is measured, and so raises what would fail every request: UsageError or AssayError.
        """
        ...

    def used(self) -> dict[str, Any]:
        """What `Parameters` say of it."""
        ...


class Target(Protocol):
    """What is to be loaded."""

    def open(self, timeout: float) -> AbstractAsyncContextManager[Client]:
        """A client, until the context is left.  timeout: seconds for a whole request."""
        ...


def refuse(failure: Failure, advice: str = "") -> NoReturn:
    """The first request failed as all would: UsageError when it was the request, AssayError when it was what was asked."""
    message = f"the first request failed, so nothing was measured. {failure.kind}: {failure.message}.{advice}"
    raise (UsageError if failure.kind in _WRONG_REQUEST else AssayError)(message)
