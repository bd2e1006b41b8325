"""A registry in a directory: an OCI image layout, safe for many writers and readers at once and against kill -9.

Source: OCI image-layout.md 1.1.  Blobs are copied beside the store's blobs, synced, read back and hashed there, and only
then renamed; index.json is replaced as a whole under a lock and only after everything that it names is
there.  Readers take no lock.  An interrupted publish leaves blobs that nothing names, which the next one reuses.

Blobs go only by `collect`, when nothing names them.  Left out on purpose: resuming half-written blobs.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from filelock import FileLock, Timeout

from assay.errors import AssayError, IntegrityError, UsageError
from assay.files import canonical_json, copy_bytes, explain_disk_errors, open_regular, sync_directory
from assay.registry.base import Part, check_json_size
from assay.registry.index import MAX_INDEX_BYTES, Index, parse_index
from assay.registry.indexed import IndexedRegistry, SharedIndexRepository
from assay.registry.oci import DIGEST, Descriptor, copy_verified, describe, parse_json
from assay.registry.reachable import is_listing, named_in, reached

LOCK_SECONDS: Final = 60.0
_LAYOUT = "oci-layout"
_INDEX = "index.json"
_LOCK = ".index.lock"
_CHANNELS_LOCK = ".channels.lock"
# Blobs that are found in the store when they are published again are touched when they are older.
_STALE_SECONDS = 3600.0
_PARTIAL = ".partial"
_LAYOUT_JSON = canonical_json({"imageLayoutVersion": "1.0.0"})


@dataclass(frozen=True)
class Collected:
    """What a collection did.  young: blobs that nothing leads to, left for the grace period.  kept: blobs in use."""

    removed: tuple[str, ...]
    removed_bytes: int
    young: int
    kept: int


class Layout(IndexedRegistry):
    """An OCI image-layout directory that exists; make one with `open` or `create`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)
        self._parsed: tuple[tuple[int, int, int], Index] | None = None

    @classmethod
    def open(cls, address: Path | str) -> Layout:
        """The registry in a directory, to read; UsageError when there is none."""
        layout = cls(Path(address))
        layout._check_version()
        return layout

    @classmethod
    def create(cls, address: Path | str) -> Layout:
        """The registry in a directory, to write; made when the directory is absent or empty.

        Also clears away what killed writers left.  UsageError when the directory holds other things.
        """
        layout = cls(Path(address))
        with explain_disk_errors(layout.root):
            if not (layout.root / _LAYOUT).exists():
                layout._initialise()
            layout._check_version()
            layout._sweep()
        return layout

    @classmethod
    def check(cls, address: Path | str) -> None:
        """Raise what `create` would raise, and create nothing: asked before hours are spent on what is to be published."""
        layout = cls(Path(address))
        if (layout.root / _LAYOUT).exists():
            layout._check_version()
        else:
            layout._refuse_strangers()
        nearest = next(place for place in (layout.root, *layout.root.absolute().parents) if place.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise AssayError(f"{nearest}: cannot be written. Choose a registry that you have access to.")

    # Reading

    def repository(self, name: str) -> LayoutRepository:
        """The models of one NAME; they share the blobs of the whole directory."""
        return LayoutRepository(self, name)

    def index(self) -> Index:
        """What is published, as of now."""
        path = self.root / _INDEX
        try:
            with path.open("rb") as stream:
                # Writers put a new file in its place: as long as it is this one, it need not be parsed again.
                about = os.fstat(stream.fileno())
                version = (about.st_ino, about.st_mtime_ns, about.st_size)
                if self._parsed and self._parsed[0] == version:
                    return self._parsed[1]
                data = stream.read(MAX_INDEX_BYTES + 1)
        except OSError as error:
            raise IntegrityError(f"{path}: cannot be read ({error.strerror}). This registry is damaged.") from error
        index = parse_index(data, str(path))
        self._parsed = (version, index)
        return index

    def copy_blob(self, descriptor: Descriptor, sink: BinaryIO | None) -> None:
        """Copy a blob, verifying size and digest on the way; with no sink only verify.  Raises IntegrityError."""
        with self.open_blob(descriptor) as stream:
            copy_verified(stream, sink, descriptor, str(self.blob_path(descriptor)))

    def blob_path(self, descriptor: Descriptor) -> Path:
        """Where a blob lies."""
        return self.root / "blobs" / "sha256" / descriptor.digest.removeprefix("sha256:")

    # Writing

    def put_file(self, path: Path, descriptor: Descriptor) -> bool:
        """Store a file that has this descriptor; True when bytes were written, False when they were there already.

        Raises IntegrityError when the file's bytes are others.
        """
        return self._put(descriptor, lambda: open_regular(path), str(path))

    def put_bytes(self, data: bytes, media_type: str) -> bool:
        """Store bytes; True when they were written, False when they were there already."""
        return self._put(describe(data, media_type), lambda: io.BytesIO(data), "the bytes to store")

    def change(self, decide: Callable[[Index], Index]) -> None:
        """Replace the index by what `decide` makes of it, in one step; what it raises leaves everything as it was.

        Raises AssayError when a new entry names a blob that is not there.
        """
        with explain_disk_errors(self.root), self._locked():
            self._parsed = None
            before = self.index()
            after = decide(before)
            if after == before:
                return
            self._check_present(before, after)
            data = after.to_bytes()
            if len(data) > MAX_INDEX_BYTES:
                raise AssayError(
                    f"{self.root}: its index would exceed {MAX_INDEX_BYTES} bytes. Start another registry."
                )
            self._write(self.root / _INDEX, data)
            self._parsed = None
            if self.index() != after:
                raise IntegrityError(f"{self.root / _INDEX}: reads back other than it was written. Check this disk.")

    @contextlib.contextmanager
    def channels_locked(self) -> Generator[None]:
        """Only one process at a time decides where a channel goes."""
        with explain_disk_errors(self.root), self._holding(_CHANNELS_LOCK):
            yield

    def collect(self, grace_seconds: float, *, dry_run: bool) -> Collected:
        """Remove every blob that no entry of the index leads to and that is older than the grace period.

        Nothing is named meanwhile, and whoever names a blob afterwards checks that it is there.  dry_run: only count.
        Raises IntegrityError, and removes nothing, when a manifest that is needed to tell cannot be read.
        """
        with explain_disk_errors(self.root), contextlib.nullcontext() if dry_run else self._locked():
            self._parsed = None
            kept = reached([entry.descriptor for entry in self.index().entries], self._read, self._has)
            # What has no digest for a name is no blob, and somebody else's.
            files = (path for path in (self.root / "blobs" / "sha256").iterdir() if path.is_file())
            blobs = [path for path in files if DIGEST.fullmatch(f"sha256:{path.name}")]
            loose = [(path, about) for path in blobs if f"sha256:{path.name}" not in kept and (about := _about(path))]
            # By the clock that stamped the blobs, which may be a file server's.
            now = time.time() if dry_run else self._clock()
            old = [(path, about.st_size) for path, about in loose if now - about.st_mtime >= grace_seconds]
            if not dry_run:
                for path, _ in old:
                    path.unlink(missing_ok=True)
                self._sweep()
        return Collected(
            removed=tuple(f"sha256:{path.name}" for path, _ in sorted(old)),
            removed_bytes=sum(size for _, size in old),
            young=len(loose) - len(old),
            kept=len(blobs) - len(loose),
        )

    def _read(self, descriptor: Descriptor) -> bytes:
        check_json_size(descriptor)
        sink = io.BytesIO()
        self.copy_blob(descriptor, sink)
        return sink.getvalue()

    def _has(self, digest: str) -> bool:
        return (self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")).exists()

    def _check_present(self, before: Index, after: Index) -> None:
        """AssayError when a manifest that was not named before, or a blob of it, was collected meanwhile."""
        known = {entry.descriptor.digest for entry in before.entries}
        for manifest in (entry.descriptor for entry in after.entries if entry.descriptor.digest not in known):
            self._refuse_collected(manifest)
            for named in named_in(self._read(manifest), str(self.blob_path(manifest))) if is_listing(manifest) else ():
                self._refuse_collected(named)

    def _refuse_collected(self, descriptor: Descriptor) -> None:
        if not self._has(descriptor.digest):
            raise AssayError(
                f"{self.blob_path(descriptor)}: was collected before it was named, by a collection with a short grace period. Run the "
                "same command again."
            )

    def _clock(self) -> float:
        """The time that a file written now gets."""
        probe = self.root / _PARTIAL / secrets.token_hex(8)
        probe.parent.mkdir(exist_ok=True)
        try:
            with _create_locked(probe) as stream:
                return os.fstat(stream.fileno()).st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _put(self, descriptor: Descriptor, source: Callable[[], BinaryIO], where: str) -> bool:
        # A blob is never trusted for its name and size: whatever damaged it may have kept both.
        with contextlib.suppress(IntegrityError):
            self.copy_blob(descriptor, None)
            self._freshen(self.blob_path(descriptor))
            return False

        # What is hashed is what was stored, not what was read: one pass shows both that it is right and that it is there.
        def verify(stored: BinaryIO) -> None:
            copy_verified(stored, None, descriptor, f"{where}, as stored (it must not change while it is published)")

        path = self.blob_path(descriptor)
        with explain_disk_errors(self.root), source() as stream, self._partial(path, verify) as sink:
            copy_bytes(stream, sink, descriptor.size + 1)
        return True

    def _freshen(self, path: Path) -> None:
        """Let a blob that is about to be named be young again, so that nothing collects it before."""
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                os.utime(path)

    def open_blob(self, descriptor: Descriptor) -> BinaryIO:
        """A blob's bytes, not verified but for their number."""
        path = self.blob_path(descriptor)
        try:
            stream = open_regular(path)
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{path}: this blob is missing. Publish the artifact again to mend the registry."
            ) from error
        except OSError as error:
            raise AssayError(f"{path}: cannot be read ({error.strerror}).") from error
        if (size := os.fstat(stream.fileno()).st_size) != descriptor.size:
            stream.close()
            raise IntegrityError(
                f"{path}: {size} bytes, promised were {descriptor.size}. Publish the artifact again to mend this."
            )
        return stream

    def _check_version(self) -> None:
        path = self.root / _LAYOUT
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(
                f"{self.root}: there is no registry here (no {_LAYOUT} to read). Publish something first."
            ) from error
        if parse_json(data, str(path)).get("imageLayoutVersion") != "1.0.0":
            raise IntegrityError(f"{path}: not an OCI image layout of version 1.0.0.")

    def _initialise(self) -> None:
        """Make an empty registry.  `oci-layout` comes last: with it, everything else is there."""
        self._refuse_strangers()
        self.root.mkdir(parents=True, exist_ok=True)
        with self._locked():
            (self.root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
            if not (self.root / _INDEX).exists():
                self._write(self.root / _INDEX, Index().to_bytes())
            if not (self.root / _LAYOUT).exists():
                self._write(self.root / _LAYOUT, _LAYOUT_JSON)

    def _refuse_strangers(self) -> None:
        ours = {"blobs", _INDEX, _LAYOUT, _LOCK, _CHANNELS_LOCK, _PARTIAL}
        try:
            strange = any(path.name not in ours for path in self.root.iterdir())
        except FileNotFoundError:
            return
        except NotADirectoryError:
            strange = True
        if strange:
            raise UsageError(f"{self.root}: not a registry, and not empty. Choose a new directory for it.")

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Only one writer of the index at a time."""
        return self._holding(_LOCK)

    @contextlib.contextmanager
    def _holding(self, name: str) -> Generator[None]:
        """Hold a lock; the kernel frees that of a process that dies."""
        lock = FileLock(self.root / name, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout as error:
            raise AssayError(
                f"{self.root / name}: another process has held it for {LOCK_SECONDS:.0f} s. Let it end, or stop it."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _write(self, path: Path, data: bytes) -> None:
        with self._partial(path) as sink:
            sink.write(data)

    @contextlib.contextmanager
    def _partial(self, final: Path, verify: Callable[[BinaryIO], None] | None = None) -> Generator[BinaryIO]:
        """A file that becomes `final` when the block ends well.  Its writer holds a lock on it, see `_sweep`.

        verify: reads the file from its start, after it was synced; what it raises keeps the file from becoming final.
        """
        partial = self.root / _PARTIAL / secrets.token_hex(8)
        partial.parent.mkdir(exist_ok=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _create_locked(partial) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                if verify:
                    stream.seek(0)
                    verify(stream)
                partial.replace(final)
            sync_directory(final.parent)
        finally:
            partial.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove partial files whose writers are dead: their locks are free."""
        with contextlib.suppress(FileNotFoundError):
            for path in (self.root / _PARTIAL).iterdir():
                with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


class LayoutRepository(SharedIndexRepository):
    """One NAME in a layout."""

    def __init__(self, layout: Layout, name: str) -> None:
        super().__init__(layout, name)
        self.layout = layout

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> BinaryIO:
        stream = self.layout.open_blob(descriptor)
        stream.seek(offset)
        return stream

    def where(self, descriptor: Descriptor) -> str:
        return str(self.layout.blob_path(descriptor))

    def put(self, part: Part) -> bool:
        if isinstance(part.content, bytes):
            return self.layout.put_bytes(part.content, part.descriptor.media_type)
        return self.layout.put_file(part.content, part.descriptor)


def _about(path: Path) -> os.stat_result | None:
    """None for a file that is gone by now."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _create_locked(path: Path) -> BinaryIO:
    """Create a file and lock it; again, if a sweep took it for a dead writer's in between."""
    while True:
        stream = path.open("x+b")
        fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()
