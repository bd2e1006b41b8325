"""Signing without a key of one's own: a certificate for the identity that CI vouches for, and a public log of its use.

Source: sigstore bundle v0.3, by the library sigstore 4.5 (extra `sigstore`), against the public good instance: its
trust root is refreshed over the network.  Left out on purpose: signing in by a browser, instances of one's own.
"""

from __future__ import annotations

import functools
from typing import Any

from assay.errors import AssayError, IntegrityError, UsageError
from assay.registry.dsse import Envelope, parse_envelope_value
from assay.registry.oci import IN_TOTO_TYPE, parse_json

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_MISSING = "keyless signatures need sigstore, which is not installed: pip install 'assay[sigstore]'."


class KeylessSigner:
    """Signs as the identity of the job that this process runs in."""

    media_type = BUNDLE_TYPE
    label = "sigstore"

    def __init__(self) -> None:
        # Asked for now, so that hours of work are not lost; asked for again to sign, because it lasts for minutes.
        _identity()

    def seal(self, payload: bytes) -> bytes:
        """A sigstore bundle around a statement; each call is an entry in the public log."""
        from sigstore.dsse import Statement
        from sigstore.models import ClientTrustConfig
        from sigstore.oidc import ExpiredIdentity
        from sigstore.sign import SigningContext

        identity = _identity()
        try:
            context = SigningContext.from_trust_config(ClientTrustConfig.production())
            with context.signer(identity, cache=False) as signer:
                return signer.sign_dsse(Statement(payload)).to_json().encode()
        except ExpiredIdentity as error:
            raise AssayError("keyless signing: the identity of this job has expired. Run the job again.") from error
        except Exception as error:
            # Any kind: the clients of the authority and of the log raise their own, which have no common base.
            raise AssayError(f"keyless signing: {_line(error)}. Nothing was published.") from error


def _identity() -> Any:
    """The identity token of this job; UsageError where there is none."""
    try:
        from sigstore.oidc import IdentityError, IdentityToken, detect_credential
    except ModuleNotFoundError as error:
        raise UsageError(_MISSING) from error
    try:
        token = detect_credential()
        if token is None:
            raise UsageError(
                "keyless signing: this process has no identity that an issuer vouches for. It works in CI jobs that may ask "
                "for one (GitHub Actions: `permissions: id-token: write`; GitLab: `id_tokens` with SIGSTORE_ID_TOKEN). "
                "Elsewhere, sign with a key: `assay keygen`."
            )
        return IdentityToken(token)
    except IdentityError as error:
        raise UsageError(f"keyless signing: the identity of this job cannot be used ({_line(error)}).") from error


def bundled_envelope(data: bytes, where: str) -> Envelope:
    """The envelope in a sigstore bundle, not verified yet; IntegrityError."""
    envelope = parse_json(data, where).get("dsseEnvelope")
    if not isinstance(envelope, dict):
        raise IntegrityError(f"{where}: a sigstore bundle without a DSSE envelope.")
    return parse_envelope_value(envelope, where)


def bundle_is_by(data: bytes, subject: str, issuer: str, payload: bytes, where: str) -> str | None:
    """None when a bundle is signed by an identity and holds exactly this payload; otherwise why it is not.

    Raises AssayError when that cannot be told: without the library, or without its trust root.
    """
    try:
        from sigstore.errors import Error, VerificationError
        from sigstore.models import Bundle
        from sigstore.verify import Verifier
        from sigstore.verify.policy import Identity
    except ModuleNotFoundError as error:
        raise UsageError(_MISSING) from error
    try:
        bundle = Bundle.from_json(data)
        kind, verified = _verifier(Verifier, where).verify_dsse(bundle, Identity(identity=subject, issuer=issuer))
    except VerificationError as error:
        return _line(error)
    except (Error, ValueError) as error:
        return f"not a usable sigstore bundle ({_line(error)})"
    if (kind, verified) != (IN_TOTO_TYPE, payload):
        return "what it signs is not what it holds"
    return None


def _verifier(verifier: Any, where: str) -> Any:
    """The verifier with today's trust root; AssayError when that cannot be had."""
    from sigstore.errors import Error

    try:
        return _refreshed(verifier)
    except (Error, OSError) as error:
        raise AssayError(
            f"{where}: the trust root of sigstore cannot be refreshed ({_line(error)}). Nothing was trusted; try again "
            "with a network, or sign with keys, which need none."
        ) from error


@functools.cache
def _refreshed(verifier: Any) -> Any:
    """Once a process: each time asks the network."""
    return verifier.production()


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
