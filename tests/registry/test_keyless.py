"""Keyless signing as far as it can be had without an issuer, a certificate authority and a log: what is refused, and how.

Not tested, because nothing here can: a signature with an identity, its entry in the log, and its verification.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.errors import AssayError, IntegrityError, SignatureError, UsageError
from assay.registry import keyless
from assay.registry.attestations import read_attestations
from assay.registry.base import Attachment, part
from assay.registry.dsse import seal
from assay.registry.inspection import verify
from assay.registry.keyless import bundle_is_by, bundled_envelope
from assay.registry.oci import IN_TOTO_TYPE
from assay.registry.pull import resolve
from assay.registry.signing import load_signer

Keys = Callable[[str], Any]
# What tells a process that it is a CI job which may ask for an identity.
AMBIENT = (
    "GITHUB_ACTIONS",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
    "GITLAB_CI",
    "BUILDKITE",
    "CIRCLECI",
    "GOOGLE_APPLICATION",
)


@pytest.fixture(autouse=True)
def no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AMBIENT:
        monkeypatch.delenv(name, raising=False)
    # The detector of Google's would ask a host of theirs.
    monkeypatch.setattr("id._internal.oidc.ambient.detect_gcp", lambda _: None)


def test_without_an_identity_it_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no identity that an issuer vouches for\. It works in CI jobs"):
        load_signer("sigstore")


def test_a_job_that_may_not_ask_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    with pytest.raises(UsageError, match="the identity of this job cannot be used"):
        load_signer("sigstore")


def test_an_identity_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: "no token")
    with pytest.raises(UsageError, match="cannot be used"):
        load_signer("sigstore")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sigstore.oidc", None)
    with pytest.raises(UsageError, match=r"pip install 'assay\[sigstore\]'"):
        load_signer("sigstore")


def test_the_envelope_in_a_bundle(keys: Keys) -> None:
    envelope = json.loads(seal(b"{}", [keys("ci").signer.key]))
    data = json.dumps({"mediaType": keyless.BUNDLE_TYPE, "dsseEnvelope": envelope}).encode()
    assert bundled_envelope(data, "test").payload == b"{}"
    with pytest.raises(IntegrityError, match="without a DSSE envelope"):
        bundled_envelope(b'{"messageSignature":{}}', "test")


@pytest.mark.parametrize("data", [b"{}", b"no json", b'{"dsseEnvelope":{}}'])
def test_what_is_no_bundle_is_by_nobody(data: bytes) -> None:
    assert "not a usable sigstore bundle" in str(bundle_is_by(data, "a@example.org", "https://x.example", b"", "test"))


def test_without_a_trust_root_nothing_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    from sigstore.errors import TUFError

    class Unreachable:
        @staticmethod
        def production() -> Any:
            raise TUFError("Failed to refresh TUF metadata")

    with pytest.raises(AssayError, match="the trust root of sigstore cannot be refreshed") as refused:
        keyless._verifier(Unreachable, "test")  # pyright: ignore[reportPrivateUsage]
    assert refused.value.exit_code == 4


def test_what_cannot_be_told_matters_only_when_nothing_else_is_enough(
    run: Path, publish_signed: Callable[..., Any], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keyless attestation beside one that is signed by a key, on a machine without the library."""
    content = json.loads(policy.read_text())
    content["signers"]["cloud"] = {"identity": "a@example.org", "issuer": "https://x.example"}
    for needed in content["rules"][0]["require"]:
        needed["signers"].append("cloud")
    policy.write_text(json.dumps(content))
    registry = publish_signed(run, None).registry
    resolved = resolve(registry, "small")
    bundles: list[Attachment] = []
    for found in read_attestations(resolved.repository, resolved.descriptor):
        assert found.opened
        payload = base64.b64encode(found.opened.payload).decode()
        envelope = {"payload": payload, "payloadType": IN_TOTO_TYPE, "signatures": [{"sig": "AA=="}]}
        bundle = json.dumps({"mediaType": keyless.BUNDLE_TYPE, "dsseEnvelope": envelope}).encode()
        bundles.append(Attachment(IN_TOTO_TYPE, (part("statement.json", keyless.BUNDLE_TYPE, bundle),)))
    resolved.repository.commit(resolved.pack.manifest, bundles)
    with pytest.raises(SignatureError, match="has a keyless signature, not by cloud: not a usable sigstore bundle"):
        verify(registry, "small", policy)
    monkeypatch.setitem(sys.modules, "sigstore.verify", None)
    with pytest.raises(UsageError, match=r"pip install 'assay\[sigstore\]'"):
        verify(registry, "small", policy)
    publish_signed(run, "ci")
    trusted = verify(registry, "small", policy).trusted
    assert trusted and [met.signers for met in trusted] == [("ci",), ("ci",)]


def test_a_refused_signer_stops_a_publish_first(run: Path, registry: Path, assay: Callable[..., Any]) -> None:
    done = assay("publish", run, "--registry", registry, "--key", "env:ASSAY_NO_SUCH_KEY")
    assert done.returncode == 2 and "ASSAY_NO_SUCH_KEY is not set" in done.stderr
    done = assay("publish", run, "--registry", registry, "--password-env", "PASSWORD")
    assert done.returncode == 2 and "no key is given: add --key" in done.stderr
    assert not registry.exists()
