"""Runs a load: a closed or an open loop, warmed up, kept up until the last measured request has ended, and stopped when nobody answers.

Requests are sent in three phases without a pause between them. Warm-up and cool-down requests load the endpoint like the others and are kept,
but no latency is taken of them: the first would find an idle endpoint and the last ones would leave it to fewer and fewer.
None is ever cancelled but by a stop: many servers go on computing what nobody waits for.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import signal
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from assay.progress import Advance
from assay_evals.load.arrivals import Load, poisson_arrivals
from assay_evals.load.client import CRASHED, TIMEOUT, UNREACHABLE, Client
from assay_evals.load.lag import LagWatch
from assay_evals.load.prompts import PromptOf
from assay_evals.load.records import Level, Phase, Request

INTERRUPTED = "interrupted by Ctrl-C"
_FEWEST_FAILURES = 10
_FEWEST_SILENT = 3


@dataclass(frozen=True, kw_only=True)
class LevelPlan:
    """What one level sends.  first: number of its first request.  seed: of its arrivals, where it has a rate."""

    load: Load
    warm_up: int
    measured: int
    output_tokens: int
    first: int
    seed: str

    def phase(self, position: int) -> Phase:
        if position < self.warm_up:
            return "warm-up"
        return "measured" if position < self.warm_up + self.measured else "cool-down"


def usual_warm_up(load: Load, measured: int) -> int:
    """A tenth of the measured requests, and at least as many as are in flight."""
    in_flight = int(load.value) if load.kind == "concurrency" else 0
    return max(in_flight, math.ceil(measured / 10))


async def run_level(client: Client, plan: LevelPlan, prompt_of: PromptOf, advance: Advance) -> Level:
    """One level from its first warm-up request to its last answer; prompt_of: what the request of each number says."""
    lag = LagWatch()
    run = _LevelRun(client, plan, prompt_of, advance)
    with lag.watching(), _stopping_at_interrupt(run.stop):
        await run.until_stopped(run.closed_loop() if plan.load.kind == "concurrency" else run.open_loop())
    return run.level(lag)


class _LevelRun:
    """The state of one level: what was issued, what has ended, and whether it has been stopped."""

    def __init__(self, client: Client, plan: LevelPlan, prompt_of: PromptOf, advance: Advance) -> None:
        self._client, self._plan, self._prompt_of, self._advance = client, plan, prompt_of, advance
        self._numbers = itertools.count()
        self._ended: list[Request] = []
        self._in_flight = 0
        self._measured_ended = 0
        self._silent_in_a_row = 0
        self._succeeded = False
        self._stopped: str | None = None
        self._task: asyncio.Task[None] | None = None

    async def closed_loop(self) -> None:
        async def worker() -> None:
            while self._more():
                await self._request(self._client.now())

        async with asyncio.TaskGroup() as workers:
            for _ in range(int(self._plan.load.value)):
                workers.create_task(worker())

    async def open_loop(self) -> None:
        # A moment ahead, so that the first arrival is not late already.
        begin = self._client.now() + 0.05
        longest = self._plan.warm_up + 2 * self._plan.measured
        async with asyncio.TaskGroup() as requests:
            for arrival in itertools.islice(poisson_arrivals(self._plan.load.value, self._plan.seed), longest):
                due = round(begin + arrival, 6)
                await asyncio.sleep(due - self._client.now())
                if not self._more():
                    return
                requests.create_task(self._request(due))

    def _more(self) -> bool:
        """Whether some measured request is still to be sent or to end, and nothing has stopped the level."""
        return self._stopped is None and self._measured_ended < self._plan.measured

    async def _request(self, due: float) -> None:
        position = next(self._numbers)
        number = self._plan.first + position
        self._in_flight += 1
        answer = await self._client.ask(self._prompt_of(number), self._plan.output_tokens)
        self._in_flight -= 1
        request = Request(number=number, phase=self._plan.phase(position), due=due, answer=answer)
        self._ended.append(request)
        if request.phase == "measured":
            self._measured_ended += 1
            self._advance()
        self._give_up_after(request)

    def _give_up_after(self, request: Request) -> None:
        """Stop when nobody answers any more, or when of this level nothing but failures has come."""
        failure = request.answer.failure
        self._succeeded |= failure is None
        silent = failure is not None and failure.kind in (UNREACHABLE, TIMEOUT)
        self._silent_in_a_row = self._silent_in_a_row + 1 if silent else 0
        if failure is None:
            return
        said = f"{failure.kind}: {failure.message}"
        closed = self._plan.load.kind == "concurrency"
        at_once = int(self._plan.load.value) if closed else _FEWEST_FAILURES
        if failure.kind == CRASHED:
            self.stop(said)
        elif self._silent_in_a_row >= max(_FEWEST_SILENT, at_once):
            self.stop(f"nobody answered {self._silent_in_a_row} requests in a row; {said}")
        elif not self._succeeded and len(self._ended) >= max(_FEWEST_FAILURES, 2 * at_once * closed):
            self.stop(f"the first {len(self._ended)} requests all failed; {said}")

    def stop(self, reason: str) -> None:
        if self._stopped is None and self._task is not None:
            self._stopped = reason
            self._task.cancel()

    async def until_stopped(self, loop: Coroutine[Any, Any, None]) -> None:
        """Run a loop to its end, or until `stop`."""
        self._task = asyncio.ensure_future(loop)
        try:
            await self._task
        except asyncio.CancelledError:
            if self._stopped is None:
                raise

    def level(self, lag: LagWatch) -> Level:
        return Level(
            load=self._plan.load,
            requests=tuple(sorted(self._ended, key=lambda request: request.number)),
            unfinished=self._in_flight,
            stopped=self._stopped,
            client=lag.found,
        )


@contextmanager
def _stopping_at_interrupt(stop: Callable[[str], None]) -> Generator[None]:
    """The first Ctrl-C ends the level and keeps what was measured; the second ends the process as ever."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop(INTERRUPTED)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
