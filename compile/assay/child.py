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
    try:
        finished = subprocess.run(
            module_command(module, *arguments),
            input=given,
            capture_output=True,
            text=True,
            timeout=seconds,
            env=child_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AssayError(f"{what} did not finish within {seconds:.0f} s.") from error
    if finished.returncode:
        raise AssayError(f"{what} {said_of_end(finished.returncode, finished.stdout + finished.stderr)}")
    return finished.stdout


def module_command(module: str, *arguments: str) -> list[str]:
    """What runs a module as a child of this process."""
    return [sys.executable, "-P", "-m", "assay.child", str(os.getpid()), module, *arguments]


def child_environment() -> dict[str, str]:
    """Without a network, and without a repository around it."""
    return offline_environment() | _NO_REPOSITORY


def said_of_end(returncode: int, output: str) -> str:
    """How a child that failed came to its end, with the end of what it printed: the predicate of a sentence."""
    if returncode >= 0:
        return f"failed (exit code {returncode}):\n{last_lines(output)}"
    name = signal.Signals(-returncode).name
    hint = " The kernel does that when memory runs out." if name == "SIGKILL" else ""
    return f"was killed by {name}.{hint} {last_lines(output)}".rstrip()


def last_lines(output: str) -> str:
    """The end of what a child printed."""
    return "\n".join(output.strip().splitlines()[-_SHOWN_LINES:])


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
