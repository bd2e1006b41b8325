"""Every error that Assay raises on purpose, and the exit code of each.

A message says what is wrong, where, what is allowed and what to do next, in words a person can act on.
Anything else that escapes is a defect, and the command line shows it with its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_OK = 0
EXIT_FAIL = 1
EXIT_USAGE = 2
EXIT_INCONCLUSIVE = 3
EXIT_INVALID = 4
EXIT_INTEGRITY = 5


class AssayError(Exception):
    """Something could not be done: a broken measurement, a full disk, a tool that failed."""

    exit_code = EXIT_INVALID


class UsageError(AssayError):
    """The request itself is wrong: a bad argument, or a thing that does not exist."""

    exit_code = EXIT_USAGE


class NotSupportedError(UsageError):
    """The request is clear but this version, machine or format cannot serve it."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe; `line` counts from 1, 0 when there is no line to name."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.message}"


class RecipeError(UsageError):
    """A recipe is wrong; holds every problem found, so that all are mended in one go."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class IntegrityError(AssayError):
    """Bytes are not the bytes that were promised: a digest, a size or a name does not match."""

    exit_code = EXIT_INTEGRITY


class UnreachableError(AssayError):
    """A server does not answer, or fails again and again: the same request may work later."""


class AccessDeniedError(AssayError):
    """A server refuses this to us: there are no credentials for it, or they do not allow it."""


class SignatureError(IntegrityError):
    """A signature that a policy asks for is missing, wrong, or of somebody whom it does not trust with this."""


class PublishRefusedError(AssayError):
    """There is no PASS for exactly these bytes. The exit code tells which verdict stood in the way."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
