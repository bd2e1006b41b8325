"""Signatures, policies and channels wherever a registry is: each test runs against each backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry_places import PLACES, Place

from assay.errors import IntegrityError, NotSupportedError, SignatureError, UsageError
from assay.registry.channels import promote, rollback
from assay.registry.collecting import collect, remove
from assay.registry.differences import diff
from assay.registry.inspection import list_artifacts, show, verify
from assay.registry.pull import pull, resolve
from assay.registry.tags import set_tag, untag

MakeRun = Callable[..., Path]
Publish = Callable[..., Any]
Keys = Callable[[str], Any]

# huggingface_hub 2.4 uploads by an argument that its HTTP client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture(params=list(PLACES))
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with PLACES[request.param](tmp_path, monkeypatch) as made:
        yield made


@pytest.mark.slow
def test_a_channel_goes_forth_and_back(
    make_run: MakeRun, publish_signed: Publish, place: Place, policy: Path, keys: Keys
) -> None:
    address, signer = place.address, keys("release").signer
    one, two = (
        publish_signed(make_run(tag, files={"model.onnx": tag.encode()}), tags=(f"{tag}.0",), registry=address)
        for tag in "12"
    )
    promote(address, "small:1.0", "production", policy=policy, signer=signer)
    done = promote(address, "small:2.0", "production", policy=policy, signer=signer)
    assert (done.sequence, done.digest, done.previous) == (2, two.digest, one.digest)
    assert not promote(address, "small:2.0", "production", policy=policy, signer=signer).created
    receipt = pull(address, "small:production", policy.parent / "out", policy=policy)
    assert receipt.trusted and receipt.trusted[-1].type == "promotion into production"
    with pytest.raises(SignatureError, match="who may not sign a promotion"):
        promote(address, "small:1.0", "production", policy=policy, signer=keys("ci").signer)
    assert rollback(address, "small", "production", policy=policy, signer=signer).digest == one.digest
    assert verify(address, "small:production", policy).digest == one.digest
    promoted = [said.promotion for said in show(address, "small:1.0").attestations if said.promotion]
    assert [change.action for change in promoted] == ["promote", "rollback"]
    assert next(row.promoted for row in list_artifacts(address) if row.tag == "production") == ("production",)
    with pytest.raises(UsageError, match="no earlier promotion"):
        rollback(address, "small", "production", policy=policy, signer=signer)
    with pytest.raises(UsageError, match="is a channel"):
        set_tag(address, "small:2.0", "production")
    assert set_tag(address, "small:2.0", "stable").digest == two.digest
    assert [file.name for file in diff(address, "small:1.0", "small:stable").files] == ["model.onnx"]


def test_the_policy_comes_before_every_blob(run: Path, publish_signed: Publish, place: Place, policy: Path) -> None:
    publish_signed(run, "release", registry=place.address)
    pack = resolve(place.address, "small").pack
    for layer in (pack.config, *pack.layers.values()):
        if layer.size > 2:  # the empty config of attachments has the bytes of tokenizer.json
            place.replace(layer.digest, b"?" * layer.size)
    with pytest.raises(SignatureError, match="is signed by release, who may not sign a test-result of small"):
        pull(place.address, "small", policy.parent / "out", policy=policy)
    with pytest.raises(IntegrityError):
        pull(place.address, "small", policy.parent / "out")
    assert not (policy.parent / "out").exists()


def test_a_tampered_statement(run: Path, publish_signed: Publish, place: Place, policy: Path) -> None:
    receipt = publish_signed(run, registry=place.address)
    resolved = resolve(place.address, "small")
    assert verify(place.address, "small", policy).trusted
    for found in resolved.repository.referrers(receipt.digest):
        if found.digest == receipt.attestations[0]:
            data = resolved.repository.read_manifest(found)
            place.replace(found.digest, data.replace(b"in-toto.io", b"in-to-to.io"))
    with pytest.raises(IntegrityError):
        verify(place.address, "small", policy)


def test_what_is_removed_is_removed_in_directories(run: Path, publish_signed: Publish, place: Place) -> None:
    receipt = publish_signed(run, registry=place.address)
    steps: tuple[Callable[[], object], ...] = (
        lambda: untag(place.address, "small:latest"),
        lambda: remove(place.address, f"small@{receipt.digest}"),
        lambda: collect(place.address, 0),
    )
    for step in steps:
        if place.server is None:
            step()
        else:
            with pytest.raises(NotSupportedError, match="in registry directories only"):
                step()
    assert bool(list_artifacts(place.address)) == (place.server is not None)
