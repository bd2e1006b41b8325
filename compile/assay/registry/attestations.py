"""Statements about a published model, as attachments of it: made by a publish, read again, checked by a policy.

Each is one layer: a plain in-toto statement when nobody signs, else a DSSE envelope or a sigstore bundle.  A publish
always attaches its three, so that a bill of materials and the provenance are there to be read; one that is not signed
counts for no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.artifact import LOCK_NAME, MANIFEST_NAME
from assay.errors import IntegrityError, UsageError
from assay.files import sha256_bytes
from assay.registry.base import Attachment, Repository, part, read_attachment
from assay.registry.bom import bom
from assay.registry.keyless import BUNDLE_TYPE
from assay.registry.modelpack import BUNDLE, RECIPE, Pack
from assay.registry.oci import IN_TOTO_TYPE, Descriptor, parse_json, read_small
from assay.registry.policy import Policy
from assay.registry.proof import EVIDENCE_JSON, EVIDENCE_TYPE, VERDICT_JSON
from assay.registry.publish import Judged
from assay.registry.reference import Reference
from assay.registry.signing import KEYLESS, Sealed, Signer, open_sealed, seal_statement
from assay.registry.statements import Promotion, Statement, gate_result, provenance, read_promotion
from assay.registry.tags import CHANNEL, SIGNER
from assay.registry.trust import Attestation, Met, Subject, check_channel, check_trust

PREDICATE = "in-toto.io/predicate-type"


@dataclass(frozen=True)
class Said:
    """An attestation as it is shown.  kind: its word, or the URI of its predicate.  signers: key ids as it claims them, or sigstore.

    promotion: what a promotion record says.  problem: why it cannot be read; then the rest is empty.
    """

    digest: str
    kind: str
    name: str
    signers: tuple[str, ...]
    promotion: Promotion | None
    problem: str | None


def attest(artifact: Path, run: Path, judged: Judged, signer: Signer | None) -> tuple[Attachment, ...]:
    """What a publish says about a model: that its gate passed, how it was made, what is in it.

    artifact, run: the directories that are published.  Raises IntegrityError when they have changed since they were judged.
    """
    return tuple(
        attachment_of(statement, seal_statement(statement, signer), signer)
        for statement in _statements(artifact, run, judged)
    )


def attachment_of(statement: Statement, sealed: Sealed, signer: Signer | None) -> Attachment:
    """A sealed statement as an attachment, with the facts that a listing shows."""
    annotations = {PREDICATE: statement.predicate_type}
    if isinstance(channel := statement.predicate.get("assay_channel"), str):
        annotations[CHANNEL] = channel
    if signer is not None:
        annotations[SIGNER] = signer.label
    return Attachment(IN_TOTO_TYPE, (part("statement.json", sealed.media_type, sealed.data),), annotations)


def read_attestations(repository: Repository, model: Descriptor) -> tuple[Attestation, ...]:
    """Every statement about a model, oldest first where the registry keeps the order; nothing is trusted yet."""
    return tuple(_read(repository, found, model) for found in repository.referrers(model.digest, IN_TOTO_TYPE))


def said(attestation: Attestation) -> Said:
    """An attestation for showing."""
    opened = attestation.opened
    if opened is None:
        return Said(attestation.digest, "", "", (), None, attestation.problem)
    signers = [keyid or "a key without an id" for keyid, _ in opened.envelope.signatures] if opened.envelope else []
    if opened.sealed.media_type == BUNDLE_TYPE:
        signers = [KEYLESS]
    statement, record, problem = opened.statement, None, None
    try:
        record = read_promotion(statement, attestation.digest)
    except IntegrityError as error:
        problem = str(error)
    return Said(attestation.digest, statement.kind, statement.name, tuple(signers), record, problem)


def admit(
    repository: Repository, reference: Reference, pack: Pack, policy: Policy, channel: str | None = None
) -> tuple[Met, ...]:
    """What of a policy a model meets; SignatureError when it does not meet all.  Reads no blob of the model.

    reference: as it was asked for; when its tag is a channel of the policy, a promotion into it is needed, too.
    channel: the same whatever the tag; SignatureError when the policy has no such channel.
    """
    if reference.name is None:
        raise UsageError(
            f"{reference}: a policy is about names, and this has none. Write {repository.name}@{reference.digest}."
        )
    subject = subject_of(repository, pack)
    if channel is not None:
        check_channel(policy, subject.name, channel)
    return check_trust(policy, subject, read_attestations(repository, pack.descriptor), channel or reference.tag)


def subject_of(repository: Repository, pack: Pack) -> Subject:
    """The model as a policy asks about it."""
    evidence = tuple(found.digest for found in repository.referrers(pack.descriptor.digest, EVIDENCE_TYPE))
    return Subject(repository.name, pack.descriptor.digest, pack.bundle_digest, pack.annotations.get(RECIPE), evidence)


def _statements(artifact: Path, run: Path, judged: Judged) -> Sequence[Statement]:
    files, verdict, proof = judged.pack.layers, judged.proof.verdict, judged.proof
    about = _read_json(artifact / MANIFEST_NAME, files[MANIFEST_NAME].digest)
    lock = _read_json(artifact / LOCK_NAME, files[LOCK_NAME].digest)
    evidence = _read_json(run / "evidence" / EVIDENCE_JSON, proof.evidence_digest)
    digests = {
        "evidence": judged.evidence.digest,
        EVIDENCE_JSON: proof.evidence_digest,
        VERDICT_JSON: proof.verdict_digest,
    }
    name, digest = judged.name, judged.model.digest
    return (
        gate_result(
            name,
            digest,
            bundle=judged.pack.annotations[BUNDLE],
            verdict=verdict,
            evidence=evidence,
            digests=digests,
        ),
        provenance(name, digest, lock=lock, lock_digest=files[LOCK_NAME].digest, evidence=judged.evidence.digest),
        bom(name, digest, about=about, lock=lock, verdict=verdict, files=files),
    )


def _read_json(path: Path, digest: str) -> dict[str, Any]:
    data = read_small(path)
    if sha256_bytes(data) != digest:
        raise IntegrityError(f"{path}: was changed while it was published. Run the same command again.")
    return parse_json(data, str(path))


def _read(repository: Repository, found: Descriptor, model: Descriptor) -> Attestation:
    where = f"{repository.location}: {found.digest}"
    try:
        manifest = read_attachment(repository, found, model)
        if len(manifest.layers) != 1:
            raise IntegrityError(f"{where}: has {len(manifest.layers)} layers; a statement is one.")
        sealed = Sealed(manifest.layers[0].media_type, repository.read_json_blob(manifest.layers[0]))
        return Attestation(found.digest, open_sealed(sealed, where), None)
    except IntegrityError as error:
        return Attestation(found.digest, None, str(error))
