"""Stages are built once, appear whole, are used only as they were built, and survive kills, full disks and rivals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.errors import AssayError
from assay.files import read_json, write_atomic
from assay.progress import Progress
from assay.workspace import Stage, Workspace

STAGE = Stage("quantize", {"model": "sha256:0", "settings": {"method": "rtn"}})


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


class Maker:
    """Makes a stage of two files, and counts how often."""

    def __init__(self, content: str = "x") -> None:
        self.content, self.calls = content, 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "inner").mkdir(exist_ok=True)
        (directory / "inner/data").write_text(self.content)
        (directory / "config").write_text("{}")


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "artifacts", Notes())


def notes(space: Workspace) -> list[str]:
    assert isinstance(space.progress, Notes)
    return space.progress.said


def again(space: Workspace, **changes: Any) -> Workspace:
    """The workspace as the next process sees it."""
    return Workspace(space.root, Notes(), **changes)


def names(space: Workspace) -> list[str]:
    """What the cache holds, but for locks."""
    return sorted(path.name for path in (space.root / "cache").iterdir() if not path.name.endswith(".lock"))


def test_a_key_names_the_stage_and_every_fact() -> None:
    assert STAGE.key == Stage("quantize", dict(reversed(STAGE.facts.items()))).key
    others = [Stage("baseline", STAGE.facts), Stage("quantize", {"model": "sha256:0", "settings": {"method": "gptq"}})]
    assert len({STAGE.key, *(other.key for other in others)}) == 3


def test_a_stage_is_built_once(space: Workspace) -> None:
    make = Maker()
    assert not space.holds(STAGE)
    paths = {Workspace(space.root, Notes()).build(STAGE, make) for _ in range(3)} | {space.build(STAGE, make)}
    assert make.calls == 1 and paths == {space.path(STAGE)} and space.holds(STAGE)
    assert names(space) == [f"quantize-{STAGE.key}", f"quantize-{STAGE.key}.json"]
    assert notes(space) == ["quantize: cached"]


def test_the_record_says_what_the_key_stands_for(space: Workspace) -> None:
    space.build(STAGE, Maker())
    record = read_json(space.root / "cache" / f"quantize-{STAGE.key}.json")
    assert (record["stage"], record["facts"]) == (STAGE.name, STAGE.facts)


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failed_stage_is_not_there(space: Workspace, resumable: bool, error: type[BaseException]) -> None:
    def fail(directory: Path) -> None:
        (directory / "layer-0").touch()
        raise error

    with pytest.raises(error):
        space.build(STAGE, fail, resumable=resumable)
    assert not space.holds(STAGE)
    assert names(space) == ([f"quantize-{STAGE.key}.resumable"] if resumable else [])


def test_a_resumable_stage_goes_on_without_the_half_written_files(space: Workspace) -> None:
    partial = space.path(STAGE).with_name(f"quantize-{STAGE.key}.resumable")
    partial.mkdir(parents=True)
    (partial / "layer-0").write_text("finished")
    (partial / ".layer-1.0123456789ab.tmp").write_text("half")
    found: list[str] = []

    def go_on(directory: Path) -> None:
        found.extend(path.name for path in directory.iterdir())
        (directory / "layer-1").touch()

    path = space.build(STAGE, go_on, resumable=True)
    assert found == ["layer-0"] and sorted(file.name for file in path.iterdir()) == ["layer-0", "layer-1"]


@pytest.mark.parametrize("forced", [True, False])
def test_a_stage_that_cannot_go_on_starts_anew(space: Workspace, forced: bool) -> None:
    partial = space.path(STAGE).with_name(f"quantize-{STAGE.key}.{'resumable' if forced else 'partial'}")
    partial.mkdir(parents=True)
    (partial / "half").touch()
    path = again(space, force=forced).build(STAGE, Maker(), resumable=forced)
    assert sorted(file.name for file in path.iterdir()) == ["config", "inner"]


def test_force_builds_every_stage_once_more(space: Workspace) -> None:
    make = Maker()
    space.build(STAGE, make)
    forced = again(space, force=True)
    assert not forced.holds(STAGE)
    assert forced.build(STAGE, make) == forced.build(STAGE, make)
    assert make.calls == 2 and forced.holds(STAGE) and len(names(space)) == 2


def test_again_builds_this_stage_and_keeps_the_old_one_until_the_new_one_is_whole(space: Workspace) -> None:
    space.build(STAGE, Maker("old"))

    def fail(directory: Path) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        again(space).build(STAGE, fail, again=True)
    assert again(space).holds(STAGE) and (space.path(STAGE) / "inner/data").read_text() == "old"
    again(space).build(STAGE, Maker("new"), again=True)
    assert again(space).holds(STAGE) and (space.path(STAGE) / "inner/data").read_text() == "new"


def _flip(path: Path) -> None:
    (path / "inner/data").write_text("y")


def _add(path: Path) -> None:
    (path / "added").touch()


def _lose(path: Path) -> None:
    (path / "config").unlink()


def _lose_record(path: Path) -> None:
    path.with_name(f"{path.name}.json").unlink()


@pytest.mark.parametrize("change", [_flip, _add, _lose, _lose_record])
def test_what_was_changed_since_is_built_again_and_said(space: Workspace, change: Callable[[Path], None]) -> None:
    make = Maker()
    path = space.build(STAGE, make)
    change(path)
    later = again(space)
    assert not later.holds(STAGE)
    later.build(STAGE, make)
    assert make.calls == 2 and again(space).holds(STAGE)
    assert notes(later) == [f"{path}: not as it was built; building it again"]


# Several at once


def _in_processes(work: Callable[[int], None], count: int) -> list[int | None]:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_rivals_build_a_stage_once_and_all_get_it(space: Workspace, tmp_path: Path) -> None:
    def work(index: int) -> None:
        def make(directory: Path) -> None:
            (tmp_path / f"built-by-{index}").touch()
            time.sleep(0.3)
            Maker()(directory)

        assert (again(space).build(STAGE, make) / "inner/data").read_text() == "x"

    assert _in_processes(work, 4) == [0] * 4
    assert len(list(tmp_path.glob("built-by-*"))) == 1


def test_who_waits_is_told_and_then_finds_the_work_done(space: Workspace) -> None:
    begun, finish, rival = threading.Event(), threading.Event(), again(space)

    def slow(directory: Path) -> None:
        begun.set()
        finish.wait(30)
        Maker()(directory)

    first = threading.Thread(target=again(space).build, args=(STAGE, slow))
    first.start()
    begun.wait(30)
    make = Maker()
    second = threading.Thread(target=rival.build, args=(STAGE, make))
    second.start()
    while not notes(rival):
        time.sleep(0.01)
    finish.set()
    first.join(30)
    second.join(30)
    assert make.calls == 0 and notes(rival)[0].startswith("another process is at work on quantize-")


def test_a_run_belongs_to_one_process_at_a_time(space: Workspace, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def work(index: int) -> None:
        with again(space).run("tiny"), log.open("a") as stream:
            stream.write(f"{index} in, ")
            stream.flush()
            time.sleep(0.05)
            stream.write(f"{index} out\n")

    assert _in_processes(work, 4) == [0] * 4
    assert sorted(log.read_text().splitlines()) == [f"{index} in, {index} out" for index in range(4)]


# Kills


def test_a_kill_at_any_moment_leaves_a_stage_that_is_whole_or_absent(space: Workspace) -> None:
    """Forced rebuilding is the most that is done to a stage: move the old away, put the new in place, remove the old."""

    def work(index: int) -> None:
        forced = again(space, force=True)
        threading.Timer(0.0005 * index, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        for _ in range(10):
            forced.build(STAGE, Maker(), again=True)
        time.sleep(1)

    for index in range(20):
        assert _in_processes(lambda _, index=index: work(index), 1) == [-signal.SIGKILL]
        if space.path(STAGE).exists():
            assert again(space).holds(STAGE)
        with again(space).run("tiny"):
            assert again(space).build(STAGE, Maker(), resumable=True).is_dir()
        assert names(space) == [f"quantize-{STAGE.key}", f"quantize-{STAGE.key}.json"]


def test_a_run_begins_with_clearing_what_killed_ones_left(space: Workspace) -> None:
    with space.run("tiny") as directory:
        assert directory == space.root / "runs/tiny"
        (directory / "verdict.json").touch()
    (directory / ".verdict.json.0123456789ab.tmp").touch()
    (directory / ".evidence.0123456789ab.tmp").mkdir()
    space.build(STAGE, Maker())
    (space.root / "cache" / f".quantize-{STAGE.key}.0123456789ab.tmp/inner").mkdir(parents=True)
    (space.root / "cache" / f".quantize-{STAGE.key}.json.0123456789ab.tmp").touch()
    with again(space).run("tiny"):
        assert [path.name for path in directory.iterdir()] == ["verdict.json"]
        assert names(space) == [f"quantize-{STAGE.key}", f"quantize-{STAGE.key}.json"]


@pytest.mark.parametrize(("suffix", "kept"), [("partial", False), ("resumable", True)])
def test_what_nobody_goes_on_from_is_cleared_although_it_never_finished(
    space: Workspace, suffix: str, kept: bool
) -> None:
    (space.root / f"cache/quantize-{STAGE.key}.{suffix}").mkdir(parents=True)
    with again(space).run("tiny"):
        assert bool(names(space)) == kept


def test_clearing_leaves_alone_what_others_are_writing(space: Workspace) -> None:
    def make(directory: Path) -> None:
        temporary = directory.with_name(f".quantize-{STAGE.key}.json.0123456789ab.tmp")
        temporary.touch()
        assert _in_processes(lambda _: again(space).run("other").__enter__(), 1) == [0]
        assert temporary.exists()
        Maker()(directory)

    space.build(STAGE, make)


# Disks that refuse


def test_a_full_disk_keeps_finished_work_and_goes_on_when_there_is_room(make_disk: Callable[[int], Any]) -> None:
    disk = make_disk(256 << 10)
    space = Workspace(disk.place / "artifacts", Notes())
    earlier = Stage("baseline", {})
    space.build(earlier, Maker("kept"))
    size_bytes = 100 << 10

    def make(directory: Path) -> None:
        for index in range(4):
            write_atomic(directory / f"layer-{index}", bytes(size_bytes))

    with pytest.raises(AssayError, match="no space left on this disk") as full:
        space.build(STAGE, make, resumable=True)
    assert full.value.exit_code == 4 and not space.holds(STAGE) and again(space).holds(earlier)
    disk.resize(2 << 20)
    path = space.build(STAGE, make, resumable=True)
    assert [file.stat().st_size for file in sorted(path.iterdir())] == [size_bytes] * 4


def test_a_read_only_workspace_is_named(make_disk: Callable[[int], Any]) -> None:
    disk = make_disk(1 << 20)
    space = Workspace(disk.place / "artifacts", Notes())
    space.build(STAGE, Maker())
    disk.make_read_only()
    assert again(space).build(STAGE, Maker()).is_dir(), "what is there can be read"
    other = Stage("other", {})
    with pytest.raises(AssayError, match="cannot be written"):
        again(space).build(other, Maker())
    with pytest.raises(AssayError, match="cannot be written"), again(space).run("tiny"):
        pass
    nowhere = Workspace(disk.place / "elsewhere", Notes())
    with pytest.raises(AssayError, match="cannot be written"):
        nowhere.build(other, Maker())
