"""Places where a registry can be, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from fault_proxy import running_fault_proxy
from hub_server import Hub, running_hub
from oci_server import MEMORY, MISSING, PROGRAM, running_oci_server
from s3_server import Store, running_store

from assay.files import sha256_bytes

TOKEN = "hf_token_of_the_tests"


@dataclass(frozen=True)
class Place:
    """An address that can be published to.

    replace: puts other bytes where the bytes of a digest are kept.  before: a function to call before each request of a
    registry on a server, or None.
    """

    address: str
    replace: Callable[[str, bytes], None]
    before: Callable[[Callable[[], Any] | None], None] | None
    server: Any


@contextmanager
def directory_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    store = tmp_path / "place"

    def replace(digest: str, data: bytes) -> None:
        (store / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(data)

    yield Place(str(store), replace, None, None)


@contextmanager
def s3_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with running_store() as store:
        for key, value in store.environment().items():
            monkeypatch.setenv(key, value)
        client = store.client()
        client.create_bucket(Bucket="bucket")

        def replace(digest: str, data: bytes) -> None:
            key = f"team/models/blobs/sha256/{digest.removeprefix('sha256:')}"
            client.put_object(Bucket="bucket", Key=key, Body=data)

        def before(call: Callable[[], Any] | None) -> None:
            store.before = (lambda *_: call()) if call else None

        yield Place("s3://bucket/team/models", replace, before, store)


@contextmanager
def oci_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """docker-registry behind a proxy that counts the requests."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    with (
        TemporaryDirectory(dir=MEMORY) as directory,
        running_oci_server(Path(directory)) as server,
        running_fault_proxy(server.host) as proxy,
    ):

        def before(call: Callable[[], Any] | None) -> None:
            proxy.plan = (lambda _: call()) if call else (lambda _: None)

        yield Place(
            f"oci://{proxy.host}/team/models",
            lambda digest, data: server.blob(digest).write_bytes(data),
            before,
            server,
        )


@contextmanager
def hub_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with running_hub() as hub:
        hub.token = TOKEN
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for constant, value in (
            ("HF_HUB_OFFLINE", False),
            ("ENDPOINT", hub.url),
            ("HF_HUB_DISABLE_XET", True),
            ("HF_HUB_DISABLE_TELEMETRY", True),
        ):
            monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)

        kept: dict[str, list[tuple[dict[str, bytes], str]]] = {}

        def replace(digest: str, data: bytes) -> None:
            """Rewrite history, as nobody but the Hub could."""
            commits = [files for repository in hub.repositories for files in repository.commits.values()]
            places = [(files, path) for files in commits for path in files if sha256_bytes(files[path]) == digest]
            for files, path in kept.setdefault(digest, places):
                files[path] = data

        def before(call: Callable[[], Any] | None) -> None:
            hub.before = (lambda *_: call()) if call else None

        yield Place("hf://team", replace, before, hub)


def files_of(hub: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    """The files of a repository at a branch, a tag or a commit."""
    found = hub.find(name)
    return found.commits[found.refs.get(revision, revision)]


def objects_of(store: Store, prefix: str) -> dict[str, bytes]:
    """The objects below a prefix, by key."""
    client = store.client()
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", ())]
    return {key: client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}


PLACES = {"directory": directory_place, "oci": oci_place, "s3": s3_place, "hf": hub_place}
