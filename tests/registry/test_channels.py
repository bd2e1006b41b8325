"""Promotion and rollback: what is checked, what is recorded, who may, and which way back there is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.errors import IntegrityError, PublishRefusedError, SignatureError, UsageError
from assay.files import canonical_json
from assay.registry.channels import Moved, promote, promotions, rollback
from assay.registry.inspection import list_artifacts, show, verify
from assay.registry.layout import Layout
from assay.registry.pull import pull, resolve

MakeRun = Callable[..., Path]
Publish = Callable[..., Any]
Keys = Callable[[str], Any]


@pytest.fixture
def three(make_run: MakeRun, publish_signed: Publish) -> tuple[str, ...]:
    """Digests of three published artifacts, tagged 1, 2 and 3."""
    return tuple(
        publish_signed(make_run(f"run{tag}", files={"model.onnx": tag.encode()}), tags=(tag,)).digest for tag in "123"
    )


def production(registry: Path) -> str:
    return next(row.digest for row in list_artifacts(registry) if row.tag == "production")


def damage(registry: Path, reference: str) -> None:
    layer = resolve(registry, reference).pack.layers["model.onnx"]
    Layout.open(registry).blob_path(layer).write_bytes(b"?")


def test_a_promotion_is_recorded(three: tuple[str, ...], registry: Path, policy: Path, keys: Keys) -> None:
    done = promote(registry, "small:1", "production", policy=policy, signer=keys("release").signer)
    assert (done.action, done.sequence, done.digest, done.previous) == ("promote", 1, three[0], None)
    assert done.created and done.signed and done.trusted
    assert production(registry) == three[0]
    (record,) = [said for said in show(registry, "small:1").attestations if said.kind == "promotion"]
    assert record.digest == done.record and record.signers == (keys("release").key_id,)
    assert record.promotion and record.promotion.time
    statement = json.loads(promotions_of(registry, "small:1")[0])
    assert statement["predicate"]["policy"]["uri"] == "urn:assay:policy:policy.yaml"
    assert len(statement["predicate"]["inputAttestations"]) == 3  # the evidence, the test result, the provenance


def promotions_of(registry: Path, reference: str) -> list[bytes]:
    resolved = resolve(registry, reference)
    found = promotions(resolved.repository, resolved.descriptor)
    return [record.attestation.opened.payload for record in found if record.attestation.opened]


def test_promoting_again_changes_nothing(
    three: tuple[str, ...], registry: Path, policy: Path, keys: Keys, helpers: Any
) -> None:
    signer = keys("release").signer
    first = promote(registry, "small:1", "production", policy=policy, signer=signer)
    before = helpers.snapshot(registry)
    again = promote(registry, "small:1", "production", policy=policy, signer=signer)
    assert (again.created, again.record) == (False, first.record) and helpers.snapshot(registry) == before


def test_a_promoted_artifact_is_pulled_through_its_channel(
    three: tuple[str, ...], registry: Path, policy: Path, keys: Keys, tmp_path: Path
) -> None:
    promote(registry, "small:1", "production", policy=policy, signer=keys("release").signer)
    receipt = pull(registry, "small:production", tmp_path / "out", policy=policy)
    assert receipt.trusted and receipt.trusted[-1].signers == ("release",)
    move_tag(registry, three[1])
    with pytest.raises(SignatureError, match="needs a promotion into production signed by release; none was found"):
        pull(registry, "small:production", tmp_path / "other", policy=policy)


def test_a_digest_can_be_asked_for_its_channel(
    three: tuple[str, ...], registry: Path, policy: Path, keys: Keys
) -> None:
    promote(registry, "small:1", "production", policy=policy, signer=keys("release").signer)
    promote(registry, "small:2", "production", policy=policy, signer=keys("release").signer)
    for digest in three[:2]:
        trusted = verify(registry, f"small@{digest}", policy, "production").trusted
        assert trusted and trusted[-1].type == "promotion into production"
    with pytest.raises(SignatureError, match="needs a promotion into production"):
        verify(registry, f"small@{three[2]}", policy, "production")
    with pytest.raises(SignatureError, match="nobody may promote small into 'staging'"):
        verify(registry, f"small@{three[0]}", policy, "staging")


def move_tag(registry: Path, digest: str) -> None:
    """Move production in the index itself, as somebody with access to the directory can."""
    index = json.loads((registry / "index.json").read_bytes())
    for entry in index["manifests"]:
        if entry["annotations"].get("org.opencontainers.image.ref.name") == "small:production":
            entry["digest"] = digest
    (registry / "index.json").write_bytes(canonical_json(index))


@pytest.mark.parametrize(
    ("owner", "channel", "reason"),
    [
        ("ci", "production", "is signed by ci, who may not sign a promotion into production of small"),
        (None, "production", "is not signed"),
        ("stranger", "production", "is signed by a key that the policy does not have"),
        ("release", "staging", "nobody may promote small into 'staging'"),
    ],
)
def test_who_may_not_promote_changes_nothing(
    three: tuple[str, ...],
    request: pytest.FixtureRequest,
    owner: str | None,
    channel: str,
    reason: str,
) -> None:
    registry, policy, helpers = (request.getfixturevalue(name) for name in ("registry", "policy", "helpers"))
    signer = request.getfixturevalue("keys")(owner).signer if owner else None
    before = helpers.snapshot(registry)
    with pytest.raises(SignatureError, match=reason):
        promote(registry, "small:1", channel, policy=policy, signer=signer)
    assert {name: about for name, about in helpers.snapshot(registry).items() if ".lock" not in name} == {
        name: about for name, about in before.items() if ".lock" not in name
    }


def test_what_does_not_verify_is_not_promoted(three: tuple[str, ...], registry: Path) -> None:
    damage(registry, "small:1")
    with pytest.raises(IntegrityError, match="promised"):
        promote(registry, "small:1", "production")
    with pytest.raises(UsageError, match="'v2' reads as a version"):
        promote(registry, "small:2", "v2")
    with pytest.raises(UsageError, match="cannot be a tag"):
        promote(registry, "small:2", "a b")
    with pytest.raises(UsageError, match="there is no small:9"):
        promote(registry, "small:9", "production")
    assert all(row.tag != "production" for row in list_artifacts(registry))


def test_a_promotion_without_a_pass(registry: Path, run: Path, publish_signed: Publish) -> None:
    publish_signed(run)
    index = json.loads((registry / "index.json").read_bytes())
    index["manifests"] = [entry for entry in index["manifests"] if "evidence" not in entry.get("artifactType", "")]
    (registry / "index.json").write_bytes(canonical_json(index))
    with pytest.raises((IntegrityError, PublishRefusedError), match="has no evidence"):
        promote(registry, "small", "production")


def test_the_way_back(three: tuple[str, ...], registry: Path, policy: Path, keys: Keys, helpers: Any) -> None:
    """1, 2, back to 1, 3: from 3 back to 1, and from there nowhere; 2, which was rolled back from, is not returned to."""
    signer = keys("release").signer

    def there(tag: str) -> Moved:
        return promote(registry, f"small:{tag}", "production", policy=policy, signer=signer)

    def back() -> Moved:
        return rollback(registry, "small", "production", policy=policy, signer=signer)

    there("1")
    assert there("2").previous == three[0]
    done = back()
    assert (done.action, done.sequence, done.digest, done.previous) == ("rollback", 3, three[0], three[1])
    assert production(registry) == three[0]
    assert (there("3").sequence, back().digest) == (4, three[0])
    with pytest.raises(UsageError, match="no earlier promotion is recorded"):
        back()
    assert production(registry) == three[0]
    there("2")
    there("3")
    assert [back().digest, back().digest] == [three[1], three[0]]
    assert pull(registry, "small:production", registry.parent / "out", policy=policy).digest == three[0]
    helpers.assert_sound(registry)


def test_a_rollback_passes_over_what_does_not_verify(
    three: tuple[str, ...], registry: Path, policy: Path, keys: Keys
) -> None:
    signer = keys("release").signer
    for tag in "123":
        promote(registry, f"small:{tag}", "production", policy=policy, signer=signer)
    damage(registry, "small:2")
    done = rollback(registry, "small", "production", policy=policy, signer=signer)
    assert done.digest == three[0] and done.previous == three[2]
    assert [digest for digest, _ in done.skipped] == [three[1]] and "promised" in done.skipped[0][1]


def test_nothing_to_go_back_to_verifies(three: tuple[str, ...], registry: Path) -> None:
    for tag in "12":
        promote(registry, f"small:{tag}", "production")
    damage(registry, "small:1")
    with pytest.raises(IntegrityError, match=f"nothing that was here before verifies. {three[0]}: "):
        rollback(registry, "small", "production")
    assert production(registry) == three[1]


def test_forged_history_is_not_followed(three: tuple[str, ...], registry: Path, policy: Path, keys: Keys) -> None:
    """A record by somebody who may not promote leads a rollback nowhere, whatever its number."""
    promote(registry, "small:1", "production", policy=policy, signer=keys("release").signer)
    promote(registry, "small:2", "production", policy=policy, signer=keys("release").signer)
    promote(registry, "small:3", "production", signer=keys("stranger").signer)
    promote(registry, "small:2", "production", signer=keys("stranger").signer)
    done = rollback(registry, "small", "production", policy=policy, signer=keys("release").signer)
    assert done.digest == three[0]


def test_a_signature_is_added_to_an_unsigned_record(three: tuple[str, ...], registry: Path, keys: Keys) -> None:
    promote(registry, "small:1", "production")
    first = promote(registry, "small:2", "production")
    assert not first.signed and not promote(registry, "small:2", "production").created
    signed = promote(registry, "small:2", "production", signer=keys("release").signer)
    assert signed.created and signed.signed and signed.previous == three[0]
    assert rollback(registry, "small", "production").digest == three[0]
    # And of a rollback: it stays one, so that the next does not return to what was left.
    again = promote(registry, "small:1", "production", signer=keys("release").signer)
    assert (again.action, again.created) == ("rollback", True)
    with pytest.raises(UsageError, match="no earlier promotion"):
        rollback(registry, "small", "production")


def test_a_plain_tag_becomes_a_channel(three: tuple[str, ...], registry: Path, publish_signed: Publish) -> None:
    from assay.registry.tags import set_tag

    set_tag(registry, "small:1", "production")
    done = promote(registry, "small:2", "production")
    assert (done.sequence, done.previous) == (1, three[0])
    # What was never promoted was never checked as one that was.
    with pytest.raises(UsageError, match="no earlier promotion"):
        rollback(registry, "small", "production")


def test_channels_are_apart(three: tuple[str, ...], registry: Path) -> None:
    promote(registry, "small:1", "staging")
    promote(registry, "small:1", "production")
    assert promote(registry, "small:2", "staging").sequence == 2
    with pytest.raises(UsageError, match="no earlier promotion"):
        rollback(registry, "small", "production")
    assert rollback(registry, "small", "staging").digest == three[0]
    assert next(row.promoted for row in list_artifacts(registry) if row.tag == "1") == ("production", "staging")


@pytest.mark.parametrize("name", ["small:production", "small@sha256:" + "0" * 64])
def test_a_rollback_wants_a_name(three: tuple[str, ...], registry: Path, name: str) -> None:
    with pytest.raises(UsageError, match="give the name alone"):
        rollback(registry, name, "production")


def test_a_rollback_of_no_channel(three: tuple[str, ...], registry: Path) -> None:
    with pytest.raises(UsageError, match="there is no small:production"):
        rollback(registry, "small", "production")
    with pytest.raises(UsageError, match="no earlier promotion"):
        rollback(registry, "small", "1")


def test_promotions_at_once_make_one_history(three: tuple[str, ...], registry: Path) -> None:
    workers = [threading.Thread(target=promote, args=(registry, f"small:{tag}", "production")) for tag in "123"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = [json.loads(payload)["predicate"] for tag in "123" for payload in promotions_of(registry, f"small:{tag}")]
    assert sorted(record["assay_sequence"] for record in found) == [1, 2, 3]
    assert verify(registry, "small:production").digest == production(registry)
    assert len({rollback(registry, "small", "production").digest for _ in range(2)} | {production(registry)}) == 2
