"""What holds for every registry, wherever it is: each test runs against each backend."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import start, wait
from registry_places import PLACES, Place

from assay.artifact import bundle_digest, directory_digest
from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.files import canonical_json
from assay.registry.base import Attachment, Part, Repository, part, read_attachment
from assay.registry.inspection import list_artifacts, show, verify
from assay.registry.modelpack import describe_model
from assay.registry.oci import Descriptor, describe, parse_manifest
from assay.registry.open import check_registry, create_registry, open_registry
from assay.registry.publish import Receipt, publish
from assay.registry.pull import pull
from assay.registry.reference import parse_reference

# huggingface_hub 2.4 uploads by an argument that its HTTP client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

MakeRun = Callable[..., Path]
DATA = os.urandom(3 << 20)
BLOB = describe(DATA, "application/octet-stream")
STATEMENT = "application/vnd.example.statement.v1+json"


@pytest.fixture(params=list(PLACES))
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with PLACES[request.param](tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def repository(place: Place) -> Repository:
    return create_registry(place.address).repository("small")


def publish_run(run: Path, place: Place, *tags: str, force: bool = False) -> Receipt:
    return publish(run / "artifact", run, place.address, "small", tags or ("latest",), force=force)


def state_of(place: Place) -> Any:
    return [
        (listing.tag, listing.digest, listing.verdicts, listing.problem) for listing in list_artifacts(place.address)
    ]


def test_what_is_published_can_be_listed_shown_verified_and_pulled(run: Path, place: Place, tmp_path: Path) -> None:
    check_registry(place.address)
    receipt = publish_run(run, place, "latest", "1.0")
    assert receipt.created and receipt.evidence_created and receipt.tags_set == ("latest", "1.0")
    assert open_registry(place.address).names() == ("small",)
    assert state_of(place) == [
        ("1.0", receipt.digest, ("PASS",), None),
        ("latest", receipt.digest, ("PASS",), None),
    ]
    for reference in ("small", "small:1.0", f"small@{receipt.digest}"):
        artifact = show(place.address, reference)
        assert (artifact.digest, artifact.names) == (receipt.digest, ("small:1.0", "small:latest"))
        assert verify(place.address, reference).evidence == (receipt.evidence_digest,)
    pulled = pull(place.address, "small:1.0", tmp_path / "out")
    assert pulled.digest == receipt.digest
    assert directory_digest(tmp_path / "out") == receipt.bundle_digest == directory_digest(run / "artifact")


def test_publishing_again_changes_nothing(run: Path, place: Place) -> None:
    first = publish_run(run, place, "latest", "1.0")
    before = state_of(place)
    second = publish_run(run, place, "latest", "1.0")
    assert (second.created, second.evidence_created, second.tags_set, second.blobs_written) == (False, False, (), 0)
    assert (second.digest, second.evidence_digest) == (first.digest, first.evidence_digest)
    assert state_of(place) == before


def test_versions_stay_and_other_tags_move(make_run: MakeRun, place: Place, tmp_path: Path) -> None:
    old, new = make_run("old"), make_run("new", files={"model.onnx": b"new", "other.json": b"{}"})
    first = publish_run(old, place, "latest", "1.0")
    before = state_of(place)
    with pytest.raises(UsageError, match="versions do not move"):
        publish_run(new, place, "latest", "1.0")
    assert state_of(place) == before
    second = publish_run(new, place, "latest", "1.1")
    assert second.tags_set == ("latest", "1.1")
    assert show(place.address, "small").digest == second.digest
    assert pull(place.address, "small:1.0", tmp_path / "out1").digest == first.digest
    assert pull(place.address, "small", tmp_path / "out2").digest == second.digest
    for reference in ("small:1.0", "small:1.1", f"small@{first.digest}"):
        verify(place.address, reference)
    assert publish_run(new, place, "1.0", force=True).tags_set == ("1.0",)
    assert show(place.address, "small:1.0").digest == second.digest
    assert verify(place.address, f"small@{first.digest}").bundle_digest == first.bundle_digest


def test_an_old_model_can_be_published_again_as_the_latest(make_run: MakeRun, place: Place, tmp_path: Path) -> None:
    old, new = make_run("old"), make_run("new", files={"model.onnx": b"new"})
    first = publish_run(old, place, "latest", "1.0")
    second = publish_run(new, place, "latest", "1.1")
    again = publish_run(old, place)
    assert (again.created, again.tags_set, again.digest) == (False, ("latest",), first.digest)
    assert pull(place.address, "small", tmp_path / "out").digest == first.digest
    assert verify(place.address, "small:1.1").digest == second.digest


def test_more_evidence_for_the_same_model(run: Path, place: Place, helpers: Any) -> None:
    first = publish_run(run, place)
    (run / "evidence/quality.jsonl").write_text('{"kind":"window","measured":"again"}\n')
    helpers.write_evidence(run)
    helpers.write_verdict(run)
    second = publish_run(run, place)
    assert second.digest == first.digest and second.evidence_digest != first.evidence_digest
    assert (second.created, second.evidence_created, second.tags_set) == (False, True, ())
    assert set(verify(place.address, "small").evidence) == {first.evidence_digest, second.evidence_digest}


def test_a_statement_and_a_tag_for_a_model_that_is_there(make_run: MakeRun, place: Place) -> None:
    old, new = make_run("old"), make_run("new", files={"model.onnx": b"new"})
    first = publish_run(old, place, "1.0")
    second = publish_run(new, place, "1.1")
    repository = create_registry(place.address).repository("small")
    model = repository.resolve(parse_reference("small:1.0"))
    statement = Attachment(STATEMENT, (part("a.json", "application/json", b'{"a":1}'),), {"dev.assay.x": "y"})
    change = repository.commit(repository.read_manifest(model), [statement], ("stable",))
    assert (change.model_is_new, change.tags_set, len(change.attached)) == (False, ("stable",), 1)
    again = repository.commit(repository.read_manifest(model), [statement], ("stable",))
    assert (again.tags_set, again.attached, again.written) == ((), (), 0)
    (found,) = open_registry(place.address).repository("small").referrers(first.digest, STATEMENT)
    assert found.annotations["dev.assay.x"] == "y"
    manifest = read_attachment(repository, found, describe_model(repository.read_manifest(model)))
    assert repository.read_json_blob(manifest.layers[0]) == b'{"a":1}'
    assert verify(place.address, "small:stable").digest == first.digest
    assert verify(place.address, "small:1.1").digest == second.digest


def test_what_is_not_there_is_named(run: Path, place: Place) -> None:
    if place.server is None:
        with pytest.raises(UsageError, match="no registry"):
            list_artifacts(place.address)
    publish_run(run, place, "1.0")
    with pytest.raises(UsageError, match=r"there is no small:2\.0\. Tags of small: 1\.0"):
        show(place.address, "small:2.0")
    with pytest.raises(UsageError, match=r"there is no .*other"):
        show(place.address, "other")
    with pytest.raises(UsageError, match="there is no small@sha256:"):
        show(place.address, f"small@sha256:{'0' * 64}")


def test_damaged_bytes_are_never_pulled(run: Path, place: Place, tmp_path: Path) -> None:
    publish_run(run, place)
    layer = next(file for file in show(place.address, "small").files if file.name == "model.onnx.data")
    good = (run / "artifact/model.onnx.data").read_bytes()
    for bad in (good[:-1], good + b"x", b"X" + good[1:]):
        place.replace(layer.digest, bad)
        with pytest.raises(IntegrityError):
            pull(place.address, "small", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(IntegrityError):
            verify(place.address, "small")


def test_a_damaged_manifest_is_listed_with_its_problem(run: Path, place: Place, tmp_path: Path) -> None:
    if place.address.startswith("oci:"):
        pytest.skip("docker-registry hashes its manifests itself, and answers 500")
    receipt = publish_run(run, place)
    manifest = (
        create_registry(place.address)
        .repository("small")
        .read_manifest(open_registry(place.address).repository("small").resolve(parse_reference("small")))
    )
    place.replace(receipt.digest, manifest[:-2] + b" }")
    with pytest.raises(IntegrityError):
        pull(place.address, "small", tmp_path / "out")
    (listing,) = list_artifacts(place.address)
    assert listing.problem


def test_a_file_that_changes_while_it_is_published_is_not_stored(run: Path, place: Place, tmp_path: Path) -> None:
    repository = create_registry(place.address).repository("small")
    path = tmp_path / "file"
    path.write_bytes(b"as it was")
    promised = part("file", "text/plain", path)
    for now in (b"as it is!", b"longer than it was", b"short"):
        path.write_bytes(now)
        with pytest.raises(IntegrityError, match="must not change while it is published"):
            repository.put(promised)


def test_blobs_are_read_from_any_byte_on(run: Path, place: Place) -> None:
    publish_run(run, place)
    repository = open_registry(place.address).repository("small")
    model = repository.resolve(parse_reference("small"))
    data = (run / "artifact/model.onnx.data").read_bytes()
    layers = parse_manifest(repository.read_manifest(model), "test").layers
    (layer,) = (layer for layer in layers if layer.size == len(data))
    for offset in (0, 1, len(data) - 1, len(data)):
        with repository.open_blob(layer, offset) as stream:
            assert stream.read() == data[offset:]


def test_a_blob_that_is_missing_is_an_integrity_error(run: Path, place: Place) -> None:
    publish_run(run, place)
    repository = open_registry(place.address).repository("small")
    with pytest.raises(IntegrityError, match="missing"):
        repository.copy_blob(describe(b"never stored", "text/plain"), None)


def test_the_empty_blob(place: Place) -> None:
    repository = create_registry(place.address).repository("small")
    empty = Part(describe(b"", "text/plain"), b"")
    repository.put(empty)
    if place.address.startswith("hf:"):
        return  # stored with the commit that names it
    assert repository.put(empty) is False
    repository.copy_blob(empty.descriptor, None)


@pytest.mark.slow
def test_a_publish_killed_at_any_request_shows_all_or_nothing(make_run: MakeRun, place: Place, tmp_path: Path) -> None:
    if place.before is None:
        pytest.skip("a registry in a directory has its own test: test_crashes.py")
    files = {"model.onnx": b"graph"}
    old, new = make_run("old", files=files), make_run("new", files=files | {"model.onnx.data": b"x\0" * 100})
    publish_run(old, place, "1.0", "latest")
    before, after = directory_digest(old / "artifact"), directory_digest(new / "artifact")
    seen: set[str] = set()
    for number in range(1, 200):
        child = start(lambda: publish_run(new, place, "1.1", "latest"))
        count = 0

        def kill(number: int = number, child: int = child) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.kill(child, signal.SIGKILL)

        place.before(kill)
        status = wait(child)
        place.before(None)
        found = {listing.tag: listing for listing in list_artifacts(place.address)}
        latest = verify(place.address, "small").bundle_digest
        moved = {"1.1"} if latest == after else set[str]()
        # A server of the distribution protocol sets one tag after the other, in the order that was asked.
        assert {"1.0", "latest"} | moved <= set(found) <= {"1.0", "latest", "1.1"}
        if "1.1" in found:
            assert verify(place.address, "small:1.1").bundle_digest == after
        if not place.address.startswith("oci"):
            assert ("1.1" in found) == (latest == after)
        assert verify(place.address, "small:1.0").bundle_digest == before
        seen.add(latest)
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert number > 8
    assert seen == {before, after}
    publish_run(new, place, "1.1", "latest")
    assert pull(place.address, "small:1.1", tmp_path / "out").bundle_digest == after


@pytest.mark.slow
def test_two_publishers_and_a_puller_at_once(make_run: MakeRun, place: Place, tmp_path: Path) -> None:
    versions = 4
    runs = {
        f"{who}.{number}": make_run(f"run{who}.{number}", files={"model.onnx": b"%d %d" % (who, number), "same": b"x"})
        for who in (1, 2)
        for number in range(versions)
    }
    digests = {directory_digest(run / "artifact") for run in runs.values()}
    publish_run(runs["1.0"], place)

    def publisher(who: int) -> None:
        for number in range(versions):
            publish_run(runs[f"{who}.{number}"], place, f"{who}.{number}", "latest")

    def puller() -> None:
        number = 0
        while len(list_artifacts(place.address)) < 2 * versions + 1:
            number += 1
            assert pull(place.address, "small", tmp_path / f"out{number}").bundle_digest in digests
            verify(place.address, "small")

    children = [start(lambda: publisher(1)), start(lambda: publisher(2)), start(puller)]
    assert [wait(child) for child in children] == [0, 0, 0]
    assert {listing.tag for listing in list_artifacts(place.address)} == {*runs, "latest"}
    for version, run in runs.items():
        assert verify(place.address, f"small:{version}").bundle_digest == directory_digest(run / "artifact")


def test_a_descriptor_that_lies_about_the_size(run: Path, place: Place) -> None:
    publish_run(run, place)
    repository = open_registry(place.address).repository("small")
    model = repository.resolve(parse_reference("small"))
    liar = Descriptor(model.media_type, model.digest, model.size - 1)
    with pytest.raises(IntegrityError):
        repository.copy_blob(liar, None)


# Attachments


def test_what_is_said_about_a_model(run: Path, place: Place) -> None:
    receipt = publish(run / "artifact", run, place.address, "small", ["1.0"])
    repository = create_registry(place.address).repository("small")
    model = repository.resolve(parse_reference("small:1.0"))
    data = repository.read_manifest(model)
    said = [
        Attachment(f"application/vnd.test.{number % 2}", (part("x", "text/plain", b"%d" % number),), {"n": str(number)})
        for number in range(4)
    ]
    change = repository.commit(data, said[:3])
    assert (change.model_is_new, change.tags_set, len(change.attached)) == (False, (), 3)
    assert change.attached == tuple(attachment.descriptor(model).digest for attachment in said[:3])
    change = repository.commit(data, said, ["stable"])
    assert (change.tags_set, change.attached) == (("stable",), (said[3].descriptor(model).digest,))
    assert repository.commit(data, said, ["stable"]).written == 0
    found = repository.referrers(model.digest, "application/vnd.test.1")
    assert [(entry.annotations["n"], entry.artifact_type) for entry in found] == [
        ("1", "application/vnd.test.1"),
        ("3", "application/vnd.test.1"),
    ]
    assert len(repository.referrers(model.digest)) == 5
    manifest = read_attachment(repository, found[1], model)
    assert repository.read_json_blob(manifest.layers[0]) == b"3"
    other = describe_model(b"another model")
    assert repository.referrers(other.digest) == ()
    with pytest.raises(IntegrityError, match="its subject is not"):
        read_attachment(repository, found[1], other)
    assert verify(place.address, "small:stable").evidence == (receipt.evidence_digest,)


# Pulls that were cut off, and newer versions


def test_a_fetch_goes_on_from_what_is_there(place: Place, repository: Repository, tmp_path: Path) -> None:
    if place.address.startswith("hf:"):
        pytest.skip("stored with the commit that names it")
    repository.put(Part(BLOB, DATA))
    path = tmp_path / "file"
    assert repository.fetch(BLOB, path) == len(DATA)
    assert path.read_bytes() == DATA
    for kept in (0, 1, 1_000_000, len(DATA) - 1, len(DATA)):
        path.write_bytes(DATA[:kept])
        assert repository.fetch(BLOB, path) == len(DATA) - kept
        assert path.read_bytes() == DATA
    for wrong in (b"X" + DATA[1:1000], DATA[:-1] + bytes([DATA[-1] ^ 1]), DATA + b"more"):
        path.write_bytes(wrong)
        assert repository.fetch(BLOB, path) == len(DATA) + max(0, len(DATA) - len(wrong))
        assert path.read_bytes() == DATA
    short = Descriptor(BLOB.media_type, BLOB.digest, BLOB.size - 1)
    with pytest.raises(IntegrityError):
        repository.fetch(short, tmp_path / "short")
    with pytest.raises(IntegrityError):
        repository.fetch(Descriptor(BLOB.media_type, BLOB.digest, BLOB.size + 1), tmp_path / "long")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        repository.fetch(BLOB, tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_newer_version_moves_what_changed(make_run: MakeRun, place: Place, tmp_path: Path, helpers: Any) -> None:
    files = {"model.onnx": b"graph"} | {f"part{number}": b"%d" % number * 1000 for number in range(9)}
    one, two = make_run("one", files=files), make_run("two", files=files | {"part7": b"changed" * 200})
    publish(one / "artifact", one, place.address, "small", ["1"])
    receipt = publish(two / "artifact", two, place.address, "small", ["2"])
    # part7, the model's manifest, the evidence that names it, its verdict and its manifest.
    assert receipt.blobs_written <= 6
    out = tmp_path / "out"
    pull(place.address, "small:1", out)
    with pytest.raises(UsageError, match="holds other files"):
        pull(place.address, "small:2", out)
    pulled = pull(place.address, "small:2", out, force=True)
    assert pulled.moved_bytes == len(b"changed" * 200)
    assert directory_digest(out) == receipt.bundle_digest
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    # A file that was damaged meanwhile is not taken for what it was.
    (out / "part3").write_bytes(b"4" * 1000)
    assert pull(place.address, "small:2", out, force=True).moved_bytes == 1000
    assert directory_digest(out) == receipt.bundle_digest


def test_a_killed_pull_goes_on_where_it_was(
    make_run: MakeRun, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(files={"model.onnx": b"graph", "a": DATA, "b": DATA[::-1], "c": b"x" * 1000})
    receipt = publish(run / "artifact", run, place.address, "small")
    out = tmp_path / "out"

    def killed() -> None:
        def copy(source: Any, sink: Any, limit_bytes: int, stop: Any) -> int:
            sink.write(source.read(2 << 20))
            sink.flush()
            if sink.tell() == 2 << 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return sink.tell()

        monkeypatch.setattr("assay.registry.base.copy_bytes", copy)
        pull(place.address, "small", out)

    assert wait(start(killed)) == signal.SIGKILL
    assert not out.exists() and len(list(tmp_path.glob(".out.*.tmp"))) == 1
    pulled = pull(place.address, "small", out)
    assert pulled.moved_bytes <= receipt.size_bytes - (2 << 20)
    assert directory_digest(out) == receipt.bundle_digest
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]


def test_what_a_killed_pull_left_is_not_believed(
    make_run: MakeRun, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(files={"model.onnx": b"graph", "a": DATA})
    receipt = publish(run / "artifact", run, place.address, "small")
    left = tmp_path / f".out.{receipt.bundle_digest[7:23]}.tmp"
    for wrong in ("content", "link", "stranger"):
        left.mkdir()
        (left / "a").write_bytes(b"X" + DATA[1:2000])
        if wrong == "link":
            (left / "model.onnx").symlink_to(tmp_path / "elsewhere")
        if wrong == "stranger":
            (left / "evil.txt").write_text("evil")
        pull(place.address, "small", tmp_path / "out", force=True)
        assert directory_digest(tmp_path / "out") == receipt.bundle_digest
        assert not left.exists() and not (tmp_path / "elsewhere").exists()
        (tmp_path / "out/a").unlink()


# Registries that somebody else wrote


@pytest.mark.parametrize(
    "name", ["../escape", "/tmp/escape", "a/../../escape", "MODEL.ONNX", "run.py", "model.onnx/below", "a\\b", ""]
)
def test_hostile_names_write_nothing(run: Path, place: Place, tmp_path: Path, name: str) -> None:
    if place.address.startswith("hf:"):
        pytest.skip("a manifest there is stored with files of the names in it")
    receipt = publish(run / "artifact", run, place.address, "small")
    repository = create_registry(place.address).repository("small")
    value = json.loads(repository.read_manifest(repository.resolve(parse_reference("small"))))
    layer = value["layers"][0]
    layer["annotations"] = {"org.cncf.model.filepath": name, "org.opencontainers.image.title": name}
    files = {layer["annotations"]["org.cncf.model.filepath"]: layer["digest"] for layer in value["layers"]}
    value["annotations"]["dev.assay.bundle.digest"] = bundle_digest(files)
    repository.commit(canonical_json(value), tags=["hostile"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(IntegrityError):
        pull(place.address, "small:hostile", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert pull(place.address, "small:latest", tmp_path / "out").digest == receipt.digest


def test_a_digest_without_a_name(place: Place, run: Path, tmp_path: Path) -> None:
    receipt = publish_run(run, place)
    if place.address.startswith(("oci:", "hf:")):
        with pytest.raises(NotSupportedError, match="NAME@sha256:"):
            pull(place.address, receipt.digest, tmp_path / "out")
    else:
        assert pull(place.address, receipt.digest, tmp_path / "out").digest == receipt.digest


@pytest.mark.slow
def test_many_publishers_at_once(make_run: MakeRun, place: Place) -> None:
    """Each process has a version of its own; they share files and parts of the evidence."""
    count = 16 if place.server is None else 4
    runs = {
        f"1.{number}": make_run(f"run{number}", files={"model.onnx": b"%d" % number, "same": b"x"})
        for number in range(count)
    }
    children = [
        start(lambda run=run, version=version: publish_run(run, place, version)) for version, run in runs.items()
    ]
    assert [wait(child) for child in children] == [0] * count
    assert {row.tag for row in list_artifacts(place.address)} == runs.keys()
    for version, run in runs.items():
        assert verify(place.address, f"small:{version}").bundle_digest == directory_digest(run / "artifact")


@pytest.mark.slow
def test_many_attach_to_one_model_at_once(run: Path, place: Place) -> None:
    receipt = publish_run(run, place)

    def attach(number: int) -> None:
        repository = create_registry(place.address).repository("small")
        data = repository.read_manifest(repository.resolve(parse_reference("small")))
        said = Attachment("application/vnd.test", (part("x", "text/plain", b"%d" % number),))
        repository.commit(data, [said])

    children = [start(lambda number=number: attach(number)) for number in range(6)]
    assert [wait(child) for child in children] == [0] * 6
    repository = open_registry(place.address).repository("small")
    assert len(repository.referrers(receipt.digest, "application/vnd.test")) == 6
