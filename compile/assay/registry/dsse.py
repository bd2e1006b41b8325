"""DSSE envelopes: a payload, its type, and signatures over both.

Source: secure-systems-lab/dsse, protocol.md and envelope.md (v1).  A signature is over
PAE(type, payload) = "DSSEv1" SP len(type) SP type SP len(payload) SP payload, lengths in bytes, in decimal.  A keyid
is a hint that nobody vouches for: it never decides what is trusted.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from assay.errors import IntegrityError
from assay.files import canonical_json
from assay.registry.keys import PrivateKey, PublicKey
from assay.registry.oci import IN_TOTO_TYPE, parse_json

ENVELOPE_TYPE = "application/vnd.dsse.envelope.v1+json"
_MAX_SIGNATURES = 32


@dataclass(frozen=True)
class Envelope:
    """An envelope as read: `signatures` are pairs of a keyid, which may be empty, and a signature."""

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]

    def signed_by(self, key: PublicKey) -> bool:
        """Whether one of the signatures is this key's, over exactly this payload as this type."""
        signed = pae(self.payload_type, self.payload)
        return any(key.verifies(signature, signed) for _, signature in self.signatures)


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(payload: bytes, keys: Sequence[PrivateKey], payload_type: str = IN_TOTO_TYPE) -> bytes:
    """An envelope's bytes; the same payload and keys give the same bytes."""
    signed = pae(payload_type, payload)
    signatures = [{"keyid": key.public.key_id, "sig": _base64(key.sign(signed))} for key in keys]
    return canonical_json({"payload": _base64(payload), "payloadType": payload_type, "signatures": signatures})


def parse_envelope(data: bytes, where: str) -> Envelope:
    """Check an envelope from outside; IntegrityError says which part is wrong."""
    return parse_envelope_value(parse_json(data, where), where)


def parse_envelope_value(value: dict[str, Any], where: str) -> Envelope:
    """The same, of an envelope that stands in other JSON."""
    payload_type, signatures = value.get("payloadType"), value.get("signatures")
    if payload_type != IN_TOTO_TYPE:
        raise IntegrityError(f"{where}: payloadType is {payload_type!r}; read is {IN_TOTO_TYPE}.")
    if not isinstance(signatures, list) or not 0 < len(cast("list[Any]", signatures)) <= _MAX_SIGNATURES:
        raise IntegrityError(f"{where}: signatures must be a list of 1 to {_MAX_SIGNATURES}.")
    read: list[tuple[str, bytes]] = []
    for index, signature in enumerate(cast("list[Any]", signatures)):
        place = f"{where}: signatures[{index}]"
        parts = cast("dict[str, Any]", signature) if isinstance(signature, dict) else {}
        keyid = parts.get("keyid") or ""
        if not isinstance(keyid, str):
            raise IntegrityError(f"{place}: keyid is {keyid!r}; a text is needed.")
        read.append((keyid, _bytes(parts.get("sig"), f"{place}: sig")))
    return Envelope(IN_TOTO_TYPE, _bytes(value.get("payload"), f"{where}: payload"), tuple(read))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: Any, where: str) -> bytes:
    """Base64 of either alphabet, as the protocol allows."""
    try:
        return base64.b64decode(text.translate(str.maketrans("-_", "+/")), validate=True)
    except (AttributeError, TypeError, ValueError, binascii.Error) as error:
        raise IntegrityError(f"{where}: not base64.") from error
