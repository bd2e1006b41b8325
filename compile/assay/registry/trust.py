"""Whether a policy trusts an artifact: for each attestation that a rule asks for, enough of its signers signed it.

Checked before a signature counts: it fits the content, the content is about this name and this digest, and what it says is
so of this artifact.  Everything that did not count is named with its reason.  Reads nothing but what it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from assay.errors import AssayError, IntegrityError, SignatureError
from assay.registry.keyless import BUNDLE_TYPE, bundle_is_by
from assay.registry.keys import PublicKey
from assay.registry.policy import Policy
from assay.registry.signing import Opened
from assay.registry.statements import Statement, configured, contradiction, read_promotion

_MOST_REASONS = 10


@dataclass(frozen=True)
class Attestation:
    """A statement that refers to an artifact.  digest: of its manifest.  opened: None where `problem` says why it is unreadable."""

    digest: str
    opened: Opened | None
    problem: str | None


@dataclass(frozen=True)
class Subject:
    """The artifact that is asked about.  evidence: digests of the evidence manifests that the registry has for it."""

    name: str
    digest: str
    bundle: str
    recipe: str | None
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True)
class Met:
    """A requirement of a policy, and the signers and attestations that meet it."""

    type: str
    signers: tuple[str, ...]
    attestations: tuple[str, ...]


@dataclass(frozen=True)
class _Wanted:
    """A requirement, and the line of the policy that it stands in.  channel: of a promotion."""

    kind: str
    signers: tuple[str, ...]
    threshold: int
    line: int
    channel: str | None = None

    def __str__(self) -> str:
        return f"promotion into {self.channel}" if self.channel else self.kind


class _NotCounted(Exception):
    """Why an attestation does not count, as half a sentence."""


def check_trust(
    policy: Policy, subject: Subject, attestations: Sequence[Attestation], channel: str | None = None
) -> tuple[Met, ...]:
    """What meets each requirement of the rule about a name; SignatureError for the first that is not met.

    channel: the tag that was asked for; where the rule names such a channel, a promotion into it is a requirement too.
    """
    rule = policy.rule_for(subject.name)
    index = policy.rules.index(rule)
    wanted = [
        _Wanted(
            needed.type,
            needed.signers,
            needed.threshold,
            policy.document.line(("rules", index, "require", number, "type")),
        )
        for number, needed in enumerate(rule.require)
    ]
    if channel is not None and channel in rule.channels:
        wanted.append(_promotion(policy, subject.name, channel))
    return tuple(_meet(policy, subject, needed, attestations) for needed in wanted)


def check_channel(policy: Policy, name: str, channel: str) -> None:
    """SignatureError when nobody may promote artifacts of a name into a channel."""
    _promotion(policy, name, channel)


def check_promotion(policy: Policy, subject: Subject, channel: str, records: Sequence[Attestation]) -> Met:
    """Who promoted an artifact into a channel; SignatureError unless one of them may."""
    return _meet(policy, subject, _promotion(policy, subject.name, channel), records)


def _promotion(policy: Policy, name: str, channel: str) -> _Wanted:
    rule = policy.rule_for(name)
    if channel not in rule.channels:
        named = ", ".join(rule.channels) or "none"
        raise SignatureError(
            f"{policy.file}: nobody may promote {name} into {channel!r}; the rule about it has these channels: {named}."
        )
    line = policy.document.line(("rules", policy.rules.index(rule), "channels", channel))
    return _Wanted("promotion", rule.channels[channel].signers, 1, line, channel)


def _meet(policy: Policy, subject: Subject, wanted: _Wanted, attestations: Iterable[Attestation]) -> Met:
    counted: dict[str, list[str]] = {}
    reasons: list[str] = []
    untold: AssayError | None = None
    for attestation in attestations:
        opened = attestation.opened
        if opened is None:
            reasons.append(f"{attestation.digest} cannot be read ({attestation.problem})")
        elif _is_meant(opened.statement, wanted):
            try:
                for name in _count(policy, subject, wanted, opened, attestation.digest):
                    counted.setdefault(name, []).append(attestation.digest)
            except _NotCounted as error:
                reasons.append(f"{attestation.digest} {error}")
            except AssayError as error:
                # It cannot be told, which matters only when nothing else is enough.
                untold = error
        elif opened.statement.kind not in ("test-result", "provenance", "bom", "promotion"):
            reasons.append(f"{attestation.digest} is of a kind that is not known here ({opened.statement.kind!r})")
    if len(counted) < wanted.threshold:
        if untold:
            raise untold
        found = f"{len(counted)} of {wanted.threshold} found" if counted else "none was found"
        raise SignatureError(
            f"{policy.file}:{wanted.line}: {subject} needs a {wanted} signed by {_listed(wanted)}; {found}."
            + (f" Not counted: {_some(reasons)}." if reasons else " It has no such attestation.")
        )
    return Met(
        str(wanted), tuple(counted), tuple(dict.fromkeys(digest for rows in counted.values() for digest in rows))
    )


def _some(reasons: list[str]) -> str:
    more = f"; and {len(reasons) - _MOST_REASONS} more" if len(reasons) > _MOST_REASONS else ""
    return "; ".join(reasons[:_MOST_REASONS]) + more


def _listed(wanted: _Wanted) -> str:
    names = ", ".join(wanted.signers)
    if len(wanted.signers) == 1:
        return names
    return f"{wanted.threshold} of {names}"


def _is_meant(statement: Statement, wanted: _Wanted) -> bool:
    """Whether a statement is of the kind that is asked for; a promotion of another channel is not."""
    if statement.kind != wanted.kind:
        return False
    return wanted.channel is None or statement.predicate.get("assay_channel") == wanted.channel


def _count(policy: Policy, subject: Subject, wanted: _Wanted, opened: Opened, digest: str) -> list[str]:
    """Which of the wanted signers an attestation counts for."""
    signed_by = _signers(policy, opened, digest)
    allowed = [name for name in signed_by if name in wanted.signers]
    if not allowed:
        raise _NotCounted(f"is signed by {', '.join(signed_by)}, who may not sign a {wanted} of {subject.name}")
    statement = opened.statement
    if statement.name != subject.name:
        raise _NotCounted(f"was signed for the name {statement.name!r}")
    if statement.digest != subject.digest:
        raise _NotCounted(f"was signed for {statement.digest}")
    if said := contradiction(statement, bundle=subject.bundle, recipe=subject.recipe):
        raise _NotCounted(said)
    if statement.kind == "test-result" and (found := configured(statement).get("evidence")) not in subject.evidence:
        raise _NotCounted(f"rests on the evidence {found}, which this registry does not have")
    if statement.kind == "promotion":
        try:
            read_promotion(statement, digest)
        except IntegrityError as error:
            raise _NotCounted(str(error)) from error
    return allowed


def _signers(policy: Policy, opened: Opened, digest: str) -> list[str]:
    """Names of the policy's signers whose signature fits; `_NotCounted` says what there is instead."""
    if opened.envelope is None:
        raise _NotCounted("is not signed")
    if opened.sealed.media_type == BUNDLE_TYPE:
        return _identities(policy, opened, digest)
    keys = {name: signer for name, signer in policy.signers.items() if isinstance(signer, PublicKey)}
    found = [name for name, key in keys.items() if opened.envelope.signed_by(key)]
    if not found:
        hints = [keyid for keyid, _ in opened.envelope.signatures]
        claimed = [name for name, key in keys.items() if key.key_id in hints]
        if claimed:
            raise _NotCounted(f"has a signature of {', '.join(claimed)} that does not fit its content: it was changed")
        raise _NotCounted(f"is signed by a key that the policy does not have ({', '.join(map(repr, hints))})")
    return found


def _identities(policy: Policy, opened: Opened, digest: str) -> list[str]:
    found: list[str] = []
    reasons: list[str] = []
    for name, signer in policy.signers.items():
        if not isinstance(signer, PublicKey):
            reason = bundle_is_by(opened.sealed.data, signer.subject, signer.issuer, opened.payload, digest)
            if reason is None:
                found.append(name)
            else:
                reasons.append(f"not by {name}: {reason}")
    if not found:
        raise _NotCounted(f"has a keyless signature, {'; '.join(reasons) or 'and the policy has no identities'}")
    return found
