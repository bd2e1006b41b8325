"""Envelopes, against the specification's words and against another implementation (securesystemslib)."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.dsse import Envelope as OtherEnvelope
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from assay.errors import IntegrityError
from assay.registry.dsse import IN_TOTO_TYPE, pae, parse_envelope, seal
from assay.registry.keys import KeyKind, PrivateKey, load_private_key, write_key_pair

PAYLOAD = '{"text":"ä"}'.encode()


@pytest.fixture(params=["ed25519", "ecdsa"])
def key(tmp_path: Path, request: pytest.FixtureRequest) -> PrivateKey:
    kind: KeyKind = request.param
    write_key_pair(tmp_path / "key", kind, None)
    return load_private_key(str(tmp_path / "key"))


def test_pae_is_that_of_the_specification() -> None:
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("", b"") == b"DSSEv1 0  0 "
    assert pae("ä", b"\0\n") == b"DSSEv1 2 \xc3\xa4 2 \x00\n"
    # What the lengths are for: moving a byte from the type to the payload gives other bytes.
    assert pae("a b", b"c") != pae("a", b"b c")


def test_an_envelope_round_trips(key: PrivateKey, tmp_path: Path) -> None:
    data = seal(PAYLOAD, [key])
    envelope = parse_envelope(data, "test")
    assert (envelope.payload, envelope.payload_type) == (PAYLOAD, IN_TOTO_TYPE)
    assert [keyid for keyid, _ in envelope.signatures] == [key.public.key_id]
    assert envelope.signed_by(key.public) and seal(PAYLOAD, [key]) == data
    write_key_pair(tmp_path / "other", "ed25519", None)
    other = load_private_key(str(tmp_path / "other"))
    assert not envelope.signed_by(other.public)
    both = parse_envelope(seal(PAYLOAD, [key, other]), "test")
    assert both.signed_by(key.public) and both.signed_by(other.public)


def test_another_implementation_verifies_our_envelopes(key: PrivateKey) -> None:
    other = OtherEnvelope.from_dict(json.loads(seal(PAYLOAD, [key])))
    public = their_key(key)
    assert list(other.verify([public], 1)) == [key.public.key_id]


def test_we_verify_envelopes_of_another_implementation(key: PrivateKey) -> None:
    envelope = OtherEnvelope(PAYLOAD, IN_TOTO_TYPE, {})
    envelope.sign(CryptoSigner(key._key))  # pyright: ignore[reportPrivateUsage]
    assert parse_envelope(json.dumps(envelope.to_dict()).encode(), "test").signed_by(key.public)


def their_key(key: PrivateKey) -> Key:
    return SSlibKey.from_crypto(key.public._key, keyid=key.public.key_id)  # pyright: ignore[reportPrivateUsage]


def test_a_changed_payload_or_type_does_not_fit(key: PrivateKey) -> None:
    value = json.loads(seal(PAYLOAD, [key]))
    changed = value | {"payload": base64.b64encode(PAYLOAD + b" ").decode()}
    assert not parse_envelope(json.dumps(changed).encode(), "test").signed_by(key.public)
    with pytest.raises(IntegrityError, match="payloadType"):
        parse_envelope(json.dumps(value | {"payloadType": "text/plain"}).encode(), "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signatures": []}, "list of 1 to 32"),
        ({"signatures": [{"sig": "AA=="}] * 33}, "list of 1 to 32"),
        ({"signatures": None}, "list of 1 to 32"),
        ({"signatures": [1]}, r"signatures\[0\]: sig: not base64"),
        ({"signatures": [{"keyid": 1, "sig": "AA=="}]}, "keyid is 1"),
        ({"signatures": [{"sig": "ä"}]}, "sig: not base64"),
        ({"payload": "A"}, "payload: not base64"),
        ({"payload": None}, "payload: not base64"),
    ],
)
def test_malformed_envelopes_are_refused(key: PrivateKey, change: dict[str, Any], message: str) -> None:
    value = json.loads(seal(PAYLOAD, [key])) | change
    with pytest.raises(IntegrityError, match=message):
        parse_envelope(json.dumps(value).encode(), "test")
