"""What is particular to buckets: conditional writes, uploads in parts, and what a store can answer."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from registry_places import Place, objects_of, s3_place
from s3_server import ACCESS_DENIED, CLOCK_SKEW, SLOW_DOWN, Store

from assay.errors import AccessDeniedError, AssayError, IntegrityError, NotSupportedError, UnreachableError, UsageError
from assay.registry import s3, transport
from assay.registry.base import part
from assay.registry.inspection import list_artifacts, verify
from assay.registry.modelpack import describe_model
from assay.registry.open import check_registry, create_registry, open_registry
from assay.registry.publish import publish
from assay.registry.pull import pull
from assay.registry.s3 import S3Registry

PREFIX = "team/models/"
PART = 5 << 20


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(transport, "BASE_SECONDS", 0.001)
    with s3_place(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def store(place: Place) -> Store:
    return place.server


def blobs_of(store: Store) -> dict[str, bytes]:
    return {key: data for key, data in objects_of(store, PREFIX).items() if "/blobs/" in key}


def uploads_of(store: Store) -> list[Any]:
    return store.client().list_multipart_uploads(Bucket="bucket").get("Uploads", [])


def test_a_copy_of_the_prefix_is_a_registry_in_a_directory(run: Path, place: Place, tmp_path: Path) -> None:
    receipt = publish(run / "artifact", run, place.address, "small", ["1.0"])
    for key, data in objects_of(place.server, PREFIX).items():
        path = tmp_path / "copy" / key.removeprefix(PREFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert list_artifacts(tmp_path / "copy") == list_artifacts(place.address)
    assert verify(tmp_path / "copy", "small:1.0").digest == receipt.digest


def test_a_store_that_ignores_conditions_is_refused(run: Path, place: Place, store: Store) -> None:
    store.conditional = False
    with pytest.raises(NotSupportedError, match=r"whose condition .* is not met"):
        publish(run / "artifact", run, place.address, "small")
    assert blobs_of(store) == {}
    store.conditional = True
    publish(run / "artifact", run, place.address, "small")
    before = objects_of(store, PREFIX)
    store.conditional = False
    with pytest.raises(NotSupportedError):
        publish(run / "artifact", run, place.address, "small", ["2.0"])
    assert objects_of(store, PREFIX) == before


def test_a_store_that_knows_no_conditions_is_refused(place: Place, store: Store) -> None:
    store.before = lambda method, path, query: (501, "NotImplemented") if method == "PUT" else None
    with pytest.raises(NotSupportedError, match="Use a store that keeps to conditions"):
        create_registry(place.address)


def test_a_race_for_the_index_is_lost_once_and_won_then(
    make_run: Callable[..., Path], place: Place, store: Store
) -> None:
    one, two = make_run("one"), make_run("two", files={"model.onnx": b"two"})
    create_registry(place.address)
    raced: list[str] = []

    def race(method: str, path: str, query: str) -> None:
        if method == "PUT" and path.endswith("index.json") and not raced:
            raced.append(path)
            publish(two / "artifact", two, place.address, "small", ["2.0", "latest"])

    store.before = race
    receipt = publish(one / "artifact", one, place.address, "small", ["1.0", "latest"])
    assert raced and receipt.tags_set == ("1.0", "latest")
    found = {listing.tag: listing.digest for listing in list_artifacts(place.address)}
    assert found == {"1.0": receipt.digest, "latest": receipt.digest, "2.0": verify(place.address, "small:2.0").digest}


def test_a_version_that_another_publisher_took_meanwhile(
    make_run: Callable[..., Path], place: Place, store: Store
) -> None:
    one, two = make_run("one"), make_run("two", files={"model.onnx": b"two"})
    create_registry(place.address)
    raced: list[str] = []

    def race(method: str, path: str, query: str) -> None:
        if method == "PUT" and path.endswith("index.json") and not raced:
            raced.append(path)
            raced.append(publish(two / "artifact", two, place.address, "small", ["1.0"]).digest)

    store.before = race
    with pytest.raises(UsageError, match="versions do not move"):
        publish(one / "artifact", one, place.address, "small", ["1.0"])
    assert [listing.digest for listing in list_artifacts(place.address)] == raced[1:]


def test_an_answer_that_is_lost_is_not_a_race(run: Path, place: Place, store: Store) -> None:
    create_registry(place.address)
    lost: list[str] = []

    def lose(method: str, path: str, query: str) -> tuple[int, str] | None:
        if method == "PUT" and path not in lost:
            lost.append(path)
            return 500, "InternalError"
        return None

    store.after = lose
    receipt = publish(run / "artifact", run, place.address, "small", ["1.0"])
    assert len(lost) > 10
    assert receipt.created and receipt.tags_set == ("1.0",)
    assert verify(place.address, "small:1.0").digest == receipt.digest


def test_many_writers_of_the_index_lose_nothing(place: Place) -> None:
    create_registry(place.address)
    model = describe_model(b"{}")
    names = [f"model{number}" for number in range(8)]

    def write(name: str) -> None:
        S3Registry.open(place.address).publish(name, ["latest"], model, force=False)

    threads = [Thread(target=write, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_registry(place.address).names() == tuple(names)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of two parts and a bit."""
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 11)
    return path


def test_a_large_file_goes_up_in_parts(place: Place, store: Store, large: Path) -> None:
    repository = create_registry(place.address).repository("small")
    blob = part("large", "text/plain", large)
    assert repository.put(blob) is True
    assert len([path for method, path in store.requests if method == "PUT" and "/blobs/" in path]) == 3
    assert repository.put(blob) is False
    sink = io.BytesIO()
    repository.copy_blob(blob.descriptor, sink)
    assert sink.getvalue() == large.read_bytes()
    assert uploads_of(store) == []


def test_an_upload_that_fails_leaves_nothing(place: Place, store: Store, large: Path) -> None:
    repository = create_registry(place.address).repository("small")
    blob = part("large", "text/plain", large)
    store.before = lambda method, path, query: SLOW_DOWN if "partNumber=2" in query else None
    with pytest.raises(UnreachableError, match="SlowDown"):
        repository.put(blob)
    store.before = None
    assert blobs_of(store) == {} and uploads_of(store) == []
    data = large.read_bytes()
    large.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="must not change while it is published"):
        repository.put(blob)
    assert blobs_of(store) == {} and uploads_of(store) == []


def test_another_publisher_of_the_same_large_file(place: Place, store: Store, large: Path) -> None:
    repository = create_registry(place.address).repository("small")
    blob = part("large", "text/plain", large)
    raced: list[bool] = []

    def race(method: str, path: str, query: str) -> None:
        if method == "POST" and "uploadId" in query and not raced:
            raced.append(False)
            raced.append(create_registry(place.address).repository("small").put(blob))

    store.before = race
    assert repository.put(blob) is False
    assert raced == [False, True]
    assert len(blobs_of(store)) == 1 and uploads_of(store) == []


def test_parts_that_a_killed_publisher_left_are_forgotten_in_time(
    place: Place, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_registry(place.address)
    # The store of the tests says of every upload that it is years old.
    monkeypatch.setattr(s3, "_ABANDONED_AFTER", timedelta(days=100 * 365))
    store.client().create_multipart_upload(Bucket="bucket", Key=f"{PREFIX}blobs/sha256/{'0' * 64}")
    create_registry(place.address)
    assert len(uploads_of(store)) == 1
    monkeypatch.setattr(s3, "_ABANDONED_AFTER", timedelta(days=7))
    create_registry(place.address)
    assert uploads_of(store) == []


def test_a_download_that_breaks_off_goes_on_where_it_did(run: Path, place: Place, store: Store, tmp_path: Path) -> None:
    receipt = publish(run / "artifact", run, place.address, "small")
    store.cut = [3, 1, 100, 0, 5]
    assert pull(place.address, "small", tmp_path / "out").digest == receipt.digest
    assert store.cut == []


def test_a_store_that_sends_a_few_bytes_at_a_time_is_given_up(place: Place, store: Store) -> None:
    repository = create_registry(place.address).repository("small")
    blob = part("file", "text/plain", os.urandom(1000))
    repository.put(blob)
    store.requests.clear()
    store.crumb = 10
    with pytest.raises(UnreachableError, match=r"ended 940 bytes short of its 1000.*tried 6 times"):
        repository.copy_blob(blob.descriptor, None)
    assert len(store.requests) == 6
    store.crumb = 300
    repository.copy_blob(blob.descriptor, None)


def test_a_damaged_blob_is_mended_by_publishing_again(run: Path, place: Place, store: Store, tmp_path: Path) -> None:
    receipt = publish(run / "artifact", run, place.address, "small")
    for key, data in blobs_of(store).items():
        store.client().put_object(Bucket="bucket", Key=key, Body=b"X" + data[1:])
    assert publish(run / "artifact", run, place.address, "small").blobs_written == receipt.blobs_written
    assert pull(place.address, "small", tmp_path / "out").digest == receipt.digest


def test_an_index_that_is_gone_is_damage(run: Path, place: Place, store: Store) -> None:
    publish(run / "artifact", run, place.address, "small")
    store.client().delete_object(Bucket="bucket", Key=f"{PREFIX}index.json")
    with pytest.raises(IntegrityError, match="damaged"):
        publish(run / "artifact", run, place.address, "small")


def test_prefixes_that_are_no_registry(place: Place, store: Store) -> None:
    with pytest.raises(UsageError, match="no registry here"):
        open_registry(place.address)
    store.client().put_object(Bucket="bucket", Key=f"{PREFIX}notes.txt", Body=b"mine")
    for ask in (create_registry, check_registry):
        with pytest.raises(UsageError, match="not empty"):
            ask(place.address)
    for prefix in ("a//b", "a/../b", "ä", "a b"):
        with pytest.raises(UsageError, match="cannot be a prefix"):
            create_registry(f"s3://bucket/{prefix}")
    with pytest.raises(UsageError, match="there is no bucket 'other-bucket'"):
        check_registry("s3://other-bucket/models")
    with pytest.raises(UsageError, match="Invalid bucket name"):
        check_registry("s3://No_Bucket!/models")


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (ACCESS_DENIED, AccessDeniedError, "access denied .*s3:PutObject"),
        ((403, "InvalidAccessKeyId"), AccessDeniedError, "access denied"),
        (CLOCK_SKEW, AssayError, "this machine's clock .* Set the clock"),
        (SLOW_DOWN, UnreachableError, "SlowDown.*may work later"),
        ((400, "AuthorizationHeaderMalformed"), UsageError, "another region .* Set AWS_REGION"),
    ],
)
def test_what_a_store_refuses_is_explained(
    place: Place, store: Store, answer: tuple[int, str], kind: type[AssayError], message: str
) -> None:
    store.before = lambda method, path, query: answer
    for ask in (check_registry, create_registry, open_registry):
        with pytest.raises(kind, match=message) as refused:
            ask(place.address)
        assert "secret" not in str(refused.value)


def test_a_store_that_is_not_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match="does not answer"):
        check_registry(place.address)


def test_no_credentials(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # Who asked before is remembered for the life of a process.
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with pytest.raises(AccessDeniedError, match=r"no credentials .* Set AWS_ACCESS_KEY_ID"):
        check_registry(place.address)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UsageError, match="nobody"):
        check_registry(place.address)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(s3, "import_module", absent)
    with pytest.raises(UsageError, match=r"pip install 'assay\[s3\]'"):
        open_registry("s3://bucket/models")
