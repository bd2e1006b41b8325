"""Channels: tags that only a promotion moves, each move with a record that says what was checked and who says so.

A record is a verification summary attached to the model that was put into the channel; it names the model that was there
before, so that the history is a chain from the channel's tag back, and no list has to be kept.  Left out on purpose:
proof that a record is the newest; whoever can write to a registry can show an older state (docs/trust.md).
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from assay import __version__
from assay.errors import AssayError, IntegrityError, PublishRefusedError, SignatureError, UsageError
from assay.registry.attestations import attachment_of, read_attestations, subject_of
from assay.registry.base import Repository
from assay.registry.inspection import Verification, verify
from assay.registry.layout import LayoutRepository
from assay.registry.modelpack import Pack, read_pack
from assay.registry.oci import Descriptor
from assay.registry.open import open_repository
from assay.registry.policy import Policy, load_policy
from assay.registry.reference import Reference, check_tag, is_version, parse_reference, split_address
from assay.registry.signing import Signer, open_sealed, seal_statement
from assay.registry.statements import Promotion, promotion, read_promotion
from assay.registry.tags import tagged
from assay.registry.trust import Attestation, Met, check_channel, check_promotion


@dataclass(frozen=True)
class Moved:
    """What a promotion or a rollback did.

    record: digest of its attestation, of an earlier one when nothing had to be done (`created` False).  trusted: what of a
    policy the artifact meets, None without one.  skipped: earlier artifacts that a rollback passed over: digest and reason.
    """

    registry: str
    name: str
    channel: str
    action: str
    digest: str
    previous: str | None
    sequence: int
    record: str
    created: bool
    signed: bool
    trusted: tuple[Met, ...] | None
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Record:
    """A promotion record as found.  digest: of the model that was put into the channel."""

    digest: str
    attestation: Attestation
    promotion: Promotion

    @property
    def is_signed(self) -> bool:
        return self.attestation.opened is not None and self.attestation.opened.envelope is not None


def promote(
    registry: Path | str, reference: str, channel: str, *, policy: Path | None = None, signer: Signer | None = None
) -> Moved:
    """Check an artifact and put it into a channel, with a record of that.  Doing so again changes nothing.

    policy: what the artifact has to meet, and who may promote into the channel.  signer: whoever promotes.
    Raises what `verify` raises, and SignatureError when the policy does not let this signer promote; then nothing changed.
    """
    check_tag(channel)
    if is_version(channel):
        raise UsageError(
            f"{channel!r} reads as a version, and versions do not move; name a channel, such as production."
        )
    place = _Channel(open_repository(registry, reference, writing=True)[0], channel, policy)
    checked = verify(registry, reference, policy)
    with place.locked():
        now, records = place.now(), place.records(checked.digest)
        stays = now is not None and now.digest == checked.digest
        if stays and records and (records[-1].is_signed or signer is None):
            return place.moved(records[-1], checked, created=False)
        before = [] if now is None or stays else place.records(now.digest)
        sequence = 1 + max((record.promotion.sequence for record in (*records, *before)), default=0)
        if stays and records:
            # The last step once more, with the signature that it lacked.
            change = replace(records[-1].promotion, sequence=sequence, time=_time())
        else:
            previous = now.digest if now and not stays else None
            change = Promotion("promote", channel, sequence, previous, None, _time())
        return place.moved(place.record(change, checked, signer), checked, created=True)


def rollback(
    registry: Path | str, name: str, channel: str, *, policy: Path | None = None, signer: Signer | None = None
) -> Moved:
    """Put back what was in a channel before, the nearest that still verifies, with a record of that.

    name: NAME, or ADDRESS/NAME.  Raises UsageError when there is nothing to go back to, IntegrityError when nothing of it
    verifies.
    """
    check_tag(channel)
    address, rest = split_address(name)
    if ":" in rest or "@" in rest:
        raise UsageError(f"{name}: give the name alone; what the channel had before is what is asked for.")
    where = address or registry
    place = _Channel(open_repository(where, rest, writing=True)[0], channel, policy)
    now = place.repository.resolve(parse_reference(f"{rest}:{channel}"))
    skipped: list[tuple[str, str]] = []
    for earlier in place.earlier(now.digest):
        try:
            checked = verify(where, f"{rest}@{earlier.digest}", policy)
        except (IntegrityError, PublishRefusedError) as error:
            skipped.append((earlier.digest, str(error)))
            continue
        with place.locked():
            found = place.now()
            if found is None or found.digest != now.digest:
                raise AssayError(f"{place}: was moved meanwhile. Run the same command again.")
            sequence = place.records(now.digest)[-1].promotion.sequence + 1
            restores = earlier.promotion.sequence
            change = Promotion("rollback", channel, sequence, now.digest, restores, _time())
            return place.moved(place.record(change, checked, signer), checked, created=True, skipped=tuple(skipped))
    if skipped:
        reasons = " ".join(f"{digest}: {reason}" for digest, reason in skipped)
        raise IntegrityError(f"{place}: nothing that was here before verifies. {reasons}")
    raise UsageError(f"{place}: is {now.digest}, and no earlier promotion is recorded that could be gone back to.")


def promotions(repository: Repository, model: Descriptor) -> list[Record]:
    """The well-formed promotion records of a model under its name, by their sequence; nothing is trusted yet."""
    found: list[Record] = []
    for attestation in read_attestations(repository, model):
        if attestation.opened is None or attestation.opened.statement.name != repository.name:
            continue
        with contextlib.suppress(IntegrityError):
            if change := read_promotion(attestation.opened.statement, attestation.digest):
                found.append(Record(model.digest, attestation, change))
    return sorted(found, key=lambda record: record.promotion.sequence)


class _Channel:
    """One channel of a name; with a policy, only records that it trusts are seen.  SignatureError when it knows no such channel."""

    def __init__(self, repository: Repository, channel: str, policy: Path | None) -> None:
        self.repository = repository
        self.channel = channel
        self.policy: Policy | None = None if policy is None else load_policy(policy)
        if self.policy:
            check_channel(self.policy, repository.name, channel)

    def __str__(self) -> str:
        return f"{self.repository.location}: {self.repository.name}:{self.channel}"

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Held while a channel moves, where a registry has locks; elsewhere two promotions at once may both be recorded."""
        repository = self.repository
        return (
            repository.layout.channels_locked()
            if isinstance(repository, LayoutRepository)
            else contextlib.nullcontext()
        )

    def now(self) -> Descriptor | None:
        return tagged(self.repository, self.channel)

    def records(self, digest: str) -> list[Record]:
        """The records of putting a model into this channel, by their sequence."""
        model, pack = self._model(digest)
        found = [record for record in promotions(self.repository, model) if record.promotion.channel == self.channel]
        return [record for record in found if self._trusts(pack, record.attestation)]

    def earlier(self, digest: str) -> Iterator[Record]:
        """The promotions before the one that a model in this channel has now, nearest first."""
        records = self.records(digest)
        record = self._promoted(records[-1]) if records else None
        while record and (previous := record.promotion.previous):
            before = [found for found in self.records(previous) if found.promotion.sequence < record.promotion.sequence]
            record = self._promoted(before[-1]) if before else None
            if record:
                yield record

    def record(self, change: Promotion, checked: Verification, signer: Signer | None) -> Record:
        """Write a record, and move the channel; SignatureError when the policy does not let this signer do so."""
        _, pack = self._model(checked.digest)
        relied = [*checked.evidence, *(digest for met in checked.trusted or () for digest in met.attestations)]
        statement = promotion(
            self.repository.name,
            checked.digest,
            change,
            policy=(Path(self.policy.file).name, self.policy.digest) if self.policy else None,
            attestations=dict.fromkeys(relied),
            assay_version=__version__,
        )
        sealed = seal_statement(statement, signer)
        attachment = attachment_of(statement, sealed, signer)
        digest = attachment.descriptor(pack.descriptor).digest
        attestation = Attestation(digest, open_sealed(sealed, digest), None)
        if self.policy:
            check_promotion(self.policy, subject_of(self.repository, pack), self.channel, [attestation])
        self.repository.commit(pack.manifest, [attachment], (self.channel,))
        return Record(checked.digest, attestation, change)

    def moved(
        self, record: Record, checked: Verification, *, created: bool, skipped: tuple[tuple[str, str], ...] = ()
    ) -> Moved:
        change = record.promotion
        return Moved(
            registry=self.repository.location,
            name=self.repository.name,
            channel=self.channel,
            action=change.action,
            digest=record.digest,
            previous=change.previous,
            sequence=change.sequence,
            record=record.attestation.digest,
            created=created,
            signed=record.is_signed,
            trusted=checked.trusted,
            skipped=skipped,
        )

    def _promoted(self, record: Record) -> Record | None:
        """The promotion that a rollback went back to; a promotion itself; None when that record is gone."""
        if record.promotion.action == "promote":
            return record
        found = [
            other for other in self.records(record.digest) if other.promotion.sequence == record.promotion.restores
        ]
        return self._promoted(found[0]) if found else None

    def _model(self, digest: str) -> tuple[Descriptor, Pack]:
        model = self.repository.resolve(Reference(self.repository.name, None, digest))
        return model, read_pack(self.repository.read_manifest(model), f"{self.repository.location}: {digest}")

    def _trusts(self, pack: Pack, attestation: Attestation) -> bool:
        if self.policy is None:
            return True
        with contextlib.suppress(SignatureError):
            check_promotion(self.policy, subject_of(self.repository, pack), self.channel, [attestation])
            return True
        return False


def _time() -> str:
    """Now, for people to read: nothing depends on it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
