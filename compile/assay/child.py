"""Run a Python module as a child process that ends with this one, however this one ends.

A killed parent cannot stop its children, and one that went on writing would spoil what the next run builds in the same place. So
the child asks the kernel to be killed with its parent (Linux, prctl(2): PR_SET_PDEATHSIG) before it runs the module.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys

from assay.errors import AssayError
from assay.host import offline_environment

_PR_SET_PDEATHSIG = 1
_SHOWN_LINES = 8
# onnxruntime-genai's builder stamps a model with the commit of whatever repository the virtual environment happens to lie in, and the
# digest of an artifact with it.
_NO_REPOSITORY = {"GIT_DIR": os.devnull}


def run_module(what: str, module: str, *arguments: str, seconds: float, given: str = "") -> str:
    """Run `python -m module`, without a network, and return what it wrote to standard output.

    what: who is at work, for errors.  seconds: how long it may take.  given: its standard input.  Raises AssayError when it
    fails, with the end of what it printed.
    """
    command = [sys.executable, "-P", "-m", "assay.child", str(os.getpid()), module, *arguments]
    try:
        finished = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=offline_environment() | _NO_REPOSITORY,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AssayError(f"{what} did not finish within {seconds:.0f} s.") from error
    if finished.returncode < 0:
        name = signal.Signals(-finished.returncode).name
        hint = " The kernel does that when memory runs out." if name == "SIGKILL" else ""
        raise AssayError(f"{what} was killed by {name}.{hint}")
    if finished.returncode:
        tail = "\n".join((finished.stdout + finished.stderr).strip().splitlines()[-_SHOWN_LINES:])
        raise AssayError(f"{what} failed (exit code {finished.returncode}):\n{tail}")
    return finished.stdout


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It was killed before the kernel was asked.
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Entry point of the child: PARENT MODULE [ARGUMENT…]."""
    parent, module, *arguments = sys.argv[1:]
    _end_with(int(parent))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
