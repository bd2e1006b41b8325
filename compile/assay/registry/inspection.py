"""Look at a registry: what is published, what an artifact is, and whether all of it is still intact and proven."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.artifact import LOCK_NAME
from assay.errors import IntegrityError, UsageError
from assay.registry.base import Registry, read_attachment
from assay.registry.modelpack import Pack, build_pack, read_pack, recipe_digest
from assay.registry.oci import EMPTY_JSON, EMPTY_TYPE, IN_TOTO_TYPE, TITLE, Descriptor, describe, parse_json
from assay.registry.open import open_registry
from assay.registry.proof import (
    EVIDENCE_JSON,
    EVIDENCE_TYPE,
    MEASUREMENTS,
    PROOF_TYPES,
    VERDICT,
    VERDICT_JSON,
    Proof,
    check_proof,
)
from assay.registry.pull import PulledFile, Resolved, resolve
from assay.registry.reference import parse_address
from assay.registry.tags import CHANNEL, SIGNER

if TYPE_CHECKING:
    from assay.registry.attestations import Said
    from assay.registry.trust import Met


@dataclass(frozen=True)
class Listing:
    """One published name.  tag: None for a model that is reached by digest alone.

    annotations: `dev.assay.*` facts of the model.  verdicts: of its evidence, oldest first; signers: key ids (or sigstore) of
    what is said about it; promoted: channels that it was put into; all three as the registry lists them, not verified.
    problem: why this artifact cannot be pulled, when its manifest is damaged; then size and annotations are empty.
    """

    name: str
    tag: str | None
    digest: str
    size_bytes: int
    annotations: dict[str, str]
    verdicts: tuple[str, ...]
    signers: tuple[str, ...]
    promoted: tuple[str, ...]
    problem: str | None


@dataclass(frozen=True)
class Evidence:
    """An evidence manifest and the content of its verdict.json; layers: name → blob."""

    digest: str
    verdict: dict[str, Any]
    layers: dict[str, Descriptor]


@dataclass(frozen=True)
class Artifact:
    """All that a registry knows of one artifact.

    names: each "NAME:TAG" that leads to it.  config: the ModelPack config blob.  attestations: what is said about it, with
    signatures that are not verified: `verify` does that, by a policy.
    """

    reference: str
    digest: str
    bundle_digest: str
    size_bytes: int
    names: tuple[str, ...]
    annotations: dict[str, str]
    config: dict[str, Any]
    files: tuple[PulledFile, ...]
    evidence: tuple[Evidence, ...]
    attestations: tuple[Said, ...]


@dataclass(frozen=True)
class Verification:
    """What was found intact: blobs (each counted once), their bytes, and the evidence manifests with a PASS.

    trusted: what of a policy is met, None when none was given; signatures count by a policy alone.  strangers: files that
    lie beside the model's and are not of it, or were changed there since.
    """

    reference: str
    digest: str
    bundle_digest: str
    blobs: int
    size_bytes: int
    evidence: tuple[str, ...]
    trusted: tuple[Met, ...] | None
    strangers: tuple[str, ...]


@dataclass(frozen=True)
class DirectoryFacts:
    """What an artifact directory is.  digest: of the manifest that this release would publish it under."""

    directory: Path
    bundle_digest: str
    digest: str
    size_bytes: int
    files: tuple[PulledFile, ...]


def list_artifacts(registry: Path | str) -> tuple[Listing, ...]:
    """Every name and tag in a registry, sorted; a damaged artifact is listed with its problem."""
    opened = open_registry(registry)
    listings: list[Listing] = []
    for name in opened.names():
        repository = opened.repository(name)
        for tag, descriptor in repository.models():
            found = repository.referrers(descriptor.digest, EVIDENCE_TYPE)
            verdicts = tuple(evidence.annotations.get(VERDICT, "unknown") for evidence in found)
            try:
                pack = read_pack(repository.read_manifest(descriptor), f"{opened.location}: {descriptor.digest}")
                size, annotations, problem = pack.size_bytes, pack.annotations, None
            except IntegrityError as error:
                size, annotations, problem = 0, dict[str, str](), str(error)
            said = repository.referrers(descriptor.digest, IN_TOTO_TYPE)
            listings.append(
                Listing(
                    name=name,
                    tag=tag,
                    digest=descriptor.digest,
                    size_bytes=size,
                    annotations=annotations,
                    verdicts=verdicts,
                    signers=_listed(said, SIGNER),
                    promoted=_listed(said, CHANNEL),
                    problem=problem,
                )
            )
    return tuple(sorted(listings, key=lambda listing: (listing.name, listing.tag or "", listing.digest)))


def show(registry: Path | str, reference: str) -> Artifact:
    """One artifact with its files, annotations, names and verdicts.

    Manifests, config and verdicts are verified, model files and measurements are not: `verify` does that.
    Raises UsageError when there is no such artifact, IntegrityError.
    """
    from assay.registry.attestations import read_attestations, said

    resolved = resolve(registry, reference)
    repository, digest, pack = resolved.repository, resolved.descriptor.digest, resolved.pack
    return Artifact(
        reference=reference,
        digest=digest,
        bundle_digest=pack.bundle_digest,
        size_bytes=pack.size_bytes,
        names=tuple(
            sorted(f"{repository.name}:{tag}" for tag, model in repository.models() if tag and model.digest == digest)
        ),
        annotations=pack.annotations,
        config=resolved.config,
        files=_files(pack),
        evidence=tuple(
            _read_evidence(resolved, descriptor) for descriptor in repository.referrers(digest, EVIDENCE_TYPE)
        ),
        attestations=tuple(said(attestation) for attestation in read_attestations(repository, resolved.descriptor)),
    )


def verify(
    registry: Path | str, reference: str, policy: Path | None = None, channel: str | None = None
) -> Verification:
    """Check every blob of an artifact and its evidence, and that a PASS for exactly these bytes rests on them.

    policy: a trust policy that it has to meet, too.  channel: of the policy, into which it must have been promoted.
    Raises UsageError when there is no such artifact, PublishRefusedError when a verdict is not PASS, IntegrityError
    for everything that is damaged, missing or unproven.
    """
    resolved = resolve(registry, reference, policy, channel)
    repository, pack = resolved.repository, resolved.pack
    found = repository.referrers(resolved.descriptor.digest, EVIDENCE_TYPE)
    if not found:
        raise IntegrityError(
            f"{repository.location}: {reference} has no evidence: nothing here shows that it passed its gate."
        )
    # Manifests, which were read and verified by now, and what has yet to be.
    manifests = [resolved.descriptor]
    blobs = [pack.config, describe(EMPTY_JSON, EMPTY_TYPE), *pack.layers.values()]
    for descriptor in found:
        evidence = _read_evidence(resolved, descriptor)
        _check_evidence(resolved, evidence)
        manifests.append(descriptor)
        blobs += evidence.layers.values()
    for descriptor in repository.referrers(resolved.descriptor.digest, IN_TOTO_TYPE):
        manifests.append(descriptor)
        blobs += read_attachment(repository, descriptor, resolved.descriptor).layers
    unread = {blob.digest: blob for blob in blobs}
    for blob in unread.values():
        repository.copy_blob(blob, None)
    unique = unread | {manifest.digest: manifest for manifest in manifests}
    return Verification(
        reference=reference,
        digest=resolved.descriptor.digest,
        bundle_digest=pack.bundle_digest,
        blobs=len(unique),
        size_bytes=sum(blob.size for blob in unique.values()),
        evidence=tuple(descriptor.digest for descriptor in found),
        trusted=resolved.trusted,
        strangers=repository.strangers(resolved.descriptor),
    )


def verify_pulled(
    registry: Path | str, facts: DirectoryFacts, policy: Path | None = None, channel: str | None = None
) -> Verification:
    """Find a directory's bytes in a registry, and check everything there as `verify` does; IntegrityError when it has no such bytes."""
    opened = open_registry(registry)
    found = _published(opened, facts.bundle_digest)
    if found is None:
        raise IntegrityError(
            f"{facts.directory}: its bytes (bundle digest {facts.bundle_digest}) are of no artifact in {opened.location}. They were "
            "changed, or they come from elsewhere: name that registry (--registry), or the digest they must have (--digest)."
        )
    return verify(registry, found, policy, channel)


def _published(registry: Registry, bundle: str) -> str | None:
    """NAME@DIGEST of the artifact with a bundle digest; damaged ones are passed over."""
    for name in registry.names():
        repository = registry.repository(name)
        for _, descriptor in repository.models():
            with suppress(IntegrityError):
                if read_pack(repository.read_manifest(descriptor), name).bundle_digest == bundle:
                    return f"{name}@{descriptor.digest}"
    return None


def is_directory(registry: Path | str, reference: str) -> bool:
    """Whether a directory is meant, not a published artifact; UsageError when it may be either."""
    if not Path(reference).is_dir():
        return False
    if "/" in reference or reference.startswith("."):
        return True
    if not parse_address(registry).scheme and Path(registry).is_dir() and reference in open_registry(registry).names():
        raise UsageError(
            f"{reference} is a directory here and an artifact in {registry}: write ./{reference} or {reference}:TAG."
        )
    return True


def verify_directory(directory: Path, expected: str | None = None) -> DirectoryFacts:
    """Hash an artifact directory, wherever it came from.

    expected: a bundle digest or a manifest digest that it must have.  Raises IntegrityError when it has another, or
    when the directory is not an artifact.
    """
    pack, _ = build_pack(directory)
    digest = pack.descriptor.digest
    if expected is not None and expected not in (pack.bundle_digest, digest):
        raise IntegrityError(
            f"{directory}: its bytes have the bundle digest {pack.bundle_digest} (manifest {digest}), "
            f"expected was {expected}."
        )
    return DirectoryFacts(directory, pack.bundle_digest, digest, pack.size_bytes, _files(pack))


def _read_evidence(resolved: Resolved, descriptor: Descriptor) -> Evidence:
    """Read an evidence manifest and its verdict, and check that they are about this model and nothing else."""
    repository = resolved.repository
    where = f"{repository.location}: evidence {descriptor.digest}"
    manifest = read_attachment(repository, descriptor, resolved.descriptor)
    layers = {layer.annotations.get(TITLE, ""): layer for layer in manifest.layers}
    if list(layers) != list(PROOF_TYPES) or len(layers) != len(manifest.layers):
        raise IntegrityError(f"{where}: holds {', '.join(layers)}; needed are {', '.join(PROOF_TYPES)}.")
    return Evidence(descriptor.digest, parse_json(repository.read_json_blob(layers[VERDICT_JSON]), where), layers)


def _check_evidence(resolved: Resolved, evidence: Evidence) -> Proof:
    read, pack = resolved.repository.read_json_blob, resolved.pack
    verdict, header = read(evidence.layers[VERDICT_JSON]), read(evidence.layers[EVIDENCE_JSON])
    measurements = {name: evidence.layers[name].digest for name in MEASUREMENTS}
    lock = pack.layers.get(LOCK_NAME)
    recipe = recipe_digest(parse_json(read(lock), LOCK_NAME)) if lock else None
    where = f"{resolved.repository.location}: evidence {evidence.digest}"
    return check_proof(verdict, header, measurements, bundle=pack.bundle_digest, recipe=recipe, where=where)


def _listed(said: Sequence[Descriptor], annotation: str) -> tuple[str, ...]:
    """What a registry lists under an annotation, each once, sorted."""
    return tuple(sorted({found.annotations[annotation] for found in said if annotation in found.annotations}))


def _files(pack: Pack) -> tuple[PulledFile, ...]:
    return tuple(PulledFile(name, layer.digest, layer.size) for name, layer in pack.layers.items())
