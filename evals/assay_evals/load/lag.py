"""Whether the client keeps up: how late its event loop gets to what is ready, and how much of a core it uses.

A timer of the kernel (timerfd_create(2)) becomes readable at known times, like a socket with a chunk in it; how much later the loop gets to
it is what every chunk's timestamp may be late by. asyncio's own timers would not do: epoll rounds their times up to whole milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Generator

import numpy as np

from assay_evals.load.records import ClientLag

_PERIOD_NANOSECONDS = 20_000_000
# <time.h>, <sys/timerfd.h>
_CLOCK_MONOTONIC, _TFD_TIMER_ABSTIME = 1, 1


class _TimerSpecification(ctypes.Structure):
    """struct itimerspec: the period, then the first expiry."""

    _fields_ = [(name, ctypes.c_long) for name in ("period_s", "period_ns", "first_s", "first_ns")]


class LagWatch:
    """Collects the delays of the running event loop while its context is entered."""

    def __init__(self) -> None:
        self._delays: list[float] = []
        self._processor_share = 0.0

    @contextlib.contextmanager
    def watching(self) -> Generator[None]:
        started, used = time.perf_counter(), time.process_time()
        with self._ticking():
            yield
        self._processor_share = (time.process_time() - used) / (time.perf_counter() - started)

    @contextlib.contextmanager
    def _ticking(self) -> Generator[None]:
        library = ctypes.CDLL(None, use_errno=True)
        if not hasattr(library, "timerfd_create"):  # Only Linux has them.
            yield
            return
        due = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + _PERIOD_NANOSECONDS
        timer: int = library.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        seconds, nanoseconds = divmod(due, 10**9)
        wanted = _TimerSpecification(0, _PERIOD_NANOSECONDS, seconds, nanoseconds)
        library.timerfd_settime(timer, _TFD_TIMER_ABSTIME, ctypes.byref(wanted), None)

        def tick() -> None:
            nonlocal due
            expired = int.from_bytes(os.read(timer, 8), "little")
            # After a long pause several are due: the loop was late for the first of them.
            self._delays.append((time.clock_gettime_ns(time.CLOCK_MONOTONIC) - due) / 1e9)
            due += expired * _PERIOD_NANOSECONDS

        loop = asyncio.get_running_loop()
        loop.add_reader(timer, tick)
        try:
            yield
        finally:
            loop.remove_reader(timer)
            os.close(timer)

    @property
    def found(self) -> ClientLag | None:
        """None where there were no ticks, so nothing is known."""
        if not self._delays:
            return None
        median, p99, largest = np.quantile(self._delays, [0.5, 0.99, 1.0], method="inverted_cdf").tolist()
        return ClientLag(
            ticks=len(self._delays),
            median_seconds=round(median, 6),
            p99_seconds=round(p99, 6),
            largest_seconds=round(largest, 6),
            processor_share=round(self._processor_share, 4),
        )
