"""What a publish says, and that a policy is met before anything of the model is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from assay.errors import IntegrityError, SignatureError, UsageError
from assay.files import canonical_json, sha256_bytes
from assay.registry.attestations import attest, read_attestations
from assay.registry.base import Attachment, part
from assay.registry.inspection import list_artifacts, show, verify, verify_directory, verify_pulled
from assay.registry.layout import Layout
from assay.registry.oci import IN_TOTO_TYPE, describe
from assay.registry.publish import publish
from assay.registry.pull import pull, resolve
from assay.registry.statements import configured

MakeRun = Callable[..., Path]
Publish = Callable[..., Any]
Keys = Callable[[str], Any]


def statements(registry: Path, reference: str = "small") -> dict[str, Any]:
    resolved = resolve(registry, reference)
    found = read_attestations(resolved.repository, resolved.descriptor)
    return {attestation.opened.statement.kind: attestation.opened for attestation in found if attestation.opened}


def blob(registry: Path, digest: str) -> Path:
    return registry / "blobs/sha256" / digest.removeprefix("sha256:")


def test_a_publish_says_three_things(run: Path, registry: Path, publish_signed: Publish, keys: Keys) -> None:
    receipt = publish_signed(run)
    assert receipt.signer == keys("ci").key_id and len(receipt.attestations) == 3
    found = statements(registry)
    assert list(found) == ["test-result", "provenance", "bom"]
    for opened in found.values():
        assert (opened.statement.name, opened.statement.digest) == ("small", receipt.digest)
        assert opened.envelope.signed_by(keys("ci").signer.key.public)
    stated = configured(found["test-result"].statement)
    assert (stated["bundle"], stated["evidence"]) == (receipt.bundle_digest, receipt.evidence_digest)
    content = json.dumps(found["bom"].statement.predicate)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content) is None


def test_they_are_referrers_as_oci_has_them(run: Path, registry: Path, publish_signed: Publish) -> None:
    receipt = publish_signed(run)
    manifest = json.loads(blob(registry, receipt.attestations[0]).read_bytes())
    assert manifest["artifactType"] == "application/vnd.in-toto+json"
    assert manifest["subject"]["digest"] == receipt.digest
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    (layer,) = manifest["layers"]
    assert layer["mediaType"] == "application/vnd.dsse.envelope.v1+json"
    assert manifest["annotations"]["in-toto.io/predicate-type"].startswith("https://in-toto.io/")


def test_publishing_again_with_the_same_key_rewrites_nothing(
    run: Path, registry: Path, publish_signed: Publish, helpers: Any
) -> None:
    first = publish_signed(run)
    before = helpers.snapshot(registry)
    assert publish_signed(run).attestations == first.attestations
    assert helpers.snapshot(registry) == before
    helpers.assert_sound(registry)


def test_the_artifact_does_not_depend_on_the_key(run: Path, tmp_path: Path, publish_signed: Publish) -> None:
    digests = {
        owner: publish_signed(run, owner, registry=tmp_path / f"store-{owner}") for owner in ("ci", "release", None)
    }
    assert len({(receipt.digest, receipt.evidence_digest) for receipt in digests.values()}) == 1
    assert len({receipt.attestations for receipt in digests.values()}) == 3


def test_statements_without_a_key_are_there_and_count_for_nothing(
    run: Path, registry: Path, publish_signed: Publish, policy: Path
) -> None:
    receipt = publish_signed(run, None)
    assert receipt.signer is None and [found.envelope for found in statements(registry).values()] == [None] * 3
    assert verify(registry, "small").trusted is None
    with pytest.raises(SignatureError, match="is not signed"):
        verify(registry, "small", policy)
    publish_signed(run, "ci")
    assert verify(registry, "small", policy).trusted


def test_a_policy_is_met(run: Path, registry: Path, publish_signed: Publish, policy: Path, tmp_path: Path) -> None:
    publish_signed(run)
    receipt = pull(registry, "small", tmp_path / "out", policy=policy)
    assert receipt.trusted and [(met.type, met.signers) for met in receipt.trusted] == [
        ("test-result", ("ci",)),
        ("provenance", ("ci",)),
    ]
    assert verify(registry, "small", policy).trusted == receipt.trusted
    assert verify_pulled(registry, verify_directory(tmp_path / "out"), policy).trusted == receipt.trusted


def test_the_policy_comes_before_every_blob(
    run: Path, registry: Path, publish_signed: Publish, policy: Path, tmp_path: Path
) -> None:
    """With every file of the model and its config gone, a bad signature is still what is said, and nothing appears."""
    publish_signed(run, "release")
    resolved = resolve(registry, "small")
    for layer in (resolved.pack.config, *resolved.pack.layers.values()):
        blob(registry, layer.digest).unlink(missing_ok=True)
    # The empty config of attachments has the bytes of tokenizer.json.
    Layout.open(registry).put_bytes(b"{}", "application/vnd.oci.empty.v1+json")
    with pytest.raises(SignatureError, match="is signed by release, who may not sign a test-result of small"):
        pull(registry, "small", tmp_path / "out", policy=policy)
    assert not (tmp_path / "out").exists()
    with pytest.raises(IntegrityError, match="missing"):
        pull(registry, "small", tmp_path / "out")


def drop(registry: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Take entries out of the index, as somebody with access to the directory can."""
    index = json.loads((registry / "index.json").read_bytes())
    index["manifests"] = [entry for entry in index["manifests"] if not wanted(entry)]
    (registry / "index.json").write_bytes(canonical_json(index))


def test_a_removed_attestation(run: Path, registry: Path, publish_signed: Publish, policy: Path) -> None:
    receipt = publish_signed(run)
    drop(registry, lambda entry: entry["digest"] == receipt.attestations[1])
    with pytest.raises(SignatureError, match=r"needs a provenance signed by ci; none was found\. It has no such"):
        verify(registry, "small", policy)


def test_removed_evidence(run: Path, registry: Path, publish_signed: Publish, policy: Path, tmp_path: Path) -> None:
    receipt = publish_signed(run)
    drop(registry, lambda entry: entry["digest"] == receipt.evidence_digest)
    with pytest.raises(SignatureError, match=f"rests on the evidence {receipt.evidence_digest}, which this registry"):
        pull(registry, "small", tmp_path / "out", policy=policy)


def copied(registry: Path, source: str, target: str, keep_subject: bool) -> None:
    """Attach the statements about one model to another, as an attacker would."""
    one, two = resolve(registry, source), resolve(registry, target)
    attachments: list[Attachment] = []
    for found in one.repository.referrers(one.descriptor.digest, IN_TOTO_TYPE):
        manifest = json.loads(one.repository.read_manifest(found))
        layer = manifest["layers"][0]
        data = blob(registry, layer["digest"]).read_bytes()
        attachments.append(
            Attachment(IN_TOTO_TYPE, (part("statement.json", layer["mediaType"], data),), found.annotations)
        )
    assert attachments and not keep_subject
    two.repository.commit(two.pack.manifest, attachments)


def test_signatures_of_another_model_do_not_count(
    make_run: MakeRun, registry: Path, publish_signed: Publish, policy: Path
) -> None:
    good = publish_signed(make_run("good"), tags=("good",))
    publish_signed(make_run("evil", files={"model.onnx": b"evil"}), None, tags=("evil",))
    copied(registry, "small:good", "small:evil", keep_subject=False)
    with pytest.raises(SignatureError, match=f"was signed for {good.digest}"):
        verify(registry, "small:evil", policy)
    assert verify(registry, "small:good", policy)


def test_a_signature_replayed_for_another_name(
    run: Path, registry: Path, publish_signed: Publish, policy: Path, keys: Keys
) -> None:
    """The same bytes under another name have the same digest, and so the same referrers in a directory."""
    publish_signed(run, "other", name="other")
    assert verify(registry, "other", policy)
    publish(run / "artifact", run, registry, "small")
    text = policy.read_text().replace('"ci"', '"other"', 1)
    assert text != policy.read_text()
    policy.write_text(policy.read_text().replace('"signers": [\n            "ci"', '"signers": [\n            "other"'))
    with pytest.raises(SignatureError, match="was signed for the name 'other'"):
        verify(registry, "small", policy)


def test_a_name_without_a_rule(run: Path, registry: Path, publish_signed: Publish, policy: Path) -> None:
    receipt = publish_signed(run, name="small-2")
    with pytest.raises(SignatureError, match="no rule is about 'small-2'"):
        verify(registry, "small-2", policy)
    with pytest.raises(UsageError, match=f"a policy is about names, and this has none. Write small-2@{receipt.digest}"):
        verify(registry, receipt.digest, policy)


def test_a_tampered_statement_in_the_store(run: Path, registry: Path, publish_signed: Publish, policy: Path) -> None:
    receipt = publish_signed(run)
    manifest = json.loads(blob(registry, receipt.attestations[0]).read_bytes())
    path = blob(registry, manifest["layers"][0]["digest"])
    path.write_bytes(path.read_bytes().replace(b"PASSED", b"FAILED").replace(b"A", b"B", 1))
    with pytest.raises(SignatureError, match=r"cannot be read .*its bytes have the digest"):
        verify(registry, "small", policy)
    with pytest.raises(IntegrityError, match=path.name):
        verify(registry, "small")


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ((part("a", "application/json", b"{}"),), "holds no statement that is read here"),
        ((part("a", IN_TOTO_TYPE, b"{}"), part("b", IN_TOTO_TYPE, b"{}")), "has 2 layers; a statement is one"),
        ((part("a", IN_TOTO_TYPE, b"no json"),), "not the JSON"),
    ],
)
def test_what_is_no_statement_is_shown_with_its_problem(
    publish_signed: Publish, run: Path, policy: Path, layers: tuple[Any, ...], problem: str
) -> None:
    registry = Path(publish_signed(run).registry)
    resolved = resolve(registry, "small")
    resolved.repository.commit(resolved.pack.manifest, [Attachment(IN_TOTO_TYPE, layers)])
    said = show(registry, "small").attestations[-1]
    assert problem in str(said.problem) and not said.kind
    # It counts for nothing, and hinders nothing that others have signed.
    assert pull(registry, "small", run.parent / "out", policy=policy).trusted


def test_a_run_that_changes_while_it_is_published(run: Path, registry: Path) -> None:
    artifact = run / "artifact"

    def meddle(judged: Any) -> Any:
        (artifact / "manifest.json").write_text("{}")
        return attest(artifact, run, judged, None)

    with pytest.raises(IntegrityError, match=r"manifest\.json: was changed while it was published"):
        publish(artifact, run, registry, "small", attach=meddle)
    assert not registry.exists()


def test_listing_and_showing(run: Path, registry: Path, publish_signed: Publish, keys: Keys) -> None:
    publish_signed(run, None)
    (listing,) = list_artifacts(registry)
    assert (listing.signers, listing.promoted) == ((), ())
    publish_signed(run, "ci")
    (listing,) = list_artifacts(registry)
    assert listing.signers == (keys("ci").key_id,)
    said = show(registry, "small").attestations
    assert [(row.kind, row.signers) for row in said[:4]] == [
        ("test-result", ()),
        ("provenance", ()),
        ("bom", ()),
        ("test-result", (keys("ci").key_id,)),
    ]


def test_a_clock_that_is_wrong_changes_nothing(
    run: Path, registry: Path, publish_signed: Publish, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish_signed(run)
    for year in (1980, 2099):
        monkeypatch.setattr("time.time", lambda year=year: (year - 1970) * 31_556_952.0)
        assert verify(registry, "small", policy).trusted
        assert publish_signed(run).attestations == first.attestations


def test_descriptors_are_of_the_bytes(run: Path, registry: Path, publish_signed: Publish) -> None:
    receipt = publish_signed(run)
    for digest in receipt.attestations:
        data = blob(registry, digest).read_bytes()
        assert describe(data, "x").digest == digest == sha256_bytes(data)
    copy = shutil.copytree(registry, registry.with_name("copy"))
    assert verify(copy, "small").blobs == len(list((copy / "blobs/sha256").iterdir()))
