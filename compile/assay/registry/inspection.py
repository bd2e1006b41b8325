"""Look at a registry: what is published, what an artifact is, and whether all of it is still intact and proven."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.artifact import LOCK_NAME
from assay.errors import IntegrityError, UsageError
from assay.registry.layout import Layout
from assay.registry.modelpack import Pack, build_pack, read_pack, recipe_digest
from assay.registry.oci import EMPTY_JSON, EMPTY_TYPE, TITLE, Descriptor, describe, parse_json, parse_manifest
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


@dataclass(frozen=True)
class Listing:
    """One published name.  tag: None for a model that is reached by digest alone.

    annotations: `dev.assay.*` facts of the model.  verdicts: of its evidence, oldest first, as the index states them.
    problem: why this artifact cannot be pulled, when its manifest is damaged; then size and annotations are empty.
    """

    name: str
    tag: str | None
    digest: str
    size_bytes: int
    annotations: dict[str, str]
    verdicts: tuple[str, ...]
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

    names: each "NAME:TAG" that leads to it.  config: the ModelPack config blob.
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


@dataclass(frozen=True)
class Verification:
    """What was found intact: blobs (each counted once), their bytes, and the evidence manifests with a PASS."""

    reference: str
    digest: str
    bundle_digest: str
    blobs: int
    size_bytes: int
    evidence: tuple[str, ...]


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
    layout = Layout.open(registry)
    index = layout.index()
    listings: list[Listing] = []
    for name, tag, descriptor in index.models():
        verdicts = tuple(entry.annotations.get(VERDICT, "unknown") for entry in index.evidence_for(descriptor.digest))
        try:
            pack = read_pack(layout.read_json_blob(descriptor), f"{layout.root}: {descriptor.digest}")
            size, annotations, problem = pack.size_bytes, pack.annotations, None
        except IntegrityError as error:
            size, annotations, problem = 0, dict[str, str](), str(error)
        listings.append(Listing(name, tag, descriptor.digest, size, annotations, verdicts, problem))
    return tuple(sorted(listings, key=lambda listing: (listing.name, listing.tag or "", listing.digest)))


def show(registry: Path | str, reference: str) -> Artifact:
    """One artifact with its files, annotations, names and verdicts.

    Manifests, config and verdicts are verified, model files and measurements are not: `verify` does that.
    Raises UsageError when there is no such artifact, IntegrityError.
    """
    layout = Layout.open(registry)
    resolved = resolve(layout, reference)
    digest, pack = resolved.descriptor.digest, resolved.pack
    models = layout.index().models()
    return Artifact(
        reference=reference,
        digest=digest,
        bundle_digest=pack.bundle_digest,
        size_bytes=pack.size_bytes,
        names=tuple(sorted(f"{name}:{tag}" for name, tag, descriptor in models if tag and descriptor.digest == digest)),
        annotations=pack.annotations,
        config=resolved.config,
        files=_files(pack),
        evidence=tuple(_read_evidence(layout, resolved, descriptor) for descriptor in layout.evidence_for(digest)),
    )


def verify(registry: Path | str, reference: str) -> Verification:
    """Check every blob of an artifact and its evidence, and that a PASS for exactly these bytes rests on them.

    Raises UsageError when there is no such artifact, PublishRefusedError when a verdict is not PASS, IntegrityError
    for everything that is damaged, missing or unproven.
    """
    layout = Layout.open(registry)
    resolved = resolve(layout, reference)
    pack = resolved.pack
    found = layout.evidence_for(resolved.descriptor.digest)
    if not found:
        raise IntegrityError(f"{layout.root}: {reference} has no evidence: nothing here shows that it passed its gate.")
    blobs = [resolved.descriptor, pack.config, describe(EMPTY_JSON, EMPTY_TYPE), *pack.layers.values()]
    for descriptor in found:
        evidence = _read_evidence(layout, resolved, descriptor)
        _check_evidence(layout, pack, evidence)
        blobs += [descriptor, *evidence.layers.values()]
    unique = {blob.digest: blob for blob in blobs}
    for blob in unique.values():
        layout.copy_blob(blob, None)
    return Verification(
        reference=reference,
        digest=resolved.descriptor.digest,
        bundle_digest=pack.bundle_digest,
        blobs=len(unique),
        size_bytes=sum(blob.size for blob in unique.values()),
        evidence=tuple(descriptor.digest for descriptor in found),
    )


def verify_pulled(registry: Path | str, facts: DirectoryFacts) -> Verification:
    """Find a directory's bytes in a registry, and check everything there as `verify` does; IntegrityError when it has no such bytes."""
    layout = Layout.open(registry)
    for name, _, descriptor in layout.index().models():
        with suppress(IntegrityError):
            pack = read_pack(layout.read_json_blob(descriptor), name)
            if pack.bundle_digest == facts.bundle_digest:
                break
    else:
        raise IntegrityError(
            f"{facts.directory}: its bytes (bundle digest {facts.bundle_digest}) are of no artifact in {layout.root}. They were "
            "changed, or they come from elsewhere: name that registry (--registry), or the digest they must have (--digest)."
        )
    return verify(registry, f"{name}@{descriptor.digest}")


def is_directory(registry: Path | str, reference: str) -> bool:
    """Whether a directory is meant, not a published artifact; UsageError when it may be either."""
    if not Path(reference).is_dir():
        return False
    if "/" in reference or reference.startswith("."):
        return True
    if any(listing.name == reference for listing in (list_artifacts(registry) if Path(registry).is_dir() else ())):
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


def _read_evidence(layout: Layout, resolved: Resolved, descriptor: Descriptor) -> Evidence:
    """Read an evidence manifest and its verdict, and check that they are about this model and nothing else."""
    where = f"{layout.root}: evidence {descriptor.digest}"
    manifest = parse_manifest(layout.read_json_blob(descriptor), where)
    subject = manifest.subject
    model = resolved.descriptor
    if manifest.artifact_type != EVIDENCE_TYPE or manifest.config.digest != describe(EMPTY_JSON, EMPTY_TYPE).digest:
        raise IntegrityError(f"{where}: not evidence, but {manifest.artifact_type!r}.")
    if subject is None or (subject.digest, subject.size) != (model.digest, model.size):
        raise IntegrityError(f"{where}: its subject is not {model.digest}.")
    layers = {layer.annotations.get(TITLE, ""): layer for layer in manifest.layers}
    if list(layers) != list(PROOF_TYPES) or len(layers) != len(manifest.layers):
        raise IntegrityError(f"{where}: holds {', '.join(layers)}; needed are {', '.join(PROOF_TYPES)}.")
    return Evidence(descriptor.digest, parse_json(layout.read_json_blob(layers[VERDICT_JSON]), where), layers)


def _check_evidence(layout: Layout, pack: Pack, evidence: Evidence) -> Proof:
    verdict = layout.read_json_blob(evidence.layers[VERDICT_JSON])
    header = layout.read_json_blob(evidence.layers[EVIDENCE_JSON])
    measurements = {name: evidence.layers[name].digest for name in MEASUREMENTS}
    lock = pack.layers.get(LOCK_NAME)
    recipe = recipe_digest(parse_json(layout.read_json_blob(lock), LOCK_NAME)) if lock else None
    where = f"{layout.root}: evidence {evidence.digest}"
    return check_proof(verdict, header, measurements, bundle=pack.bundle_digest, recipe=recipe, where=where)


def _files(pack: Pack) -> tuple[PulledFile, ...]:
    return tuple(PulledFile(name, layer.digest, layer.size) for name, layer in pack.layers.items())
