"""A small finished run on disk, a registry, and disks that are full or read-only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_run import RECIPE, write_artifact, write_evidence, write_proof, write_verdict
from oci_server import MEMORY, MISSING, PROGRAM, OciServer, running_oci_server

from assay.files import readable_json, sha256_file
from assay.registry import transport

MODEL_FILES = {
    "model.onnx": b"graph",
    "model.onnx.data": bytes(range(256)) * 16,
    "tokenizer.json": b"{}",
    "genai_config.json": b'{"model":{}}',
    "README.md": b"# A model\n",
}
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Make a finished run: make_run("name", verdict="PASS", files={…}, about={…}, note="…")."""

    def make(
        name: str = "run",
        *,
        verdict: str = "PASS",
        files: dict[str, bytes] | None = None,
        about: dict[str, Any] | None = None,
        recipe: str = RECIPE,
        note: str = "",
    ) -> Path:
        run = tmp_path / name
        write_artifact(run / "artifact", MODEL_FILES if files is None else files, about, recipe)
        write_proof(run, verdict, note)
        return run

    return make


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    return make_run()


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "store"


def assert_sound(registry: Path) -> None:
    """Every blob is what its name says, and everything that the index names is there."""
    from assay.registry.layout import Layout
    from assay.registry.oci import parse_manifest

    layout = Layout.open(registry)
    for path in (registry / "blobs/sha256").iterdir():
        assert sha256_file(path) == f"sha256:{path.name}"
    for entry in layout.index().entries:
        manifest = parse_manifest(layout.repository("any").read_manifest(entry.descriptor), "test")
        for blob in (manifest.config, *manifest.layers, *([manifest.subject] if manifest.subject else [])):
            layout.copy_blob(blob, None)


@pytest.fixture(scope="session")
def oci_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OciServer]:
    """Debian's docker-registry, one for all tests: each takes a path of its own."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory, running_oci_server(Path(directory)) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    monkeypatch.setattr(transport, "BASE_SECONDS", 0.002)


@pytest.fixture(scope="session")
def helpers(snapshot: Any) -> Any:
    """The functions of this file, which test files cannot import under importlib mode."""
    from types import SimpleNamespace

    return SimpleNamespace(
        assert_sound=assert_sound, snapshot=snapshot, write_verdict=write_verdict, write_evidence=write_evidence
    )


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a killed process leaves the same there, and syncing takes no time."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def small_disk(make_disk: Callable[[int], Any]) -> Callable[[int], Path]:
    """Mount a memory file system of some bytes; skips where mounting is not allowed."""
    return lambda size_bytes: make_disk(size_bytes).place


@pytest.fixture
def read_only(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory that cannot be written, by root neither."""
    if os.geteuid() != 0:
        place = tmp_path / "read-only"
        place.mkdir()
        place.chmod(0o555)
        yield place
        place.chmod(0o755)
        return
    disk = request.getfixturevalue("make_disk")(1 << 20)
    disk.make_read_only()
    yield disk.place


@pytest.fixture
def read_only_registry(run: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A registry with small:latest in it, on a disk that is read-only from then on."""
    from assay.registry.publish import publish

    if os.geteuid() != 0:
        store = tmp_path / "read-only-store"
        publish(run / "artifact", run, store, "small")
        store.chmod(0o555)
        (store / ".partial").chmod(0o555)
        yield store
        store.chmod(0o755)
        (store / ".partial").chmod(0o755)
        return
    disk = request.getfixturevalue("make_disk")(4 << 20)
    publish(run / "artifact", run, disk.place / "store", "small")
    disk.make_read_only()
    yield disk.place / "store"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """An Ed25519 key by the name of its owner: `.signer`, `.key_id`, and the files `.private` and `.public`."""
    from types import SimpleNamespace

    from assay.registry.keys import write_key_pair
    from assay.registry.signing import load_signer

    place = tmp_path_factory.mktemp("keys")
    made: dict[str, Any] = {}

    def make(owner: str) -> Any:
        if owner not in made:
            files = write_key_pair(place / owner, "ed25519", None)
            made[owner] = SimpleNamespace(**vars(files), signer=load_signer(str(files.private)))
        return made[owner]

    return make


@pytest.fixture
def publish_signed(registry: Path, keys: Callable[[str], Any]) -> Callable[..., Any]:
    """Publish a run as `small` with its statements: publish_signed(run, "ci", tags=("latest",)); by nobody without an owner."""
    from assay.registry.attestations import attest
    from assay.registry.publish import publish

    def make(
        run: Path, owner: str | None = "ci", tags: tuple[str, ...] = ("latest",), name: str = "small", **options: Any
    ) -> Any:
        artifact, by = run / "artifact", keys(owner).signer if owner else None
        to = options.pop("registry", registry)
        return publish(
            artifact, run, to, name, tags, attach=lambda judged: attest(artifact, run, judged, by), **options
        )

    return make


@pytest.fixture
def policy(tmp_path: Path, keys: Callable[[str], Any]) -> Path:
    """A policy: ci signs test results and provenance of small, release promotes into production; other names are other's."""
    signers = {owner: {"pem": keys(owner).public.read_text()} for owner in ("ci", "release", "other")}
    rules = [
        {
            "names": ["small"],
            "require": [{"type": "test-result", "signers": ["ci"]}, {"type": "provenance", "signers": ["ci"]}],
            "channels": {"production": {"signers": ["release"]}},
        },
        {"names": ["other"], "require": [{"type": "test-result", "signers": ["other"]}]},
    ]
    path = tmp_path / "policy.yaml"
    path.write_bytes(readable_json({"version": 1, "signers": signers, "rules": rules}))  # JSON is YAML
    return path
