from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from assay.artifact import bundle_digest, directory_digest
from assay.errors import AssayError, IntegrityError, UsageError
from assay.files import canonical_json, copy_bytes, sha256_bytes
from assay.registry import base
from assay.registry.layout import Layout
from assay.registry.oci import MANIFEST_TYPE, describe
from assay.registry.publish import Receipt, publish
from assay.registry.pull import pull

MakeRun = Callable[..., Path]


@pytest.fixture
def receipt(make_run: MakeRun, registry: Path) -> Receipt:
    run = make_run(files={"model.onnx": b"graph", "sub/weights.data": bytes(1000), "empty.txt": b""})
    return publish(run / "artifact", run, registry, "small", ["latest", "1.0"])


def blob(registry: Path, digest: str) -> Path:
    return registry / "blobs/sha256" / digest.removeprefix("sha256:")


def test_what_was_published_is_pulled(receipt: Receipt, registry: Path, tmp_path: Path) -> None:
    pulled = pull(registry, "small", tmp_path / "a/b/out")
    assert pulled.created and pulled.destination == tmp_path / "a/b/out"
    assert (pulled.digest, pulled.bundle_digest) == (receipt.digest, receipt.bundle_digest)
    assert directory_digest(tmp_path / "a/b/out") == receipt.bundle_digest
    assert {file.name for file in pulled.files} >= {"sub/weights.data", "empty.txt", "manifest.json"}
    assert sum(file.size_bytes for file in pulled.files) == pulled.size_bytes == receipt.size_bytes
    assert os.listdir(tmp_path / "a/b") == ["out"]  # noqa: PTH208


@pytest.mark.parametrize("form", ["small", "small:latest", "small:1.0", "small@{digest}", "{digest}"])
def test_every_reference_leads_to_it(receipt: Receipt, registry: Path, tmp_path: Path, form: str) -> None:
    pulled = pull(str(registry), form.format(digest=receipt.digest), tmp_path / "out")
    assert pulled.digest == receipt.digest


def test_a_digest_is_pulled_after_its_tag_moved(
    receipt: Receipt, make_run: MakeRun, registry: Path, tmp_path: Path
) -> None:
    newer = make_run("newer", files={"model.onnx": b"newer"})
    publish(newer / "artifact", newer, registry, "small", ["latest", "1.0"], force=True)
    assert pull(registry, receipt.reference, tmp_path / "old").bundle_digest == receipt.bundle_digest
    assert pull(registry, "small", tmp_path / "new").bundle_digest == directory_digest(newer / "artifact")


@pytest.mark.parametrize("reference", ["other", "small:2.0", "sha256:" + "0" * 64, "other@sha256:" + "0" * 64])
def test_what_is_not_there(receipt: Receipt, registry: Path, tmp_path: Path, reference: str) -> None:
    with pytest.raises(UsageError, match="there is no"):
        pull(registry, reference, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_evidence_and_blobs_that_nothing_names_are_no_artifacts(
    receipt: Receipt, registry: Path, tmp_path: Path
) -> None:
    for digest in (receipt.evidence_digest, describe(b"", "text/plain").digest):
        with pytest.raises(UsageError, match="there is no"):
            pull(registry, digest, tmp_path / "out")


# The destination


def test_the_same_again_changes_nothing(receipt: Receipt, registry: Path, tmp_path: Path, helpers: Any) -> None:
    pull(registry, "small", tmp_path / "out")
    before = helpers.snapshot(tmp_path / "out")
    assert pull(registry, "small", tmp_path / "out").created is False
    assert helpers.snapshot(tmp_path / "out") == before


def test_an_empty_directory_is_filled(receipt: Receipt, registry: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert pull(registry, "small", tmp_path / "out").created


@pytest.mark.parametrize("damage", ["changed", "extra", "missing"])
def test_other_files_are_kept_unless_forced(receipt: Receipt, registry: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    pull(registry, "small", out)
    if damage == "changed":
        (out / "model.onnx").write_bytes(b"grapH")
    elif damage == "extra":
        (out / "mine.py").write_text("print()")
    else:
        (out / "model.onnx").unlink()
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UsageError, match="holds other files"):
        pull(registry, "small", out)
    assert sorted(path.name for path in out.iterdir()) == before
    assert pull(registry, "small", out, force=True).created
    assert directory_digest(out) == receipt.bundle_digest


def test_files_links_and_mount_points_are_not_destinations(
    receipt: Receipt, registry: Path, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not a directory"):
        pull(registry, "small", tmp_path / "file", force=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UsageError, match="a link"):
        pull(registry, "small", tmp_path / "link", force=True)
    disk = small_disk(1 << 20)
    with pytest.raises(UsageError, match=r"a mount point\. Give a directory inside of it"):
        pull(registry, "small", disk)
    assert pull(registry, "small", disk / "model").created


def test_a_full_disk_leaves_nothing(
    receipt: Receipt, registry: Path, tmp_path: Path, make_run: MakeRun, small_disk: Callable[[int], Path]
) -> None:
    large = make_run("large", files={"model.onnx": bytes(1 << 20)})
    publish(large / "artifact", large, registry, "large")
    disk = small_disk(256 << 10)
    (disk / "out").mkdir()
    with pytest.raises(AssayError, match="no space left on this disk") as full:
        pull(registry, "large", disk / "out")
    assert full.value.exit_code == 4
    assert list(disk.rglob("*")) == [disk / "out"]
    assert pull(registry, "small", disk / "out").created


def test_a_read_only_place_is_named(receipt: Receipt, registry: Path, tmp_path: Path, read_only: Path) -> None:
    with pytest.raises(AssayError, match="cannot be written") as refused:
        pull(registry, "small", read_only / "out")
    assert refused.value.exit_code == 4


def test_pulling_needs_no_write_access_to_the_registry(
    make_run: MakeRun, read_only_registry: Path, tmp_path: Path
) -> None:
    assert pull(read_only_registry, "small", tmp_path / "out").created


# Damage


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if data else b"\0")


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] if data else b"\0")


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def delete(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.move(path, copy)
    path.symlink_to(copy)


@pytest.mark.parametrize("damage", [flip, truncate, extend, delete, link], ids=lambda damage: damage.__name__)
def test_damage_to_any_blob_is_seen_and_the_destination_untouched(
    receipt: Receipt, registry: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    manifest = json.loads(blob(registry, receipt.digest).read_bytes())
    digests = [receipt.digest, manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
    assert len(set(digests)) == 7
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    for digest in digests:
        kept = blob(registry, digest).read_bytes()
        damage(blob(registry, digest))
        with pytest.raises(IntegrityError) as seen:
            pull(registry, "small", tmp_path / "out", force=True)
        assert seen.value.exit_code == 5
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "store"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
        blob(registry, digest).unlink(missing_ok=True)
        blob(registry, digest).write_bytes(kept)
    assert pull(registry, "small", tmp_path / "out", force=True).created


def test_two_swapped_blobs_are_seen(make_run: MakeRun, registry: Path, tmp_path: Path) -> None:
    run = make_run("swapped", files={"model.onnx": b"one", "other.onnx": b"two"})
    publish(run / "artifact", run, registry, "small")
    one, two = (blob(registry, sha256_bytes(data)) for data in (b"one", b"two"))
    one.write_bytes(b"two")
    two.write_bytes(b"one")
    with pytest.raises(IntegrityError, match="promised was"):
        pull(registry, "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_index_is_seen(receipt: Receipt, registry: Path, tmp_path: Path) -> None:
    path = registry / "index.json"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(IntegrityError):
        pull(registry, "small", tmp_path / "out")


# A registry that somebody else wrote


def point_at(registry: Path, manifest: bytes) -> None:
    """Let small:latest name a manifest of an attacker, all digests in order."""
    layout = Layout.open(registry)
    layout.put_bytes(manifest, MANIFEST_TYPE)
    index = json.loads((registry / "index.json").read_bytes())
    index["manifests"] = [
        describe(manifest, MANIFEST_TYPE).to_json()
        | {"annotations": {"org.opencontainers.image.ref.name": "small:latest"}}
    ]
    (registry / "index.json").write_bytes(canonical_json(index))


@pytest.mark.parametrize("name", ["../escape.json", "/tmp/escape.json", "model.onnx", "run.py", "model.onnx/below"])
def test_a_hostile_registry_writes_nothing(receipt: Receipt, registry: Path, tmp_path: Path, name: str) -> None:
    value = json.loads(blob(registry, receipt.digest).read_bytes())
    layer = value["layers"][0]
    assert layer["annotations"]["org.cncf.model.filepath"] == "assay.lock.json"
    layer["annotations"] = {"org.cncf.model.filepath": name, "org.opencontainers.image.title": name}
    files = {layer["annotations"]["org.cncf.model.filepath"]: layer["digest"] for layer in value["layers"]}
    value["annotations"]["dev.assay.bundle.digest"] = bundle_digest(files)
    point_at(registry, canonical_json(value))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(IntegrityError):
        pull(registry, "small", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_artifact_that_would_load_code_is_neither_published_nor_pulled(
    make_run: MakeRun, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-genai opens the library that its configuration names, whatever the file is called."""
    config = {"model": {"decoder": {"session_options": {"custom_ops_library": "vocab.json"}}}}
    run = make_run(
        "hostile", files={"model.onnx": b"x", "genai_config.json": canonical_json(config), "vocab.json": b"ELF"}
    )
    with pytest.raises(IntegrityError, match="custom_ops_library makes a runtime load code"):
        publish(run / "artifact", run, registry, "hostile")
    assert not registry.exists()
    with monkeypatch.context() as lax:
        lax.setattr("assay.registry.modelpack.refuse_code", lambda _: None)
        publish(run / "artifact", run, registry, "hostile")
    with pytest.raises(IntegrityError, match="custom_ops_library makes a runtime load code"):
        pull(registry, "hostile", tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_a_layer_that_claims_another_size_is_seen(receipt: Receipt, registry: Path, tmp_path: Path) -> None:
    for claim in (0, 1 << 40):
        value = json.loads(blob(registry, receipt.digest).read_bytes())
        next(layer for layer in value["layers"] if layer["size"] == 1000)["size"] = claim
        point_at(registry, canonical_json(value))
        with pytest.raises(IntegrityError, match="1000 bytes, promised were"):
            pull(registry, "small", tmp_path / "out")


def test_a_manifest_that_is_too_long_is_not_read(receipt: Receipt, registry: Path, tmp_path: Path) -> None:
    manifest = blob(registry, receipt.digest).read_bytes()
    point_at(registry, manifest + b" " * (5 << 20))
    with pytest.raises(IntegrityError, match="at most 4194304"):
        pull(registry, "small", tmp_path / "out")


def test_a_config_that_is_too_long_is_not_read(receipt: Receipt, registry: Path, tmp_path: Path) -> None:
    value = json.loads(blob(registry, receipt.digest).read_bytes())
    value["config"]["size"] = 5 << 20
    point_at(registry, canonical_json(value))
    with pytest.raises(IntegrityError, match="at most 4194304"):
        pull(registry, "small", tmp_path / "out")


def test_each_file_is_synced_before_it_is_read_back(
    receipt: Receipt, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, read_back = os.fsync, base.copy_verified

    def note_sync(descriptor: int) -> None:
        order.append("sync")
        sync(descriptor)

    def note_read(source: BinaryIO, sink: BinaryIO | None, *about: Any) -> None:
        if sink is None:
            order.append("read back")
        read_back(source, sink, *about)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(base, "copy_verified", note_read)
    files = len(pull(registry, "small", tmp_path / "out").files)
    assert order[: 2 * files] == ["sync", "read back"] * files


def test_a_disk_that_loses_a_bit_is_seen(
    receipt: Receipt, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def lose_a_bit(source: BinaryIO, sink: BinaryIO, limit_bytes: int, stop: Any) -> int:
        copied = copy_bytes(source, sink, limit_bytes, stop)
        sink.seek(-1, os.SEEK_CUR)
        sink.write(b"X")
        return copied

    monkeypatch.setattr("assay.registry.base.copy_bytes", lose_a_bit)
    with pytest.raises(IntegrityError, match="Check this disk"):
        pull(registry, "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()
