"""Several things at once, in threads, until all are done or one fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    threads: int, work: Callable[[Item], Result], items: Iterable[Item], stop: threading.Event
) -> list[Result]:
    """The results, in the order of the items.

    The first failure, a Ctrl-C too, sets `stop`, which the work at hand has to heed, and is raised when that has ended.
    """
    if threads == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
