"""Stages on disk, named by what went into them: nothing is computed twice, and a killed job goes on where it stopped.

    artifacts/
      cache/<stage>-<key>/            a finished stage, immutable; <stage>-<key>.json says what its key stands for
      cache/<stage>-<key>.partial/    a stage under way
      runs/<recipe name>/             the last run of a recipe: artifact (a link into the cache), evidence, verdict, report
      store/                          the default registry

A key is the digest of the stage's inputs, settings and tool versions. A stage directory appears by one rename when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from assay.files import canonical_json, explain_disk_errors, replace_directory, sha256_bytes, sync_tree, write_atomic
from assay.progress import Progress

_KEY_DIGITS = 20


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
        self._fresh: set[str] = set()

    def path(self, stage: Stage) -> Path:
        return self.root / "cache" / f"{stage.name}-{stage.key}"

    def holds(self, stage: Stage) -> bool:
        """Whether the stage is there and need not be built."""
        return self.path(stage).is_dir() and (not self.force or stage.key in self._fresh)

    def run_directory(self, name: str) -> Path:
        return self.root / "runs" / name

    def build(self, stage: Stage, make: Callable[[Path], None], resumable: bool = False) -> Path:
        """The stage's directory, made by `make(partial directory)` unless it is there already.

        resumable: `make` can go on from what an interrupted run left in the partial directory.  One process builds a stage at
        a time; a second one waits and then finds it done.
        """
        path = self.path(stage)
        if self.holds(stage):
            self.progress.note(f"{stage.name}: cached")
            return path
        with explain_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(path):
                if self.holds(stage):
                    return path
                partial = path.with_name(f"{path.name}.partial")
                if partial.exists() and (not resumable or self.force):
                    shutil.rmtree(partial)
                partial.mkdir(exist_ok=True)
                try:
                    make(partial)
                except BaseException:
                    if not resumable:
                        shutil.rmtree(partial, ignore_errors=True)
                    raise
                sync_tree(partial)
                write_atomic(
                    path.with_name(f"{path.name}.json"), canonical_json({"stage": stage.name} | stage.facts) + b"\n"
                )
                replace_directory(partial, path)
        self._fresh.add(stage.key)
        return path

    def discard(self, *stages: Stage) -> None:
        """Forget cached stages, so that they are built again."""
        for stage in stages:
            shutil.rmtree(self.path(stage), ignore_errors=True)

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.progress.note(f"another process is building {path.name}; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
