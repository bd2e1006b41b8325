"""A stream over a network that goes on where it broke."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

from assay.files import CHUNK_BYTES
from assay.registry.transport import Patience

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# From a byte on, the pieces that follow; closed when they are no longer wanted.
Connect = Callable[[int], Iterator[bytes]]


def step_aside(attempt: int) -> None:
    """Wait after attempt 1, 2, … to write what another writes, too: by chance, so that those who collided do not meet again."""
    time.sleep(min(2.0, 0.1 * 2**attempt) * random.random())


class ResumingStream(io.RawIOBase):
    """The bytes of something `size_bytes` long, from an offset on, not verified.

    connect: asks for the rest; `broken`: the errors of it, and of its pieces, after which to ask again.
    What is not there shows when the stream is made.  UnreachableError when it breaks again and again without getting on.
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
        self._rest = memoryview(b"")
        self._pieces: Iterator[bytes] | None = None
        self._open()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._rest:
            piece = self._next()
            if not piece and (self._position >= self._size or self._position == self._ended):
                return 0
            if not piece:
                # It ended well, and short: the line broke unnoticed, or there is no more, which whoever verifies will say.
                self._ended = self._position
                self._hang_up()
                continue
            self._rest = memoryview(piece)
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        if self._position - self._kept >= CHUNK_BYTES:
            self._kept = self._position
            self._patience.progress()
        return count

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _next(self) -> bytes:
        while True:
            if self._pieces is None:
                self._open()
            try:
                return next(cast("Iterator[bytes]", self._pieces), b"")
            except self._broken as error:
                self._break(_describe(error))

    def _open(self) -> None:
        while self._pieces is None:
            if self._position >= self._size:
                # There is no rest that a server could be asked for.
                self._pieces = iter(())
                return
            try:
                self._pieces = self._connect(self._position)
            except self._broken as error:
                self._break(_describe(error))

    def _break(self, failure: str) -> None:
        self._hang_up()
        self._patience.wait(f"{self._where}: {failure}")

    def _hang_up(self) -> None:
        if hasattr(self._pieces, "close"):
            with closing(cast("Any", self._pieces)):
                pass
        self._pieces = None


def read_whole(connect: Connect, limit_bytes: int, where: str, broken: tuple[type[Exception], ...]) -> bytes:
    """What a short answer holds, up to one byte more than the limit; asked for again when it breaks off."""
    patience = Patience()
    while True:
        data = bytearray()
        try:
            with closing(cast("Any", connect(0))) as pieces:
                while len(data) <= limit_bytes and (piece := next(pieces, b"")):
                    data += piece
            return bytes(data[: limit_bytes + 1])
        except broken as error:
            patience.wait(f"{where}: {_describe(error)}")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
