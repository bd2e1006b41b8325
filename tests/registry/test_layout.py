from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from filelock import FileLock

from assay.errors import AssayError, IntegrityError, UsageError
from assay.files import sha256_bytes
from assay.registry import layout as layout_module
from assay.registry.layout import Layout
from assay.registry.oci import MAX_JSON_BYTES, Descriptor, describe

DATA = b"some bytes" * 1000


@pytest.fixture
def layout(registry: Path) -> Layout:
    return Layout.create(registry)


def test_a_new_registry_is_an_empty_oci_layout(registry: Path) -> None:
    layout = Layout.create(registry)
    assert (registry / "oci-layout").read_bytes() == b'{"imageLayoutVersion":"1.0.0"}'
    assert (registry / "blobs/sha256").is_dir()
    assert layout.index().entries == ()
    assert Layout.create(str(registry)).index() == Layout.open(registry).index()


def test_what_is_not_a_registry(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no registry here"):
        Layout.open(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a registry, and not empty"):
        Layout.create(tmp_path)
    with pytest.raises(UsageError, match="not a registry"):
        Layout.create(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="not a registry"):
        Layout.create(tmp_path / "notes.txt" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_other_versions_are_refused(layout: Layout) -> None:
    (layout.root / "oci-layout").write_text('{"imageLayoutVersion":"2.0.0"}')
    with pytest.raises(IntegrityError, match=r"version 1\.0\.0"):
        Layout.open(layout.root)


def test_a_registry_without_its_index_is_damaged_and_not_made_anew(layout: Layout) -> None:
    (layout.root / "index.json").unlink()
    with pytest.raises(IntegrityError, match="damaged"):
        Layout.create(layout.root).index()


def test_bytes_go_in_once_and_come_out(layout: Layout) -> None:
    descriptor = describe(DATA, "text/plain")
    assert layout.put_bytes(DATA, "text/plain") is True
    inode = layout.blob_path(descriptor).stat().st_ino
    assert layout.put_bytes(DATA, "text/plain") is False
    assert layout.blob_path(descriptor).stat().st_ino == inode
    sink = io.BytesIO()
    layout.copy_blob(descriptor, sink)
    assert sink.getvalue() == layout.repository("small").read_json_blob(descriptor) == DATA
    assert list((layout.root / ".partial").iterdir()) == []


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA + b"x", b"X" + DATA[1:]])
def test_a_damaged_blob_is_seen_and_mended(layout: Layout, damage: bytes) -> None:
    descriptor = describe(DATA, "text/plain")
    layout.put_bytes(DATA, "text/plain")
    layout.blob_path(descriptor).write_bytes(damage)
    with pytest.raises(IntegrityError):
        layout.copy_blob(descriptor, None)
    assert layout.put_bytes(DATA, "text/plain") is True
    assert layout.repository("small").read_json_blob(descriptor) == DATA


def test_blobs_that_are_not_regular_files_are_refused(layout: Layout, tmp_path: Path) -> None:
    descriptor = describe(DATA, "text/plain")
    with pytest.raises(IntegrityError, match="missing"):
        layout.copy_blob(descriptor, None)
    (tmp_path / "bytes").write_bytes(DATA)
    layout.blob_path(descriptor).symlink_to(tmp_path / "bytes")
    with pytest.raises(IntegrityError, match="link"):
        layout.copy_blob(descriptor, None)
    layout.blob_path(descriptor).unlink()
    os.mkfifo(layout.blob_path(descriptor))
    with pytest.raises(IntegrityError, match="not a regular file"):
        layout.copy_blob(descriptor, None)
    assert layout.put_bytes(DATA, "text/plain") is True


def test_a_file_that_changes_while_it_is_published_is_not_stored(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA[::-1])
    descriptor = describe(DATA, "text/plain")
    with pytest.raises(IntegrityError, match="must not change while it is published"):
        layout.put_file(path, descriptor)
    assert not layout.blob_path(descriptor).exists()
    assert list((layout.root / ".partial").iterdir()) == []


def test_a_large_json_blob_is_not_read(layout: Layout) -> None:
    data = b" " * (MAX_JSON_BYTES + 1)
    layout.put_bytes(data, "application/json")
    with pytest.raises(IntegrityError, match="at most"):
        layout.repository("small").read_json_blob(describe(data, "application/json"))


def test_no_more_is_read_than_was_promised(layout: Layout) -> None:
    layout.put_bytes(DATA, "text/plain")
    liar = Descriptor("text/plain", sha256_bytes(DATA), len(DATA) - 1)
    with pytest.raises(IntegrityError, match="promised were 9999"):
        layout.copy_blob(liar, None)


def test_partial_files_of_the_dead_are_removed_and_of_the_living_kept(layout: Layout) -> None:
    dead = layout.root / ".partial" / "dead"
    dead.write_bytes(b"half")
    with layout._partial(layout.root / "blobs/sha256/x") as living:
        living.write(b"half")
        living.flush()
        Layout.create(layout.root)
        assert not dead.exists()
        assert len(list((layout.root / ".partial").iterdir())) == 1
    assert (layout.root / "blobs/sha256/x").read_bytes() == b"half"


def test_a_lock_that_is_not_freed_is_an_error_with_its_place(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "LOCK_SECONDS", 0.05)
    before = (layout.root / "index.json").read_bytes()
    model = describe(b"{}", "application/json")
    with FileLock(layout.root / ".index.lock"), pytest.raises(AssayError, match=r"\.index\.lock: another process"):
        layout.publish("small", ["latest"], model, [model], force=False)
    assert (layout.root / "index.json").read_bytes() == before


def test_a_disk_that_loses_a_bit_is_seen_before_anything_names_the_blob(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.fsync

    def lose_a_bit(descriptor: int) -> None:
        honest(descriptor)
        with open(f"/proc/self/fd/{descriptor}", "r+b") as stream:  # noqa: PTH123
            stream.write(b"X")

    monkeypatch.setattr(os, "fsync", lose_a_bit)
    monkeypatch.setattr(layout_module, "sync_directory", lambda directory: None)
    with pytest.raises(IntegrityError, match="promised was"):
        layout.put_bytes(DATA, "text/plain")
