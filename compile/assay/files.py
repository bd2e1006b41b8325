"""Files that are either whole or absent: digests, atomic writes, atomic directories, names that are safe.

A reader never sees a half-written file: bytes go to a temporary name beside the destination, are synced, and then renamed
(POSIX rename is atomic within a file system). A full disk leaves nothing behind but a clear error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
import time
import unicodedata
from collections.abc import Generator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from assay.errors import AssayError, IntegrityError

CHUNK_BYTES = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_SWEPT_AFTER_SECONDS = 60.0
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What libraries say of a full disk: safetensors (Rust) and subprocesses keep the words, numpy's tofile only the counts.
_NO_SPACE_WORDS = re.compile(r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written")
_NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM)
# What loaders would unpickle or run: never published, never pulled.
FORBIDDEN_SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".py", ".pyc", ".so", ".zip", ".7z"}
)


def sha256_bytes(data: bytes) -> str:
    """Digest in OCI notation: "sha256:" and 64 hexadecimal digits."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Digest of a file's bytes in OCI notation, read in pieces."""
    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, never through a link; IntegrityError for anything else, a named pipe too."""
    if path.is_symlink():
        raise IntegrityError(f"{path}: a link where a regular file is needed.")
    # O_NONBLOCK: opening a named pipe would wait for a writer that never comes.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{path}: not a regular file.")
    return os.fdopen(descriptor, "rb")


def copy_bytes(source: BinaryIO, sink: BinaryIO, limit_bytes: int, stop: threading.Event | None = None) -> int:
    """Copy up to so many bytes in pieces, or until `stop` is set; returns how many were copied."""
    left = limit_bytes
    while left and not (stop and stop.is_set()) and (chunk := source.read(min(CHUNK_BYTES, left))):
        sink.write(chunk)
        left -= len(chunk)
    return limit_bytes - left


def canonical_json(value: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, UTF-8. What digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def readable_json(value: Any) -> bytes:
    """JSON for people, just as deterministic: sorted keys, indented, a newline at the end."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Parse a JSON file; IntegrityError when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(
            f"{path}: not valid JSON ({error}). The file was damaged: build or pull it again."
        ) from error


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Generator[None]:
    """Turn "no space left" and "read-only" into an AssayError that names the place and the way out."""
    try:
        yield
    except Exception as error:
        system = error if isinstance(error, OSError) else OSError()
        if system.errno in _NO_SPACE or _NO_SPACE_WORDS.search(str(error)):
            raise AssayError(
                f"{path}: no space left on this disk. Nothing was left half-written; free some space and run the same "
                "command again: finished work is kept."
            ) from error
        if system.errno in _NO_ACCESS:
            # What was refused may be a file that is only read, somewhere else.
            refused = system.filename2 or system.filename
            named = Path(refused) if isinstance(refused, str) else path
            place = path if named.is_relative_to(path.parent) else named
            raise AssayError(
                f"{place}: cannot be written or read ({system.strerror}). Choose a place that you have access to."
            ) from error
        raise


def sync_directory(directory: Path) -> None:
    """Make a rename in this directory survive a power cut."""
    _sync(directory)


def sync_tree(directory: Path) -> None:
    """Flush a directory, and every file and directory below it, to disk; what links point to is none of it."""
    for path in (*directory.rglob("*"), directory):
        if not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A fresh hidden name in the same directory, so that a rename stays within one file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def leftovers(directory: Path) -> list[Path]:
    """Temporaries in a directory, of writers at work or of killed ones: only who knows that nobody writes may remove them."""
    return sorted(directory.glob(".*.tmp"))


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all that is in it; what is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: Path) -> Generator[Path]:
    """Yield a temporary path; when the block ends well, sync it and rename it to `path`, else remove it."""
    temporary = temporary_beside(path)
    try:
        with explain_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
    finally:
        _give_up(temporary)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def atomic_directory(
    destination: Path, key: str | None = None, keep_after: tuple[type[BaseException], ...] = ()
) -> Generator[Path]:
    """Yield a temporary directory; when the block ends well it becomes `destination`, else it is removed.

    An existing destination is replaced only then. What a killed process left of an earlier attempt is removed first; but what
    was made under the same `key`, and ended by a kill or by an error of `keep_after`, is there again in the temporary directory.
    """
    temporary = temporary_beside(destination)
    kept = destination.with_name(f".{destination.name}.{key}.tmp") if key else None
    try:
        with explain_disk_errors(destination):
            destination.parent.mkdir(parents=True, exist_ok=True)
            _sweep_directories(destination, kept)
            with contextlib.ExitStack() as stack:
                # Another process may be at the same work: then this one does it by itself.
                if kept and stack.enter_context(_locked_directory(kept, may_exist=True)):
                    temporary = kept
                else:
                    stack.enter_context(_locked_directory(temporary))
                yield temporary
                sync_tree(temporary)
                replace_directory(temporary, destination)
    except keep_after:
        raise
    except BaseException:
        _give_up(temporary)
        raise


@contextlib.contextmanager
def _locked_directory(path: Path, *, may_exist: bool = False) -> Generator[bool]:
    """Make a directory and hold a lock on it, which the kernel frees when this process dies.

    may_exist: take one that is there; False when it is not ours, or when somebody is at work in it.
    """
    path.mkdir(exist_ok=may_exist)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        about = os.fstat(descriptor)
        free = about.st_uid == os.geteuid()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Meanwhile another process may have finished it, and renamed it.
            free = free and path.lstat().st_ino == about.st_ino
        except (BlockingIOError, FileNotFoundError):
            free = False
        yield free
    finally:
        os.close(descriptor)


def _sweep_directories(destination: Path, kept: Path | None) -> None:
    """Remove temporary directories of `destination`, all but one, whose writers are dead: their locks are free.

    One that is younger than a minute may not be locked yet, and is left alone.
    """
    for left in destination.parent.glob(f".{glob.escape(destination.name)}.*.tmp"):
        if left == kept:
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(descriptor).st_ctime > _SWEPT_AFTER_SECONDS:
                    shutil.rmtree(left)
            finally:
                os.close(descriptor)


def _give_up(temporary: Path) -> None:
    """Remove a temporary that may be left; what hinders this hindered the writing before, and that error is the one to show."""
    with contextlib.suppress(OSError):
        remove(temporary)


def replace_directory(source: Path, destination: Path) -> None:
    """Put `source` where `destination` is, in one step where the file system can; what stood there is removed after the switch."""
    if not destination.exists():
        source.rename(destination)
        sync_directory(destination.parent)
        return
    if not _exchange(source, destination):
        old = temporary_beside(destination)
        destination.rename(old)
        try:
            source.rename(destination)
        except OSError:
            old.rename(destination)
            raise
        source = old
    sync_directory(destination.parent)
    shutil.rmtree(source, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux, renameat2(2): RENAME_EXCHANGE); False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def point_link(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to a directory, in one step, whatever it pointed to before."""
    temporary = temporary_beside(link)
    try:
        with explain_disk_errors(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            temporary.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()), target_is_directory=True)
            temporary.replace(link)
            sync_directory(link.parent)
    finally:
        _give_up(temporary)


def unsafe_name(name: str) -> str | None:
    """Why a file name from outside must not be used, or None when it is safe.

    Safe is a relative POSIX path in NFC without empty, dot or dot-dot parts, control characters, backslashes or
    suffixes that a loader would unpickle or execute.
    """
    parts = name.split("/")
    if not name or len(name) > 1024 or any(part in ("", ".", "..") for part in parts):
        return "it is empty, absolute, too long, or has an empty, . or .. part"
    if any(ord(character) < 32 or character in '\\:*?"<>|\x7f' for character in name):
        return 'it has a control character or one of \\ : * ? " < > |'
    if unicodedata.normalize("NFC", name) != name:
        return "it is not in Unicode normal form C"
    if PurePosixPath(name).suffix.lower() in FORBIDDEN_SUFFIXES:
        return "files of this kind can run code when they are loaded"
    return None


def list_files(directory: Path) -> list[str]:
    """Relative POSIX names of the regular files below a directory, sorted by code point.

    Raises IntegrityError for links, devices and unsafe or case-colliding names.
    """
    names: list[str] = []
    for root, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(root) / name
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise IntegrityError(
                    f"{path}: only regular files and directories belong in an artifact; this is a link or a device."
                )
        names += [(Path(root) / name).relative_to(directory).as_posix() for name in files]
    names.sort()
    folded: dict[str, str] = {}
    for name in names:
        if reason := unsafe_name(name):
            raise IntegrityError(f"{directory}: the file name {name!r} cannot be in an artifact: {reason}.")
        if other := folded.get(name.casefold()):
            raise IntegrityError(f"{directory}: {other!r} and {name!r} are one file on file systems that ignore case.")
        folded[name.casefold()] = name
    return names
