"""What goes and what stays, whoever publishes meanwhile, and whenever a collection or a promotion is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import start

from assay.errors import AssayError, IntegrityError, NotSupportedError, UsageError
from assay.files import canonical_json, sha256_bytes
from assay.registry.channels import promote, rollback
from assay.registry.collecting import collect, remove, seconds_of
from assay.registry.inspection import list_artifacts, verify
from assay.registry.layout import Layout
from assay.registry.oci import INDEX_TYPE, MANIFEST_TYPE, describe
from assay.registry.pull import resolve
from assay.registry.tags import untag

MakeRun = Callable[..., Path]
Publish = Callable[..., Any]


def blobs(registry: Path) -> set[str]:
    return {path.name for path in (registry / "blobs/sha256").iterdir()}


@pytest.fixture
def pair(make_run: MakeRun, publish_signed: Publish) -> tuple[Any, Any]:
    """Two published artifacts, tagged 1 and 2, that share most of their files."""
    return tuple(
        publish_signed(make_run(f"run{tag}", files={"model.onnx": tag.encode(), "a.json": b"[]"}), tags=(tag,))
        for tag in "12"
    )  # pyright: ignore[reportReturnType]


def test_nothing_that_is_named_goes(pair: tuple[Any, Any], registry: Path, helpers: Any) -> None:
    promote(registry, "small:1", "production")
    promote(registry, "small:2", "production")
    untag(registry, "small:1")
    before = helpers.snapshot(registry)
    found = collect(registry, 0)
    assert (found.removed, found.young, found.kept) == ((), 0, len(blobs(registry)))
    assert helpers.snapshot(registry) == before
    assert rollback(registry, "small", "production").digest == pair[0].digest


def test_what_was_removed_goes_and_what_it_shared_stays(pair: tuple[Any, Any], registry: Path, helpers: Any) -> None:
    one, two = pair
    removed = resolve(registry, "small:1").pack.layers
    untag(registry, "small:1")
    done = remove(registry, f"small@{one.digest}")
    assert done.digest == one.digest and [row.digest for row in list_artifacts(registry)] == [two.digest]
    assert collect(registry, 3600).removed == ()
    planned = collect(registry, 0, dry_run=True)
    before = blobs(registry)
    found = collect(registry, 0)
    assert found.removed == planned.removed and {digest[7:] for digest in found.removed} == before - blobs(registry)
    assert removed["model.onnx"].digest in found.removed and removed["a.json"].digest not in found.removed
    assert {one.digest, one.evidence_digest, *one.attestations} <= set(found.removed)
    helpers.assert_sound(registry)
    assert verify(registry, "small:2") and collect(registry, 0).removed == ()


def test_a_dry_run_changes_nothing(pair: tuple[Any, Any], registry: Path, helpers: Any) -> None:
    (registry / "blobs/sha256" / ("0" * 64)).write_bytes(b"loose")
    before = helpers.snapshot(registry)
    assert collect(registry, 0, dry_run=True).removed == (f"sha256:{'0' * 64}",)
    assert helpers.snapshot(registry) == before


def test_what_is_no_blob_is_left_alone(pair: tuple[Any, Any], registry: Path) -> None:
    stranger = registry / "blobs/sha256/oci-put-blob1234"
    stranger.write_bytes(b"of another tool at work")
    assert collect(registry, 0).removed == () and stranger.exists()


def test_the_grace_period(pair: tuple[Any, Any], registry: Path) -> None:
    path = registry / "blobs/sha256" / ("0" * 64)
    path.write_bytes(b"loose")
    found = collect(registry, 60)
    assert (found.removed, found.young) == ((), 1)
    os.utime(path, (time.time() - 61,) * 2)
    assert collect(registry, 60).removed == (f"sha256:{'0' * 64}",) and not path.exists()


def test_a_blob_that_is_published_again_is_young_again(
    make_run: MakeRun, registry: Path, publish_signed: Publish
) -> None:
    run = make_run()
    receipt = publish_signed(run)
    untag(registry, "small:latest")
    remove(registry, f"small@{receipt.digest}")
    for name in blobs(registry):
        os.utime(registry / "blobs/sha256" / name, (time.time() - 90_000,) * 2)
    layout = Layout.open(registry)
    assert not layout.put_file(run / "artifact/model.onnx", resolve_layer(run, "model.onnx"))
    removed = collect(registry, 86_400).removed
    assert len(removed) > 10 and resolve_layer(run, "model.onnx").digest not in removed


def resolve_layer(run: Path, name: str) -> Any:
    from assay.registry.modelpack import build_pack

    return build_pack(run / "artifact")[0].layers[name]


def test_what_is_named_is_there(make_run: MakeRun, registry: Path, publish_signed: Publish, helpers: Any) -> None:
    """A collection between the blobs and the index, without a grace period, is noticed, and nothing is named."""
    run = make_run()
    publish_signed(make_run("other", files={"model.onnx": b"other"}))
    original = Layout.change
    index = (registry / "index.json").read_bytes()

    def collect_first(layout: Layout, decide: Any) -> None:
        collect(registry, 0)
        original(layout, decide)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, "change", collect_first)
        with pytest.raises(AssayError, match=r"was collected before it was named.* Run the same command again"):
            publish_signed(run, tags=("2.0",))
    assert (registry / "index.json").read_bytes() == index
    publish_signed(run, tags=("2.0",))
    assert verify(registry, "small:2.0")
    helpers.assert_sound(registry)


def test_what_other_tools_named_stays(pair: tuple[Any, Any], registry: Path) -> None:
    """An index that another tool put in, and a manifest that only that index leads to."""
    layout = Layout.open(registry)
    config = canonical_json({"other": "tool"})
    manifest = canonical_json(
        {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": describe(config, "x").to_json(), "layers": []}
    )
    nested = canonical_json({"schemaVersion": 2, "manifests": [describe(manifest, MANIFEST_TYPE).to_json()]})
    for data in (config, manifest, nested):
        layout.put_bytes(data, "x")
    index = json.loads((registry / "index.json").read_bytes())
    index["manifests"].append(describe(nested, INDEX_TYPE).to_json())
    (registry / "index.json").write_bytes(canonical_json(index))
    assert collect(registry, 0).removed == ()


def test_a_damaged_manifest_stops_a_collection(pair: tuple[Any, Any], registry: Path) -> None:
    (registry / "blobs/sha256" / ("0" * 64)).write_bytes(b"loose")
    path = registry / "blobs/sha256" / pair[0].evidence_digest[7:]
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    before = blobs(registry)
    with pytest.raises(IntegrityError, match=path.name):
        collect(registry, 0)
    assert blobs(registry) == before


def test_removing_is_refused(pair: tuple[Any, Any], registry: Path, helpers: Any) -> None:
    one, two = pair
    for reference in ("small:1", one.digest):
        with pytest.raises(UsageError, match="write NAME@sha256:DIGEST"):
            remove(registry, reference)
    with pytest.raises(UsageError, match=r"is tagged 1\. Take the tags away first: `assay untag small:1`"):
        remove(registry, f"small@{one.digest}")
    promote(registry, "small:1", "production")
    promote(registry, "small:2", "production")
    untag(registry, "small:1")
    before = helpers.snapshot(registry)
    with pytest.raises(UsageError, match="was promoted into production, and a rollback may go back to it"):
        remove(registry, f"small@{one.digest}")
    assert helpers.snapshot(registry) == before
    assert remove(registry, f"small@{one.digest}", force=True)
    with pytest.raises(UsageError, match=f"there is no small@{one.digest}"):
        rollback(registry, "small", "production")
    assert two.digest == verify(registry, "small:production").digest


def test_an_artifact_of_two_names(run: Path, registry: Path, publish_signed: Publish) -> None:
    receipt = publish_signed(run, tags=())
    publish_signed(run, "other", name="other", tags=())
    remove(registry, f"small@{receipt.digest}")
    assert collect(registry, 0).removed == ()
    assert verify(registry, f"other@{receipt.digest}")
    remove(registry, f"other@{receipt.digest}")
    collect(registry, 0)
    assert blobs(registry) == set()


@pytest.mark.parametrize(("text", "seconds"), [("0s", 0), ("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604800)])
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1.5h", "1 h", "1w", "9999999999s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration; write a number and s, m, h or d"):
        seconds_of(text)


def test_a_server_collects_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere:
        location = "oci://registry.example/team"

    monkeypatch.setattr("assay.registry.collecting.open_registry", lambda _: Elsewhere())
    with pytest.raises(
        NotSupportedError, match=r"Assay collects in registry directories only\. A server collects its own garbage"
    ):
        collect("oci://registry.example/team", 0)


def until_it_works(work: Callable[[], object]) -> None:
    """What the message asks for: run the same command again."""
    while True:
        try:
            work()
            return
        except AssayError as error:
            if "Run the same command again" not in str(error):
                raise


@pytest.mark.slow
def test_collections_and_promotions_killed_at_thirty_moments(
    make_run: MakeRun, quick_path: Path, publish_signed: Publish, helpers: Any
) -> None:
    """While another process publishes; without a grace period, which is worse than any user should do."""
    store, chance = quick_path / "store", random.Random(20261201)
    runs = [make_run(f"run{number}", files={"model.onnx": bytes([number]) * 3000}) for number in range(4)]
    for number in (0, 1):
        publish_signed(runs[number], tags=(f"keep{number}",), registry=store)
    promote(store, "small:keep0", "production")
    killed = 0
    for moment in range(30):
        loose = publish_signed(runs[2], tags=(), registry=store)
        remove(store, f"small@{loose.digest}")

        def collecting() -> None:
            while True:
                collect(store, 0)

        def promoting() -> None:
            while True:
                for number in (1, 0):
                    until_it_works(lambda number=number: promote(store, f"small:keep{number}", "production"))

        def publishing(moment: int = moment) -> None:
            until_it_works(lambda: publish_signed(runs[3], tags=(f"moment{moment}",), registry=store))

        victims, publisher = [start(collecting), start(promoting)], start(publishing)
        time.sleep(chance.uniform(0.005, 0.15))
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
            killed += os.waitpid(victim, 0)[1] == signal.SIGKILL
        assert os.waitpid(publisher, 0)[1] == 0
        helpers.assert_sound(store)
        found = list_artifacts(store)
        assert not any(row.problem for row in found)
        assert {row.tag for row in found} == {
            "keep0",
            "keep1",
            "production",
            *(f"moment{n}" for n in range(moment + 1)),
        }
        assert verify(store, "small:production").digest in {
            row.digest for row in found if row.tag in ("keep0", "keep1")
        }
        # The next commands work, and clear away what the killed ones left.
        promote(store, f"small:keep{moment % 2}", "production")
        assert collect(store, 0).young == 0 and list((store / ".partial").iterdir()) == []
    assert killed == 60
    assert sha256_bytes(bytes([2]) * 3000)[7:] not in blobs(store)
    assert rollback(store, "small", "production").created
