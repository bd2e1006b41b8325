"""An artifact on its own runtime, in a process of its own, as a load test asks it: tokens are timed where they are made.

Run as `python -m assay_evals.load.worker`. Reads a JSON object a line from standard input: first what to load, then what to count, to answer
and to drop, by number; writes one for each thing that is loaded, counted or answered. Ends with its input. Requests in flight take turns, a
token each, and what has come in is taken between two tokens. Times are time.perf_counter(), one clock for all processes (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from assay.errors import AssayError, UsageError
from assay_evals.runtimes.base import Runtime, Turns, open_runtime


@dataclass
class _InFlight:
    """A request, and the time of each of its tokens."""

    turns: Turns
    new_tokens: int
    prompt_tokens: int
    times: list[float] = field(default_factory=list[float])


class _Worker:
    """Takes messages and gives requests their turns."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._in_flight: dict[int, _InFlight] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._messages.put(json.loads(line))
        self._messages.put(None)

    def run(self) -> None:
        first = self._messages.get()
        if first is None:
            return
        started = time.perf_counter()
        try:
            runtime = open_runtime(first["runtime"], Path(first["directory"]))
        except AssayError as error:
            self._say(failed=str(error))
            return
        load_seconds = time.perf_counter() - started
        self._say(runtime=runtime.name, context_length=runtime.context_length, load_seconds=load_seconds)
        while self._take(runtime):
            number = next(iter(self._in_flight))
            request = self._in_flight.pop(number)
            if not self._ends(number, request):
                self._in_flight[number] = request

    def _take(self, runtime: Runtime) -> bool:
        """What has come in; waits while there is nothing else to do. False at the end."""
        while not (self._in_flight and self._messages.empty()):
            message = self._messages.get()
            if message is None:
                return False
            self._obey(runtime, message)
        return True

    def _obey(self, runtime: Runtime, message: dict[str, Any]) -> None:
        number = message["number"]
        if message["do"] == "drop":
            self._in_flight.pop(number, None)
            return
        tokens = runtime.encode(message["prompt"])
        if message["do"] == "count":
            self._say(number=number, prompt_tokens=len(tokens))
            return
        try:
            turns = runtime.begin(tokens, message["new_tokens"], stops=message["stops"])
        except UsageError as error:
            self._say(number=number, failed=str(error))
            return
        self._in_flight[number] = _InFlight(turns, message["new_tokens"], len(tokens))

    def _ends(self, number: int, request: _InFlight) -> bool:
        """Give a request its turn; whether that was its last."""
        came = request.turns.step() is not None
        now = time.perf_counter()
        if came:
            request.times.append(now)
            if len(request.times) < request.new_tokens:
                return False
        self._say(
            number=number,
            times=request.times,
            ended=now,
            prompt_tokens=request.prompt_tokens,
            finish_reason="length" if came else "stop",
        )
        return True

    def _say(self, **said: Any) -> None:
        self._answers.write(json.dumps(said) + "\n")
        self._answers.flush()


def main() -> None:
    # Ctrl-C reaches the whole process group; what was measured is kept by the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print: only answers may go where answers are read.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _Worker(answers).run()


if __name__ == "__main__":
    main()
