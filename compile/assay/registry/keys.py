"""Signing keys: made, kept in PEM files, named by the digest of their public half.

Source: PKCS #8 (private), SubjectPublicKeyInfo (public).  Both kinds sign deterministically: Ed25519 by RFC 8032,
ECDSA on P-256 with SHA-256 by RFC 6979.  `cryptography` is imported when a key is used.  Left out on purpose: RSA,
hardware tokens, expiry (a key is trusted for as long as a policy names it).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from assay.errors import UsageError
from assay.files import explain_disk_errors, sha256_bytes, sync_directory, temporary_beside

KeyKind = Literal["ed25519", "ecdsa"]
PUBLIC_SUFFIX = ".pub"
PASSWORD_VARIABLE = "ASSAY_KEY_PASSWORD"
_MAX_PEM_BYTES = 64 << 10
_KINDS = "ed25519, ecdsa (P-256)"


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with.  key_id: sha256 of its SubjectPublicKeyInfo."""

    key_id: str
    _key: Any

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Whether this key's owner signed exactly these bytes."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, data, *_ecdsa_arguments(self._key))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    """A key that signs: the same bytes give the same signature."""

    public: PublicKey
    _key: Any

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, *_ecdsa_arguments(self._key))


@dataclass(frozen=True)
class KeyFiles:
    """A new pair of keys on disk."""

    private: Path
    public: Path
    key_id: str
    encrypted: bool


def write_key_pair(destination: Path, kind: KeyKind, password: bytes | None) -> KeyFiles:
    """Make a key; write the private half to `destination` (mode 0600), the public half beside it with `.pub` added.

    password: encrypts the private half.  UsageError when one of the files exists: keys are never overwritten.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if destination.is_dir():
        raise UsageError(
            f"{destination}: a directory. Name the file for the private key: {destination / 'release-key'}."
        )
    key = ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    public_path = destination.with_name(destination.name + PUBLIC_SUFFIX)
    for path in (destination, public_path):
        if os.path.lexists(path):
            raise UsageError(f"{path}: exists already, and keys are not overwritten. Choose another name.")
    # The private half last: with it, the pair is whole.
    _write_new(public_path, _public_pem(key.public_key()), 0o644)
    try:
        _write_new(destination, private, 0o600)
    except BaseException:
        public_path.unlink(missing_ok=True)
        raise
    return KeyFiles(destination, public_path, _wrap(key.public_key()).key_id, password is not None)


def load_private_key(given: str, password_variable: str | None = None) -> PrivateKey:
    """Read a private key: a PEM file, or env:NAME for an environment variable that holds the PEM.

    password_variable: environment variable with the password of an encrypted key; unless given, ASSAY_KEY_PASSWORD,
    and where that is not set, whoever sits at the terminal is asked.  Raises UsageError.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read_given(given)
    try:
        try:
            key = load_pem_private_key(data, None)
        except TypeError:
            key = load_pem_private_key(data, read_password(password_variable, f"Password of {given}: "))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        wrong = (
            "its password is another" if b"ENCRYPTED" in data else f"not a private key in PEM ({_first_line(error)})"
        )
        raise UsageError(f"{given}: {wrong}. `assay keygen` makes a key.") from error
    return PrivateKey(_checked(key.public_key(), given), key)


def load_public_key(data: bytes, where: str) -> PublicKey:
    """Read a public key in PEM; UsageError for anything else."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY" in data:
        raise UsageError(f"{where}: a private key. Give the public one, and keep the private one to yourself.")
    try:
        return _checked(load_pem_public_key(data), where)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{where}: not a public key in PEM ({_first_line(error)}).") from error


def read_pem(path: Path) -> bytes:
    """A key file's bytes; UsageError when it cannot be read or is too long for a key."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_PEM_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(data) > _MAX_PEM_BYTES:
        raise UsageError(f"{path}: longer than {_MAX_PEM_BYTES} bytes; that is no key. Is this the right file?")
    return data


def read_password(variable: str | None, prompt: str, *, ask: Callable[[str], str] = getpass.getpass) -> bytes:
    """The password in an environment variable, or from the terminal when none is named and ASSAY_KEY_PASSWORD is not set."""
    name = variable or PASSWORD_VARIABLE
    if name in os.environ:
        if not os.environ[name]:
            raise UsageError(f"the environment variable {name} is empty; a password is needed.")
        return os.environ[name].encode()
    if variable or not sys.stdin.isatty():
        raise UsageError(f"a password is needed, and the environment variable {name} is not set.")
    password = ask(prompt)
    if not password:
        raise UsageError("an empty password protects nothing; give one.")
    return password.encode()


def read_new_password(variable: str | None, *, ask: Callable[[str], str] = getpass.getpass) -> bytes:
    """A password for a new key: as `read_password`, but who types it types it twice."""
    if variable is None and PASSWORD_VARIABLE not in os.environ and not sys.stdin.isatty():
        raise UsageError(
            f"a new key needs a password: name a variable (--password-env), set {PASSWORD_VARIABLE}, or say --no-password."
        )
    typed: list[str] = []

    def ask_and_keep(prompt: str) -> str:
        typed.append(ask(prompt))
        return typed[0]

    password = read_password(variable, "Password for the new key: ", ask=ask_and_keep)
    if typed and ask("The same again: ") != typed[0]:
        raise UsageError("the two passwords differ; no key was made. Run the same command again.")
    return password


def _read_given(given: str) -> bytes:
    kind, _, name = given.partition(":")
    if kind != "env":
        return read_pem(Path(given))
    if not os.environ.get(name):
        raise UsageError(
            f"{given}: the environment variable {name or '(no name)'} is not set; it must hold a key in PEM."
        )
    return os.environ[name].encode()


def _checked(key: Any, where: str) -> PublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    p256 = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    if not p256 and not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(f"{where}: a key of another kind; allowed: {_KINDS}.")
    return _wrap(key)


def _wrap(key: Any) -> PublicKey:
    from cryptography.hazmat.primitives import serialization

    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(sha256_bytes(spki), key)


def _public_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _ecdsa_arguments(key: Any) -> tuple[Any, ...]:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    if isinstance(key, ec.EllipticCurvePrivateKey):
        return (ec.ECDSA(hashes.SHA256(), deterministic_signing=True),)
    return (ec.ECDSA(hashes.SHA256()),) if isinstance(key, ec.EllipticCurvePublicKey) else ()


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a whole new file or nothing; UsageError when there is one by now."""
    temporary = temporary_beside(path)
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            # A link, not a rename: it fails where a file is.
            path.hardlink_to(temporary)
            sync_directory(path.parent)
        except FileExistsError as error:
            raise UsageError(f"{path}: exists already, and keys are not overwritten. Choose another name.") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
