"""What a policy counts, and what it says about everything that it does not count."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from assay.errors import SignatureError
from assay.files import canonical_json, sha256_bytes
from assay.registry.dsse import ENVELOPE_TYPE
from assay.registry.keys import load_private_key, write_key_pair
from assay.registry.policy import Policy, load_policy
from assay.registry.signing import KeySigner, Sealed, open_sealed, seal_statement
from assay.registry.statements import Promotion, Statement, gate_result, promotion
from assay.registry.trust import Attestation, Subject, check_promotion, check_trust

POLICY = """\
version: 1
signers:
  ci: {file: ci.pub}
  release: {file: release.pub}
rules:
  - names: [small]
    require:
      - {type: test-result, signers: [ci]}
    channels: {production: {signers: [release]}}
  - names: [strict]
    require:
      - {type: test-result, signers: [ci, release], threshold: 2}
  - names: [other]
    require:
      - {type: test-result, signers: [release]}
"""
MODEL, BUNDLE, RECIPE, EVIDENCE = (sha256_bytes(name) for name in (b"model", b"bundle", b"recipe", b"evidence"))
OTHER = sha256_bytes(b"other")
SUBJECT = Subject("small", MODEL, BUNDLE, RECIPE, (EVIDENCE,))
Sign = Callable[..., Attestation]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trust")
    for name in ("ci", "release", "stranger"):
        write_key_pair(place / name, "ed25519", None)
    (place / "policy.yaml").write_text(POLICY)
    return place


@pytest.fixture(scope="module")
def policy(place: Path) -> Policy:
    return load_policy(place / "policy.yaml")


@pytest.fixture(scope="module")
def sign(place: Path) -> Sign:
    """An attestation of a statement, signed by the key of this name; by nobody when there is none."""

    def make(statement: Statement, key: str | None) -> Attestation:
        signer = KeySigner(load_private_key(str(place / key))) if key else None
        return attestation(seal_statement(statement, signer))

    return make


def attestation(sealed: Sealed) -> Attestation:
    return Attestation(sha256_bytes(sealed.data), open_sealed(sealed, "test"), None)


def result(name: str = "small", digest: str = MODEL, bundle: str = BUNDLE, evidence: str = EVIDENCE) -> Statement:
    verdict: dict[str, Any] = {"recipe": RECIPE, "baseline": OTHER, "gates": [], "checks": []}
    return gate_result(name, digest, bundle=bundle, verdict=verdict, evidence={}, digests={"evidence": evidence})


def promoted(channel: str = "production", digest: str = MODEL) -> Statement:
    change = Promotion("promote", channel, 1, None, None, None)
    return promotion("small", digest, change, policy=None, attestations=[], assay_version="0")


def test_what_meets_a_policy_is_named(policy: Policy, sign: Sign) -> None:
    good = sign(result(), "ci")
    (met,) = check_trust(policy, SUBJECT, [sign(result(), None), good])
    assert (met.type, met.signers, met.attestations) == ("test-result", ("ci",), (good.digest,))


@pytest.mark.parametrize(
    ("statement", "key", "reason"),
    [
        (result(), None, "is not signed"),
        (result(), "stranger", r"is signed by a key that the policy does not have \('sha256:"),
        (result(), "release", "is signed by release, who may not sign a test-result of small"),
        (result(digest=OTHER), "ci", f"was signed for {OTHER}"),
        (result(name="other"), "ci", "was signed for the name 'other'"),
        (result(bundle=OTHER), "ci", "is about the bundle"),
        (result(evidence=OTHER), "ci", f"rests on the evidence {OTHER}, which this registry does not have"),
        (replace(result(), predicate=result().predicate | {"result": "FAILED"}), "ci", "says 'FAILED', not PASSED"),
        (replace(result(), predicate_type="urn:x:scan"), "ci", r"is of a kind that is not known here \('urn:x:scan'\)"),
        (promoted(), "ci", "It has no such attestation"),
    ],
)
def test_what_does_not_count(policy: Policy, sign: Sign, statement: Statement, key: str | None, reason: str) -> None:
    with pytest.raises(SignatureError, match=reason) as refused:
        check_trust(policy, SUBJECT, [sign(statement, key)])
    assert refused.value.exit_code == 5
    assert str(refused.value).startswith(f"{policy.file}:8: small@{MODEL} needs a test-result signed by ci; none was")


def test_a_removed_attestation(policy: Policy) -> None:
    with pytest.raises(SignatureError, match=r"none was found\. It has no such attestation"):
        check_trust(policy, SUBJECT, [])


def test_a_tampered_payload(policy: Policy, sign: Sign) -> None:
    opened = sign(result(digest=OTHER), "ci").opened
    assert opened
    envelope = json.loads(opened.sealed.data)
    payload = b64decode(envelope["payload"]).replace(OTHER[7:].encode(), MODEL[7:].encode())
    data = canonical_json(envelope | {"payload": b64encode(payload).decode()})
    with pytest.raises(SignatureError, match="has a signature of ci that does not fit its content: it was changed"):
        check_trust(policy, SUBJECT, [attestation(Sealed(ENVELOPE_TYPE, data))])


def test_a_key_id_is_only_a_hint(policy: Policy, sign: Sign) -> None:
    """Neither does a stranger's signature count for the key id beside it, nor is ours lost without one."""
    known = {name: signer.key_id for name, signer in policy.signers.items() if hasattr(signer, "key_id")}  # pyright: ignore
    for key, keyid, trusted in (("stranger", known["ci"], False), ("ci", "", True), ("ci", known["release"], True)):
        opened = sign(result(), key).opened
        assert opened
        envelope = json.loads(opened.sealed.data)
        envelope["signatures"][0]["keyid"] = keyid
        found = attestation(Sealed(ENVELOPE_TYPE, canonical_json(envelope)))
        if trusted:
            assert check_trust(policy, SUBJECT, [found])
        else:
            with pytest.raises(SignatureError, match="does not fit"):
                check_trust(policy, SUBJECT, [found])


def test_hostile_words_are_shown_as_text(policy: Policy, sign: Sign) -> None:
    """What strangers write into a registry neither steers a terminal nor fills it."""
    scan = sign(replace(result(), predicate_type="urn:\x1b[31m"), "stranger")
    opened = sign(result(), "stranger").opened
    assert opened
    envelope = json.loads(opened.sealed.data)
    envelope["signatures"][0]["keyid"] = "\x1b]0;title"
    forged = attestation(Sealed(ENVELOPE_TYPE, canonical_json(envelope)))
    with pytest.raises(SignatureError, match="; and 32 more") as refused:
        check_trust(policy, SUBJECT, [scan, forged] * 21)
    assert "\x1b" not in str(refused.value) and len(str(refused.value)) < 4000


def test_a_key_that_is_trusted_for_another_name(policy: Policy, sign: Sign) -> None:
    subject = replace(SUBJECT, name="other")
    assert check_trust(policy, subject, [sign(result("other"), "release")])
    with pytest.raises(SignatureError, match="is signed by ci, who may not sign a test-result of other"):
        check_trust(policy, subject, [sign(result("other"), "ci")])


def test_a_threshold_counts_signers_once(policy: Policy, sign: Sign) -> None:
    subject = replace(SUBJECT, name="strict")
    one, two = sign(result("strict"), "ci"), sign(result("strict"), "release")
    (met,) = check_trust(policy, subject, [one, two])
    assert met.signers == ("ci", "release")
    changed = replace(result("strict"), predicate=result().predicate | {"url": "https://example.org"})
    with pytest.raises(SignatureError, match="signed by 2 of ci, release; 1 of 2 found"):
        check_trust(policy, subject, [one, sign(changed, "ci")])


def test_what_cannot_be_read_is_named(policy: Policy) -> None:
    with pytest.raises(SignatureError, match=r"sha256:\w+ cannot be read \(no JSON\)"):
        check_trust(policy, SUBJECT, [Attestation(OTHER, None, "no JSON")])


def test_a_channel_needs_a_promotion(policy: Policy, sign: Sign) -> None:
    good = sign(result(), "ci")
    assert check_trust(policy, SUBJECT, [good], "latest") == check_trust(policy, SUBJECT, [good])
    _, met = check_trust(policy, SUBJECT, [good, sign(promoted(), "release")], "production")
    assert (met.type, met.signers) == ("promotion into production", ("release",))
    for wrong, reason in (
        (sign(promoted(), "ci"), "ci, who may not sign a promotion into production of small"),
        (sign(promoted("staging"), "release"), "It has no such attestation"),
        (sign(promoted(digest=OTHER), "release"), "was signed for"),
    ):
        with pytest.raises(SignatureError, match=reason):
            check_trust(policy, SUBJECT, [good, wrong], "production")


def test_who_may_promote(policy: Policy, sign: Sign) -> None:
    assert check_promotion(policy, SUBJECT, "production", [sign(promoted(), "release")]).signers == ("release",)
    with pytest.raises(SignatureError, match=r"nobody may promote small into 'staging'; .* channels: production"):
        check_promotion(policy, SUBJECT, "staging", [sign(promoted("staging"), "release")])
    with pytest.raises(SignatureError, match="is not signed"):
        check_promotion(policy, SUBJECT, "production", [sign(promoted(), None)])


def test_a_keyless_signature_of_nobody(policy: Policy, sign: Sign) -> None:
    opened = sign(result(), "ci").opened
    assert opened
    bundle = canonical_json({"dsseEnvelope": json.loads(opened.sealed.data)})
    sealed = Sealed("application/vnd.dev.sigstore.bundle.v0.3+json", bundle)
    with pytest.raises(SignatureError, match="has a keyless signature, and the policy has no identities"):
        check_trust(policy, SUBJECT, [attestation(sealed)])
