"""What a person sees while work goes on: one bar per stage with the time left, on stderr, nothing when quiet or not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

Advance = Callable[[], None]


class Progress:
    """Shows nothing; the base for jobs that nobody watches."""

    @contextmanager
    def stage(self, title: str, total: int, done: int = 0) -> Generator[Advance]:
        """Announce a stage of `total` steps of which `done` were there already; the yielded function counts one more."""
        del title, total, done
        yield lambda: None

    def note(self, message: str) -> None:
        """Say one sentence about what happens."""
        del message


class TerminalProgress(Progress):
    """Bars on a terminal; plain lines with elapsed seconds in a log."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def stage(self, title: str, total: int, done: int = 0) -> Generator[Advance]:
        started = time.monotonic()
        if self._console.is_terminal:
            with self._bar(title, total, done) as advance:
                yield advance
        else:
            yield lambda: None
        self.note(f"{title}: done in {time.monotonic() - started:.1f} s")

    @contextmanager
    def _bar(self, title: str, total: int, done: int) -> Generator[Advance]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(title, total=total, completed=done)
            yield lambda: bars.advance(task)

    def note(self, message: str) -> None:
        self._console.print(f"  {message}", style="dim", markup=False)


def progress_for(quiet: bool) -> Progress:
    """The progress that suits this command."""
    return Progress() if quiet or sys.stderr is None else TerminalProgress()
