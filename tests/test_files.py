"""Files are whole or absent, and every way in which a disk refuses is said in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import AssayError, IntegrityError
from assay.files import (
    FORBIDDEN_SUFFIXES,
    atomic_directory,
    atomic_path,
    canonical_json,
    explain_disk_errors,
    leftovers,
    list_files,
    point_link,
    read_json,
    readable_json,
    remove,
    replace_directory,
    sha256_bytes,
    sha256_file,
    sync_tree,
    temporary_beside,
    unsafe_name,
    write_atomic,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_digests_are_sha256_in_oci_notation(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_bytes(data) == f"sha256:{hashlib.sha256(data).hexdigest()}"


@given(JSON)
def test_json_reads_back_and_has_one_spelling(value: Any) -> None:
    for spell in (canonical_json, readable_json):
        assert json.loads(spell(value)) == value
        assert spell(json.loads(spell(value))) == spell(value)


def test_json_does_not_depend_on_the_order_of_keys_and_refuses_nan() -> None:
    assert canonical_json({"b": 1, "ä": 2, "a": [1.5]}) == '{"a":[1.5],"b":1,"ä":2}'.encode()
    assert readable_json({"b": 1, "a": 2}) == readable_json({"a": 2, "b": 1})
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


@pytest.mark.parametrize("data", [b'{"a": ', b"\xff\xfe", b""])
def test_damaged_json_is_an_integrity_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_file_is_written_whole_in_directories_that_did_not_exist(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a/b/file", b"one")
    write_atomic(tmp_path / "a/b/file", b"two")
    assert content(tmp_path) == {"a/b/file": b"two"}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "directory") as temporary:
        (temporary / "x").write_bytes(b"half")
        raise KeyboardInterrupt
    assert content(tmp_path) == {"file": b"old"} and not (tmp_path / "directory").exists()


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        with atomic_directory(tmp_path / "place") as temporary:
            (temporary / data.decode()).write_bytes(data)
    assert content(tmp_path) == {"place/two": b"two"}


def test_a_directory_that_cannot_be_replaced_is_put_back(tmp_path: Path) -> None:
    write_atomic(tmp_path / "place/old", b"old")
    with pytest.raises(FileNotFoundError):
        replace_directory(tmp_path / "nothing", tmp_path / "place")
    assert content(tmp_path) == {"place/old": b"old"}


def test_a_link_is_relative_and_moves_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_atomic(tmp_path / "cache" / name / "name", name.encode())
        point_link(tmp_path / "runs/x/artifact", tmp_path / "cache" / name)
        assert (tmp_path / "runs/x/artifact/name").read_text() == name
    (tmp_path / "cache").parent.rename(moved := tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert (moved / "runs/x/artifact/name").read_text() == "two"


def test_a_link_finds_its_target_though_a_directory_on_the_way_is_a_link(tmp_path: Path) -> None:
    write_atomic(tmp_path / "cache/one/name", b"one")
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "runs").symlink_to("elsewhere/deep")
    point_link(tmp_path / "runs/artifact", tmp_path / "cache/one")
    assert (tmp_path / "runs/artifact/name").read_bytes() == b"one"


def test_a_link_that_cannot_be_set_leaves_nothing_behind(tmp_path: Path) -> None:
    write_atomic(tmp_path / "taken/file", b"")
    with pytest.raises(OSError):
        point_link(tmp_path / "taken", tmp_path)
    assert not leftovers(tmp_path) and (tmp_path / "taken/file").is_file()


def test_leftovers_are_the_temporaries_and_nothing_else(tmp_path: Path) -> None:
    for name in ("file", ".hidden", "x.tmp", ".x.lock"):
        (tmp_path / name).touch()
    temporaries = [temporary_beside(tmp_path / name) for name in ("file", "directory", "link")]
    temporaries[0].touch()
    (temporaries[1] / "inner").mkdir(parents=True)
    temporaries[2].symlink_to(tmp_path / "file")
    assert leftovers(tmp_path) == sorted(temporaries)
    for path in (*leftovers(tmp_path), tmp_path / "gone"):
        remove(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", ".x.lock", "file", "x.tmp"]


def test_syncing_reaches_every_file_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a/b/file", b"x")
    synced: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    sync_tree(tmp_path)
    assert sorted(synced) == sorted(str(tmp_path / name) for name in ("", "a", "a/b", "a/b/file"))


# Disks that refuse


def _safetensors(place: Path, values: np.ndarray) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"values": torch.from_numpy(values)}, place / "file.safetensors")


def _onnx(place: Path, values: np.ndarray) -> None:
    import onnx_ir as ir

    shape, kind = ir.Shape(values.shape), ir.TensorType(ir.DataType.FLOAT)
    weight = ir.Value(name="w", const_value=ir.tensor(values, name="w"), shape=shape, type=kind)
    graph = ir.Graph([], [], nodes=[], initializers=[weight], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), place / "model.onnx", external_data="model.onnx.data")


def _child(place: Path, values: np.ndarray) -> None:
    import subprocess

    done = subprocess.run(
        ["dd", "if=/dev/zero", f"of={place}/file", f"bs={values.nbytes}", "count=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssayError(f"the tool failed:\n{done.stderr}")


WRITERS: dict[str, Callable[[Path, np.ndarray], object]] = {
    "python": lambda place, values: (place / "file").write_bytes(values.tobytes()),
    "numpy": lambda place, values: values.tofile(place / "file"),
    "safetensors": _safetensors,
    "onnx": _onnx,
    "a child process": _child,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_named_whoever_writes(writer: str, make_disk: Callable[[int], Any]) -> None:
    """Each library says it in its own way: an errno, a sentence, or the number of items written."""
    disk, values = make_disk(64 << 10), np.ones(1 << 18, dtype=np.float32)
    with (
        pytest.raises(AssayError, match="no space left on this disk") as full,
        atomic_directory(disk.place / "x") as place,
    ):
        WRITERS[writer](place, values)
    assert full.value.exit_code == 4 and str(disk.place / "x") in str(full.value)
    assert not any(disk.place.iterdir())
    disk.resize(8 << 20)
    with atomic_directory(disk.place / "x") as place:
        WRITERS[writer](place, values)
    assert any((disk.place / "x").iterdir())


def test_a_read_only_disk_is_named(make_disk: Callable[[int], Any]) -> None:
    disk = make_disk(1 << 20)
    disk.make_read_only()
    with pytest.raises(AssayError, match=r"file: cannot be written or read \(Read-only file system\)"):
        write_atomic(disk.place / "file", b"x")
    with pytest.raises(AssayError, match="link: cannot be written"):
        point_link(disk.place / "link", disk.place)


def test_what_was_refused_is_named_even_when_it_is_only_read(tmp_path: Path) -> None:
    refused = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "model/weights"))
    with (
        pytest.raises(AssayError, match="model/weights: cannot be written or read"),
        explain_disk_errors(tmp_path / "a/b"),
    ):
        raise refused
    inside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a/.b.0123.tmp/x"))
    with pytest.raises(AssayError, match="a/b: cannot be written or read"), explain_disk_errors(tmp_path / "a/b"):
        raise inside


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(errno.EIO, "broken"), FileNotFoundError("x"), AssayError("mine")]
)
def test_other_errors_pass_unchanged(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explain_disk_errors(tmp_path):
        raise error
    assert raised.value is error


# Names


@pytest.mark.parametrize(
    "name", ["model.onnx", "onnx/model.onnx.data", "chat_template.jinja", "größe.json", ".gitattributes"]
)
def test_ordinary_names_are_safe(name: str) -> None:
    assert unsafe_name(unicodedata.normalize("NFC", name)) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "C:x",
        "a\nb",
        "a\x00",
        "x" * 1025,
        "u\u0308.json",
    ]
    + [f"weights{suffix}" for suffix in sorted(FORBIDDEN_SUFFIXES)]
    + ["MODEL.BIN", "a/b.Py"],
)
def test_names_that_could_do_harm_are_refused(name: str) -> None:
    assert unsafe_name(name)


@given(st.text(alphabet=st.sampled_from("ab./\\\0:~ä\u0308")))
def test_a_safe_name_stays_inside_its_directory(name: str) -> None:
    if unsafe_name(name) is None:
        assert os.path.normpath(name) == name and name != ".." and not name.startswith(("/", "../"))


def test_files_are_listed_by_name_with_slashes(tmp_path: Path) -> None:
    for name in ("b", "a/z", "a/B", "Z", ".hidden"):
        write_atomic(tmp_path / name, b"")
    assert list_files(tmp_path) == [".hidden", "Z", "a/B", "a/z", "b"]


def _link(directory: Path) -> None:
    (directory / "link").symlink_to("/etc/passwd")


def _linked_directory(directory: Path) -> None:
    (directory / "link").symlink_to("/etc")


def _pipe(directory: Path) -> None:
    os.mkfifo(directory / "pipe")


def _twins(directory: Path) -> None:
    (directory / "Model").touch()
    (directory / "model").touch()


def _pickle(directory: Path) -> None:
    (directory / "weights.bin").touch()


@pytest.mark.parametrize("spoil", [_link, _linked_directory, _pipe, _twins, _pickle])
def test_what_does_not_belong_in_an_artifact_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    write_atomic(tmp_path / "file", b"")
    spoil(tmp_path)
    with pytest.raises(IntegrityError):
        list_files(tmp_path)


# Directories that are switched, and what killed writers left


WATCH = """
import sys
from pathlib import Path
from assay.files import replace_directory
place, there = Path(sys.argv[1]), []
sys.addaudithook(lambda event, _: event.startswith(("os.", "shutil.")) and there.append((place / "old/file").exists()))
replace_directory(place / "new", place / "old")
assert len(there) > 2 and all(there), there
"""


def test_a_directory_is_there_at_every_moment_of_its_replacement(tmp_path: Path) -> None:
    """Two names are swapped in one step: a reader never finds none."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    subprocess.run([sys.executable, "-c", WATCH, str(tmp_path)], check=True)
    assert (tmp_path / "old/file").read_text() == "new" and not (tmp_path / "new").exists()


def test_without_an_atomic_exchange_the_old_directory_is_put_back_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assay.files._exchange", lambda *_: False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/file").touch()
    with pytest.raises(FileNotFoundError):
        replace_directory(tmp_path / "nowhere", tmp_path / "old")
    assert (tmp_path / "old/file").exists()
    (tmp_path / "new").mkdir()
    replace_directory(tmp_path / "new", tmp_path / "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"] and not any((tmp_path / "old").iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_one_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = tmp_path / "served"
    dead, other = temporary_beside(destination), temporary_beside(tmp_path / "other")
    for path in (dead, other):
        (path / "inner").mkdir(parents=True)
    with atomic_directory(destination) as living:
        assert dead.exists(), "it may have been made a moment ago, and not be locked yet"
        monkeypatch.setattr("assay.files._SWEPT_AFTER_SECONDS", -1.0)
        with atomic_directory(destination) as second:
            (second / "second").touch()
        assert living.exists() and not dead.exists() and other.exists()
        (living / "first").touch()
    assert [path.name for path in destination.iterdir()] == ["first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, "served"])
