"""The speed worker with a runtime that only sleeps, for as long as a file in the model's directory says: its speed is known."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from assay_evals.runtimes import base
from assay_evals.runtimes.base import Generated
from assay_evals.speed import worker

TIMES = "seconds.json"


class SleepingRuntime:
    """Its tokens are the numbers from the prompt's last one on, with a cache that may be broken."""

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        self._times: dict[str, Any] = json.loads((directory / TIMES).read_text())
        self.context_length = 100_000

    def generate(self, prompt: list[int], new_tokens: int, *, cached: int = 0) -> Generated:
        seconds: list[float] = []
        started = time.perf_counter()
        time.sleep(self._times["per_prompt_token"] * (len(prompt) - cached))
        for number in range(new_tokens):
            if number:
                time.sleep(self._times["per_token"])
            seconds.append(time.perf_counter() - started)
        first = prompt[-1] + (1 if cached and self._times["forgets"] else 0)
        return Generated(tuple(range(first, first + new_tokens)), tuple(seconds))


def main() -> None:
    """The worker itself, with one runtime more."""
    base._RUNTIMES["sleeping"] = f"{__name__}:SleepingRuntime"  # pyright: ignore[reportPrivateUsage]
    worker.main()


if __name__ == "__main__":
    import sleeping_worker

    sleeping_worker.main()
