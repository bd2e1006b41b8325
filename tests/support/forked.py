"""Work in a process of its own, which a test may kill."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable


def start(work: Callable[[], object]) -> int:
    """Begin; the id of the process."""
    child = os.fork()
    if child:
        return child
    status = 1
    signal.alarm(60)  # a child that waits for what never comes must not outlive its test
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """The wait status: 0 when it ended well, 9 when it was killed."""
    return os.waitpid(child, 0)[1]
