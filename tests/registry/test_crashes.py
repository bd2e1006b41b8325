"""What may happen while others read and write: a kill at any step, a disk that fills up at any step, races."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import start, wait

from assay.artifact import directory_digest
from assay.errors import AssayError
from assay.registry.channels import promote, rollback
from assay.registry.collecting import collect, remove
from assay.registry.inspection import list_artifacts, verify
from assay.registry.publish import publish
from assay.registry.pull import pull
from assay.registry.tags import untag

MakeRun = Callable[..., Path]
# What changes a file system, as Python announces it; a kill before each of these is a kill at every step.
STEPS = {"os.rename", "os.mkdir", "os.remove", "fcntl.flock"}


def in_process(work: Callable[[], object]) -> int:
    """Run in a process of its own; how it ended."""
    return wait(start(work))


def kill_before_step(number: int) -> None:
    """Let this process be killed, by SIGKILL, before it changes the file system for the n-th time."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in STEPS or writes:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.slow
def test_a_publish_killed_at_any_step_leaves_a_sound_registry(
    make_run: MakeRun, quick_path: Path, helpers: Any
) -> None:
    files = {"model.onnx": b"graph"}
    old, new = make_run("old", files=files), make_run("new", files=files | {"model.onnx.data": b"x" * 5000})
    start_store = quick_path / "start"
    before = publish(old / "artifact", old, start_store, "small", ["latest", "1.0"]).bundle_digest
    after = directory_digest(new / "artifact")
    seen: set[str] = set()
    for number in range(1, 1000):
        store = quick_path / f"store{number}"
        shutil.copytree(start_store, store)

        def killed(number: int = number, store: Path = store) -> None:
            kill_before_step(number)
            publish(new / "artifact", new, store, "small", ["latest", "1.1"])

        status = in_process(killed)
        if status == 0:
            break
        assert status == signal.SIGKILL
        helpers.assert_sound(store)
        found = {listing.tag: listing for listing in list_artifacts(store)}
        names = {"latest", "1.0"} | ({"1.1"} if verify(store, "small").bundle_digest == after else set())
        assert set(found) == names and not any(listing.problem for listing in found.values())
        seen.add(pull(store, "small", quick_path / f"out{number}").bundle_digest)
        publish(new / "artifact", new, store, "small", ["latest", "1.1"])
        assert verify(store, "small:1.1").bundle_digest == after
        assert list((store / ".partial").iterdir()) == []
        shutil.rmtree(store)
    assert number > 20
    assert seen == {before, after}


@pytest.mark.slow
def test_the_first_publish_killed_at_any_step_can_be_done_again(
    make_run: MakeRun, quick_path: Path, helpers: Any
) -> None:
    run = make_run(files={"model.onnx": b"graph"})
    for number in range(1, 1000):
        store = quick_path / f"store{number}"

        def killed(number: int = number, store: Path = store) -> None:
            kill_before_step(number)
            publish(run / "artifact", run, store, "small")

        status = in_process(killed)
        if status == 0:
            break
        assert status == signal.SIGKILL
        publish(run / "artifact", run, store, "small")
        verify(store, "small")
        helpers.assert_sound(store)
        assert list((store / ".partial").iterdir()) == []
        shutil.rmtree(store)
    assert number > 20


@pytest.mark.slow
def test_a_promotion_and_a_collection_killed_at_any_step(make_run: MakeRun, quick_path: Path, helpers: Any) -> None:
    """The channel is where it was or where it goes, with a record that leads back; what is named stays."""
    runs = [make_run(tag, files={"model.onnx": tag.encode()}) for tag in "123"]
    origin = quick_path / "start"
    one, two, three = (publish(run / "artifact", run, origin, "small", [run.name]).digest for run in runs)
    promote(origin, "small:1", "production")
    untag(origin, "small:3")
    remove(origin, f"small@{three}")
    seen: set[str] = set()
    for number in range(1, 1000):
        store = quick_path / f"store{number}"
        shutil.copytree(origin, store)

        def killed(number: int = number, store: Path = store) -> None:
            kill_before_step(number)
            promote(store, "small:2", "production")
            collect(store, 0)

        status = in_process(killed)
        if status == 0:
            break
        assert status == signal.SIGKILL
        helpers.assert_sound(store)
        seen.add(verify(store, "small:production").digest)
        assert promote(store, "small:2", "production").sequence == 2
        assert collect(store, 0).young == 0 and three not in {listing.digest for listing in list_artifacts(store)}
        assert rollback(store, "small", "production").digest == one
        assert list((store / ".partial").iterdir()) == []
        shutil.rmtree(store)
    assert number > 20
    assert seen == {one, two}


def test_a_pull_killed_at_any_step_shows_all_or_nothing(run: Path, quick_path: Path) -> None:
    receipt = publish(run / "artifact", run, quick_path / "store", "small")
    for number in range(1, 1000):
        out = quick_path / f"out{number}"

        def killed(number: int = number, out: Path = out) -> None:
            kill_before_step(number)
            pull(quick_path / "store", "small", out)

        status = in_process(killed)
        if status == 0:
            break
        assert status == signal.SIGKILL
        assert not out.exists() or directory_digest(out) == receipt.bundle_digest
        assert pull(quick_path / "store", "small", out).digest == receipt.digest
    assert number > 5


def leave_free(disk: Path, pages: int) -> None:
    """Fill a disk until so many pages are free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, free.f_bavail - pages) * free.f_frsize))


def test_a_disk_that_fills_up_at_any_step(make_run: MakeRun, small_disk: Callable[[int], Path], helpers: Any) -> None:
    disk = small_disk(512 << 10)
    store = disk / "store"
    old, new = make_run("old"), make_run("new", files={"model.onnx": b"new"})
    large = make_run("large", files={"model.onnx": bytes(10 * os.statvfs(disk).f_frsize)})
    publish(old / "artifact", old, store, "small", ["latest", "1.0"])
    index = (store / "index.json").read_bytes()

    def fails(run: Path, pages: int) -> bool:
        leave_free(disk, pages)
        try:
            publish(run / "artifact", run, store, "small", ["latest", "1.1"])
        except AssayError as error:
            assert error.exit_code == 4 and "no space left" in str(error)
            assert (store / "index.json").read_bytes() == index
            assert list((store / ".partial").iterdir()) == []
            helpers.assert_sound(store)
            assert verify(store, "small:latest").bundle_digest == directory_digest(old / "artifact")
            return True
        return False

    for pages in range(10):
        assert fails(large, pages)
    # With a page more in every second round each blob is the one that fails, and last the index.
    rounds = 0
    while fails(new, rounds % 2):
        rounds += 1
        assert rounds < 100
    assert rounds > 10
    assert verify(store, "small:latest").bundle_digest == directory_digest(new / "artifact")


def test_a_new_registry_on_a_full_disk(run: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64 << 10)
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize))
    with pytest.raises(AssayError, match="no space left"):
        publish(run / "artifact", run, disk / "store", "small")
    (disk / "filler").unlink()
    with pytest.raises(AssayError, match="no space left"):
        publish(run / "artifact", run, disk / "store", "small")
    assert list_artifacts(disk / "store") == ()


def test_a_read_only_registry_is_named(read_only_registry: Path, make_run: MakeRun) -> None:
    other = make_run("other", files={"model.onnx": b"other"})
    with pytest.raises(AssayError, match="cannot be written") as refused:
        publish(other / "artifact", other, read_only_registry, "small")
    assert refused.value.exit_code == 4


def test_two_publishers_and_a_puller_at_once(make_run: MakeRun, registry: Path, tmp_path: Path, helpers: Any) -> None:
    versions = 6
    runs = {
        f"{who}.{number}": make_run(f"run{who}.{number}", files={"model.onnx": b"%d %d" % (who, number), "same": b"x"})
        for who in (1, 2)
        for number in range(versions)
    }
    digests = {directory_digest(run / "artifact") for run in runs.values()}
    publish(runs["1.0"] / "artifact", runs["1.0"], registry, "small", ["latest"])

    def publisher(who: int) -> None:
        for number in range(versions):
            run = runs[f"{who}.{number}"]
            publish(run / "artifact", run, registry, "small", [f"{who}.{number}", "latest"])

    def puller() -> None:
        number = 0
        while len(list_artifacts(registry)) < 2 * versions + 1:
            number += 1
            assert pull(registry, "small", tmp_path / f"out{number}").bundle_digest in digests
            verify(registry, "small")

    children = [start(lambda: publisher(1)), start(lambda: publisher(2)), start(puller)]
    assert [wait(child) for child in children] == [0, 0, 0]
    assert len(list((tmp_path).glob("out*"))) > 1
    assert {listing.tag for listing in list_artifacts(registry)} == {*runs, "latest"}
    for version, run in runs.items():
        assert verify(registry, f"small:{version}").bundle_digest == directory_digest(run / "artifact")
    helpers.assert_sound(registry)
    assert list((registry / ".partial").iterdir()) == []
