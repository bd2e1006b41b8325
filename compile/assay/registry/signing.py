"""Statements as they are stored: plain, in an envelope signed by a key, or in a sigstore bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from assay.errors import IntegrityError, UsageError
from assay.registry.dsse import ENVELOPE_TYPE, Envelope, parse_envelope, seal
from assay.registry.keyless import BUNDLE_TYPE, KeylessSigner, bundled_envelope
from assay.registry.keys import PrivateKey, load_private_key
from assay.registry.oci import IN_TOTO_TYPE
from assay.registry.statements import Statement, parse_statement

KEYLESS = "sigstore"


@dataclass(frozen=True)
class Sealed:
    """The stored form of a statement: what the bytes are, and the bytes."""

    media_type: str
    data: bytes


@dataclass(frozen=True)
class Opened:
    """A stored statement as read.  envelope: None for one that is not signed; nothing is verified yet."""

    sealed: Sealed
    statement: Statement
    payload: bytes
    envelope: Envelope | None


class Signer(Protocol):
    """Somebody who signs statements.  media_type: of what `seal` gives.  label: who it is, as a listing shows it."""

    @property
    def media_type(self) -> str: ...

    @property
    def label(self) -> str: ...

    def seal(self, payload: bytes) -> bytes: ...


@dataclass(frozen=True)
class KeySigner:
    """Signs with a key."""

    key: PrivateKey
    media_type: str = ENVELOPE_TYPE

    @property
    def label(self) -> str:
        return self.key.public.key_id

    def seal(self, payload: bytes) -> bytes:
        return seal(payload, [self.key])


def load_signer(given: str | None, password_variable: str | None = None) -> Signer | None:
    """Whoever signs: a PEM file, env:NAME for one in an environment variable, `sigstore` for the identity of a CI job.

    None when nothing is given.  Raises UsageError; asks for a password where one is needed.
    """
    if given is None and password_variable:
        raise UsageError("--password-env names the password of a key, and no key is given: add --key.")
    if given is None:
        return None
    return KeylessSigner() if given == KEYLESS else KeySigner(load_private_key(given, password_variable))


def seal_statement(statement: Statement, signer: Signer | None) -> Sealed:
    """A statement as it is stored; without a signer, as it is."""
    payload = statement.to_bytes()
    if signer is None:
        return Sealed(IN_TOTO_TYPE, payload)
    return Sealed(signer.media_type, signer.seal(payload))


def open_sealed(sealed: Sealed, where: str) -> Opened:
    """Read a stored statement without trusting it; IntegrityError when it has none of the three forms."""
    if sealed.media_type == IN_TOTO_TYPE:
        return Opened(sealed, parse_statement(sealed.data, where), sealed.data, None)
    if sealed.media_type not in (ENVELOPE_TYPE, BUNDLE_TYPE):
        raise IntegrityError(f"{where}: media type {sealed.media_type!r} holds no statement that is read here.")
    read = parse_envelope if sealed.media_type == ENVELOPE_TYPE else bundled_envelope
    envelope = read(sealed.data, where)
    return Opened(sealed, parse_statement(envelope.payload, where), envelope.payload, envelope)
