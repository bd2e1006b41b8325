"""A registry in a directory: an OCI image layout, safe for many writers and readers at once and against kill -9.

Source: OCI image-layout.md 1.1.  Blobs are written beside the store's blobs, hashed while they are copied, synced,
renamed, and read back; index.json is replaced as a whole under a lock and only after everything that it names is
there.  Readers take no lock.  An interrupted publish leaves blobs that nothing names, which the next one reuses.

Everything above this file asks a registry only for what is public here; a remote registry will have the same methods.
Left out on purpose: deleting (what is published stays), resuming half-written blobs.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import secrets
import stat
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from filelock import FileLock, Timeout

from assay.errors import AssayError, IntegrityError, UsageError
from assay.files import canonical_json, explain_disk_errors, sync_directory
from assay.registry.index import MAX_INDEX_BYTES, Change, Index, parse_index
from assay.registry.oci import MAX_JSON_BYTES, Descriptor, copy_verified, describe, parse_json
from assay.registry.reference import Reference, local_directory

LOCK_SECONDS: Final = 60.0
_LAYOUT = "oci-layout"
_INDEX = "index.json"
_LOCK = ".index.lock"
_PARTIAL = ".partial"
_LAYOUT_JSON = canonical_json({"imageLayoutVersion": "1.0.0"})


class Layout:
    """An OCI image-layout directory that exists; make one with `open` or `create`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, location: Path | str) -> Layout:
        """The registry in a directory, to read; UsageError when there is none."""
        layout = cls(local_directory(location))
        layout._check_version()
        return layout

    @classmethod
    def create(cls, location: Path | str) -> Layout:
        """The registry in a directory, to write; made when the directory is absent or empty.

        Also clears away what killed writers left.  UsageError when the directory holds other things.
        """
        layout = cls(local_directory(location))
        with explain_disk_errors(layout.root):
            if not (layout.root / _LAYOUT).exists():
                layout._initialise()
            layout._check_version()
            layout._sweep()
        return layout

    @staticmethod
    def check(location: Path | str) -> None:
        """Raise what `create` would raise, and create nothing: asked before hours are spent on what is to be published."""
        layout = Layout(local_directory(location))
        if (layout.root / _LAYOUT).exists():
            layout._check_version()
        else:
            layout._refuse_strangers()
        nearest = next(place for place in (layout.root, *layout.root.absolute().parents) if place.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise AssayError(f"{nearest}: cannot be written. Choose a registry that you have access to.")

    # Reading

    def index(self) -> Index:
        """What is published, as of now."""
        path = self.root / _INDEX
        try:
            with path.open("rb") as stream:
                data = stream.read(MAX_INDEX_BYTES + 1)
        except OSError as error:
            raise IntegrityError(f"{path}: cannot be read ({error.strerror}). This registry is damaged.") from error
        return parse_index(data, str(path))

    def resolve(self, reference: Reference) -> Descriptor:
        """The manifest that a reference names; UsageError when there is none."""
        return self.index().resolve(reference, str(self.root))

    def evidence_for(self, digest: str) -> tuple[Descriptor, ...]:
        """The evidence manifests that name a model as their subject, oldest first."""
        return self.index().evidence_for(digest)

    def read_json_blob(self, descriptor: Descriptor) -> bytes:
        """A small blob's bytes, verified; IntegrityError when it is damaged or larger than MAX_JSON_BYTES."""
        if descriptor.size > MAX_JSON_BYTES:
            raise IntegrityError(
                f"{descriptor.digest}: {descriptor.size} bytes of JSON; at most {MAX_JSON_BYTES} are read."
            )
        sink = io.BytesIO()
        self.copy_blob(descriptor, sink)
        return sink.getvalue()

    def copy_blob(self, descriptor: Descriptor, sink: BinaryIO | None) -> None:
        """Copy a blob, verifying size and digest on the way; with no sink only verify.  Raises IntegrityError."""
        with self._open_blob(descriptor) as stream:
            copy_verified(stream, sink, descriptor, str(self.blob_path(descriptor)))

    def blob_path(self, descriptor: Descriptor) -> Path:
        """Where a blob lies."""
        return self.root / "blobs" / "sha256" / descriptor.digest.removeprefix("sha256:")

    # Writing

    def put_file(self, path: Path, descriptor: Descriptor) -> bool:
        """Store a file that has this descriptor; True when bytes were written, False when they were there already.

        Raises IntegrityError when the file's bytes are others.
        """
        return self._put(descriptor, lambda: _open_regular(path), str(path))

    def put_bytes(self, data: bytes, media_type: str) -> bool:
        """Store bytes; True when they were written, False when they were there already."""
        return self._put(describe(data, media_type), lambda: io.BytesIO(data), "the bytes to store")

    def publish(
        self, name: str, tags: Sequence[str], model: Descriptor, evidence: Descriptor, *, force: bool
    ) -> Change:
        """Name blobs that are all stored: in one step, or not at all.  UsageError when a version tag would move."""
        with explain_disk_errors(self.root), self._locked():
            before = self.index()
            change = before.publish(name, tags, model, evidence, force=force, where=str(self.root))
            if change.index != before:
                data = change.index.to_bytes()
                if len(data) > MAX_INDEX_BYTES:
                    raise AssayError(
                        f"{self.root}: its index would exceed {MAX_INDEX_BYTES} bytes. Start another registry."
                    )
                self._write(self.root / _INDEX, data)
                if self.index() != change.index:
                    raise IntegrityError(
                        f"{self.root / _INDEX}: reads back other than it was written. Check this disk."
                    )
        return change

    def _put(self, descriptor: Descriptor, source: Callable[[], BinaryIO], where: str) -> bool:
        # A blob is never trusted for its name and size: whatever damaged it may have kept both.
        with contextlib.suppress(IntegrityError):
            self.copy_blob(descriptor, None)
            return False
        with explain_disk_errors(self.root), source() as stream, self._partial(self.blob_path(descriptor)) as sink:
            copy_verified(stream, sink, descriptor, f"{where} (it must not change while it is published)")
        self.copy_blob(descriptor, None)
        return True

    def _open_blob(self, descriptor: Descriptor) -> BinaryIO:
        path = self.blob_path(descriptor)
        try:
            stream = _open_regular(path)
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
        ours = {"blobs", _INDEX, _LAYOUT, _LOCK, _PARTIAL}
        try:
            strange = any(path.name not in ours for path in self.root.iterdir())
        except FileNotFoundError:
            return
        except NotADirectoryError:
            strange = True
        if strange:
            raise UsageError(f"{self.root}: not a registry, and not empty. Choose a new directory for it.")

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """Only one writer of the index at a time; the kernel frees the lock of a process that dies."""
        lock = FileLock(self.root / _LOCK, timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout as error:
            raise AssayError(
                f"{self.root / _LOCK}: another process has held it for {LOCK_SECONDS:.0f} s. Let it end, or stop it."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _write(self, path: Path, data: bytes) -> None:
        with self._partial(path) as sink:
            sink.write(data)

    @contextlib.contextmanager
    def _partial(self, final: Path) -> Generator[BinaryIO]:
        """A file that becomes `final` when the block ends well.  Its writer holds a lock on it, see `_sweep`."""
        partial = self.root / _PARTIAL / secrets.token_hex(8)
        partial.parent.mkdir(exist_ok=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _create_locked(partial) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
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


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file, never through a link; IntegrityError for anything else, a named pipe too."""
    if path.is_symlink():
        raise IntegrityError(f"{path}: a link where a regular file is needed.")
    # O_NONBLOCK: opening a named pipe would wait for a writer that never comes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{path}: not a regular file.")
    return os.fdopen(descriptor, "rb")


def _create_locked(path: Path) -> BinaryIO:
    """Create a file and lock it; again, if a sweep took it for a dead writer's in between."""
    while True:
        stream = path.open("xb")
        fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:
            return stream
        stream.close()
