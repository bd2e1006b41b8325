"""Stages on disk, named by what went into them: nothing is computed twice, and a killed job goes on where it stopped.

    artifacts/
      cache/<stage>-<key>/            a finished stage, immutable
      cache/<stage>-<key>.json        what its key stands for, and the digest of its bytes
      cache/<stage>-<key>.partial/    a stage under way; .resumable/ where another run can go on from it
      runs/<recipe name>/             the last run of a recipe: artifact (a link into the cache), evidence, verdict, report
      store/                          the default registry

A key is the digest of the stage's inputs, settings and tool versions. A stage directory appears by one rename when it is whole,
and is used only as long as its bytes are those that were built.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from assay.artifact import bundle_digest, file_digests
from assay.errors import IntegrityError
from assay.files import (
    canonical_json,
    explain_disk_errors,
    leftovers,
    read_json,
    remove,
    replace_directory,
    sha256_bytes,
    sync_tree,
    write_atomic,
)
from assay.progress import Progress

_KEY_DIGITS = 20
_PARTIAL, _RESUMABLE = ".partial", ".resumable"


@dataclass(frozen=True)
class Stage:
    """One step of a job: its name and the facts that decide its result."""

    name: str
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        digest = sha256_bytes(canonical_json({"stage": self.name} | self.facts))
        return digest.removeprefix("sha256:")[:_KEY_DIGITS]


class Workspace:
    """The directory that holds cache, runs and the default registry."""

    def __init__(self, root: Path, progress: Progress, force: bool = False) -> None:
        """force: build every stage again once, whatever is cached."""
        self.root = root
        self.progress = progress
        self.force = force
        self._files: dict[str, dict[str, str]] = {}

    def path(self, stage: Stage) -> Path:
        return self.root / "cache" / f"{stage.name}-{stage.key}"

    def holds(self, stage: Stage) -> bool:
        """Whether the stage is there, as it was built, and need not be built."""
        if stage.key not in self._files:
            found = None if self.force else _intact_files(self.path(stage))
            if found is None:
                return False
            self._files[stage.key] = found
        return True

    def files(self, stage: Stage) -> dict[str, str]:
        """Name → sha256 of every file of a stage that is there, as found when it was checked or built."""
        return self._files[stage.key]

    @contextmanager
    def run(self, name: str) -> Generator[Path]:
        """The run directory of a recipe, for one process at a time, cleared of what killed ones left half-written."""
        directory = self.root / "runs" / name
        with self._lock(directory):
            directory.mkdir(exist_ok=True)
            for left in leftovers(directory):
                remove(left)
            self._clear_cache()
            yield directory

    def build(
        self, stage: Stage, make: Callable[[Path], None], *, resumable: bool = False, again: bool = False
    ) -> Path:
        """The stage's directory, made by `make(partial directory)` unless it is there already.

        resumable: `make` can go on from what an interrupted run left in the partial directory.  again: make it although it is
        there.  One process builds a stage at a time; a second one waits and then finds it done.
        """
        path = self.path(stage)
        if not again and self.holds(stage):
            self.progress.note(f"{stage.name}: cached")
            return path
        with explain_disk_errors(path), self._lock(path):
            if not again and self.holds(stage):
                return path
            if path.exists() and not (again or self.force):
                self.progress.note(f"{path}: not as it was built; building it again")
            self._files[stage.key] = self._make(path, stage, make, resumable and not self.force)
        return path

    def _clear_cache(self) -> None:
        """Remove what killed processes left and nobody goes on from: temporaries and half-made stages."""
        cache = self.root / "cache"
        for left in (*leftovers(cache), *cache.glob(f"*{_PARTIAL}"), *cache.glob(f"*{_RESUMABLE}")):
            stage = left.name.lstrip(".").split(".")[0]
            if left.suffix == _RESUMABLE and not (cache / stage).exists():
                continue
            with suppress(Timeout), FileLock(cache / f".{stage}.lock", timeout=0):
                remove(left)

    def _make(self, path: Path, stage: Stage, make: Callable[[Path], None], resumable: bool) -> dict[str, str]:
        partial = path.with_name(f"{path.name}{_RESUMABLE if resumable else _PARTIAL}")
        for left in leftovers(partial) if resumable else [partial]:
            remove(left)
        partial.mkdir(exist_ok=True)
        try:
            make(partial)
        except BaseException:
            if not resumable:
                with suppress(OSError):
                    remove(partial)
            raise
        sync_tree(partial)
        files = file_digests(partial)
        record = {"stage": stage.name, "facts": stage.facts, "digest": bundle_digest(files)}
        write_atomic(_record(path), canonical_json(record) + b"\n")
        replace_directory(partial, path)
        return files

    @contextmanager
    def _lock(self, path: Path) -> Generator[None]:
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        with explain_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self.progress.note(f"another process is at work on {path.name}; waiting for it")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _intact_files(path: Path) -> dict[str, str] | None:
    """The files of a stage with their digests; None unless it is there with the bytes that were built."""
    try:
        files = file_digests(path)
        return files if path.is_dir() and read_json(_record(path))["digest"] == bundle_digest(files) else None
    except (OSError, IntegrityError, KeyError, TypeError):
        return None
