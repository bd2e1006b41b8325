"""The worker of a load test with a runtime that only sleeps, ends its texts, crashes and hangs as a file in its directory says."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from assay.errors import AssayError
from assay_evals.load import worker
from assay_evals.runtimes import base
from assay_evals.runtimes.base import check_length

BEHAVIOUR = "behaviour.json"


class SleepingRuntime:
    """A byte of text is a token.

    per_prompt_token, per_token: seconds.  ends_after: tokens after which its texts end.  crash, hang: the number of the request in which it
    does so, from 0, at its second token.  load: what happens instead of loading.
    """

    name = "sleeping 1.0"
    context_length = 1000

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        self._does: dict[str, Any] = json.loads((directory / BEHAVIOUR).read_text())
        self._begun = 0
        print("a library says something while it loads")
        if self._does.get("load") == "fails":
            raise AssayError(f"{directory}: no such model")
        if self._does.get("load") == "crashes":
            os._exit(7)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def begin(self, prompt: list[int], new_tokens: int, *, stops: bool) -> _Turns:
        check_length(len(prompt), new_tokens, self.context_length)
        number, self._begun = self._begun, self._begun + 1
        return _Turns(self._does, number, len(prompt), stops)


class _Turns:
    def __init__(self, does: dict[str, Any], number: int, prompt_tokens: int, stops: bool) -> None:
        self._does, self._number, self._prompt_tokens, self._stops = does, number, prompt_tokens, stops
        self._tokens = 0

    def step(self) -> int | None:
        if self._tokens == 1 and self._number == self._does.get("crash"):
            print("the kernel met an illegal instruction", file=sys.stderr, flush=True)
            os.abort()
        if self._tokens == 1 and self._number == self._does.get("hang"):
            print("waiting for a lock", file=sys.stderr, flush=True)
            time.sleep(60)
        if self._stops and self._tokens == self._does.get("ends_after"):
            return None
        each = "per_token" if self._tokens else "per_prompt_token"
        time.sleep(self._does.get(each, 0.0) * (1 if self._tokens else self._prompt_tokens))
        self._tokens += 1
        return self._tokens


def main() -> None:
    """The worker itself, with one runtime more."""
    base._RUNTIMES["sleeping"] = f"{__name__}:SleepingRuntime"  # pyright: ignore[reportPrivateUsage]
    worker.main()


if __name__ == "__main__":
    import sleeping_server

    sleeping_server.main()
