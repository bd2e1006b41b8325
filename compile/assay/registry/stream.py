"""A stream over a network that goes on where it broke."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from assay.errors import AssayError
from assay.files import CHUNK_BYTES
from assay.registry.transport import AttemptError, Patience

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(frozen=True)
class Rest:
    """What a server sends of something.

    begins: the byte that the pieces begin with; before the one that was asked for, where a server has no ranges.
    close: hangs up, whether the pieces were read or not.
    """

    pieces: Iterator[bytes]
    close: Callable[[], object]
    begins: int = 0


# Asks for the rest from a byte on.
Connect = Callable[[int], Rest]


def step_aside(attempt: int) -> None:
    """Wait after attempt 1, 2, … to write what another writes, too: by chance, so that those who collided do not meet again."""
    time.sleep(min(2.0, 0.1 * 2**attempt) * random.random())


class ResumingStream(io.RawIOBase):
    """The bytes of something `size_bytes` long, from an offset on, not verified.

    connect: asks for the rest; `broken`: the errors of it, and of its pieces, after which to ask again.
    What is not there shows when the stream is made.  An answer that ends short counts as a failed attempt, as one that
    breaks does: UnreachableError after ATTEMPTS of them without CHUNK_BYTES of progress.  A server that has nothing at the
    same byte twice has no more: the stream ends there, which whoever verifies will say.
    """

    def __init__(
        self, connect: Connect, size_bytes: int, where: str, broken: tuple[type[Exception], ...], offset: int = 0
    ) -> None:
        self._connect = connect
        self._size = size_bytes
        self._broken = broken
        self._position = self._kept = offset
        self._where = where
        self._patience = Patience()
        self._ended: int | None = None
        self._piece = memoryview(b"")
        self._line = ExitStack()
        self._pieces: Iterator[bytes] | None = None
        self._open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._piece:
            piece = self._next()
            if not piece and (self._position >= self._size or self._position == self._ended):
                return 0
            if not piece:
                self._ended = self._position
                missing = self._size - self._position
                self._break(AttemptError(f"{self._where}: ended {missing} bytes short of its {self._size}."))
            self._piece = memoryview(piece)
        count = min(len(target), len(self._piece))
        target[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        self._position += count
        if self._position - self._kept >= CHUNK_BYTES:
            self._kept = self._position
            self._patience.progress()
        return count

    def close(self) -> None:
        self._line.close()
        super().close()

    def _next(self) -> bytes:
        """The next piece; empty when the answer has ended."""
        while True:
            try:
                return next(self._open(), b"")
            except self._broken as error:
                if self._position >= self._size:  # all of it came: what else the server promised does not matter
                    return b""
                self._break(error)

    def _open(self) -> Iterator[bytes]:
        while self._pieces is None:
            if self._position and self._position >= self._size:
                # There is no rest that a server could be asked for.
                self._pieces = iter(())
                break
            try:
                rest = self._connect(self._position)
            except self._broken as error:
                self._break(error)
                continue
            self._line.callback(rest.close)
            if rest.begins > self._position:
                raise AssayError(
                    f"{self._where}: asked for the bytes from {self._position} on, sent from {rest.begins}."
                )
            self._pieces = _skip(rest.pieces, self._position - rest.begins)
        return self._pieces

    def _break(self, error: Exception) -> None:
        self._line.close()
        self._pieces = None
        _wait(self._patience, error, self._where)


def read_whole(connect: Connect, limit_bytes: int, where: str, broken: tuple[type[Exception], ...]) -> bytes:
    """What a short answer holds, up to one byte more than the limit; asked for again when it breaks off."""
    patience = Patience()
    while True:
        data = bytearray()
        try:
            with ExitStack() as line:
                rest = connect(0)
                line.callback(rest.close)
                while len(data) <= limit_bytes and (piece := next(rest.pieces, b"")):
                    data += piece
            return bytes(data[: limit_bytes + 1])
        except broken as error:
            _wait(patience, error, where)


def _skip(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Leave out the first bytes."""
    for piece in pieces:
        if count < len(piece):
            yield piece[count:]
        count = max(0, count - len(piece))


def _wait(patience: Patience, error: Exception, where: str) -> None:
    if isinstance(error, AttemptError):
        patience.wait(str(error), error.retry_after)
    else:
        patience.wait(f"{where}: {type(error).__name__}: {error}")
