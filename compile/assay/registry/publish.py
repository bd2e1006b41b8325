"""Publish an artifact with its evidence, if and only if its verdict is a PASS for exactly these bytes.

The order makes a publish whole or absent: the blobs, then the model's manifest, then the evidence (attached to the
model, as is whatever else is said about it), and last the tags.  Nothing is named before it is stored and verified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from assay.errors import EXIT_INVALID, IntegrityError, PublishRefusedError
from assay.registry.base import Attachment, Part, part
from assay.registry.modelpack import BUNDLE, RECIPE, Pack, build_pack
from assay.registry.oci import Descriptor, read_small
from assay.registry.open import create_registry
from assay.registry.proof import (
    EVIDENCE_JSON,
    EVIDENCE_TYPE,
    MEASUREMENTS,
    PROOF_TYPES,
    REPORT_HTML,
    VERDICT,
    VERDICT_JSON,
    Proof,
    check_proof,
    check_verdict,
)
from assay.registry.reference import check_name, check_tag
from assay.registry.tags import SIGNER, refuse_channels


@dataclass(frozen=True)
class Receipt:
    """What a publish did.

    digest: of the model manifest, what `pull` wants.  created: whether this name lacked this model before.  tags_set:
    those of `tags` that were new or moved.  blobs_written: blobs that were not in the registry, or were damaged
    there.  attestations: digests of what else is said about the model; signer: who signed that, None for nobody.
    """

    registry: str
    name: str
    tags: tuple[str, ...]
    digest: str
    bundle_digest: str
    evidence_digest: str
    size_bytes: int
    created: bool
    tags_set: tuple[str, ...]
    evidence_created: bool
    blobs_written: int
    attestations: tuple[str, ...]
    signer: str | None

    @property
    def reference(self) -> str:
        """What to pull, whatever happens to the tags."""
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True)
class RunProof:
    """The proof of a run, and the files and bytes that hold it.

    parts: name → layer, in the order of PROOF_TYPES; the JSON files as the bytes that were checked, so that what is
    stored is what was checked.
    """

    proof: Proof
    parts: dict[str, Part]


@dataclass(frozen=True)
class Judged:
    """A model that is about to be published, and what it passed by.

    model, evidence: descriptors of the two manifests; the evidence's has the model as its subject.
    """

    name: str
    model: Descriptor
    evidence: Descriptor
    pack: Pack
    proof: Proof


def say_nothing(judged: Judged) -> Sequence[Attachment]:
    """No attachment beside the evidence."""
    return ()


def publish(
    artifact: Path,
    run: Path,
    registry: Path | str,
    name: str,
    tags: Sequence[str] = ("latest",),
    *,
    force: bool = False,
    attach: Callable[[Judged], Sequence[Attachment]] = say_nothing,
) -> Receipt:
    """Publish an artifact directory with the proof in its run directory; doing so again changes nothing.

    artifact: the model directory.  run: holds verdict.json, report.html and evidence/.  force: move a version tag; it
    does not lift the need for a PASS.  attach: what else to say about the model; called before anything is stored.
    Raises PublishRefusedError (exit code 1 FAIL, 3 INCONCLUSIVE, 4 INVALID or no verdict), IntegrityError when the
    verdict is about other bytes or the evidence is not what it was drawn from, UsageError for bad names and for
    version tags that would move, AssayError when the disk is full or read-only.  In each of these cases nothing is
    published.
    """
    check_name(name)
    for tag in tags:
        check_tag(tag)
    pack, config = build_pack(artifact)
    run_proof = load_proof(run, pack.bundle_digest, pack.annotations.get(RECIPE))
    model = pack.descriptor
    evidence = _evidence(run_proof, pack)
    judged = Judged(name, model, evidence.descriptor(model), pack, run_proof.proof)
    said = attach(judged)
    repository = create_registry(registry).repository(name)
    # Asked now so that a tag that may not move is known before gigabytes are copied; asked again when it is set.
    repository.check_tags(model.digest, tags, force=force)
    refuse_channels(repository, model.digest, tags)
    parts = [Part(layer, artifact / name) for name, layer in pack.layers.items()]
    written = sum(repository.put(part) for part in [*parts, Part(pack.config, config)])
    change = repository.commit(pack.manifest, (evidence, *said), tags, force=force)
    return Receipt(
        registry=str(registry),
        name=name,
        tags=tuple(tags),
        digest=model.digest,
        bundle_digest=pack.bundle_digest,
        evidence_digest=judged.evidence.digest,
        size_bytes=pack.size_bytes,
        created=change.model_is_new,
        tags_set=change.tags_set,
        evidence_created=judged.evidence.digest in change.attached,
        blobs_written=written + change.written,
        attestations=tuple(attachment.descriptor(model).digest for attachment in said),
        signer=next((attachment.annotations[SIGNER] for attachment in said if SIGNER in attachment.annotations), None),
    )


def load_proof(run: Path, bundle: str, recipe: str | None) -> RunProof:
    """Read and check the proof in a run directory, for an artifact with these digests.

    Raises as `publish` does; a missing verdict is a refusal, a missing file of the evidence an IntegrityError.
    """
    if not (run / VERDICT_JSON).is_file():
        message = f"{run}: no {VERDICT_JSON}: this artifact was never judged. Evaluate it first."
        raise PublishRefusedError(message, EXIT_INVALID)
    paths = {name: run / "evidence" / name for name in (EVIDENCE_JSON, *MEASUREMENTS)}
    paths |= {VERDICT_JSON: run / VERDICT_JSON, REPORT_HTML: run / REPORT_HTML}
    # The verdict alone can refuse: an INVALID run may have no evidence to show.
    json_files = {VERDICT_JSON: read_small(paths[VERDICT_JSON])}
    check_verdict(json_files[VERDICT_JSON], bundle, str(paths[VERDICT_JSON]))
    for path in paths.values():
        if not path.is_file():
            raise IntegrityError(f"{path}: missing; the verdict rests on it. Run the evaluation again.")
    json_files[EVIDENCE_JSON] = read_small(paths[EVIDENCE_JSON])
    parts = {
        name: part(name, media_type, json_files.get(name, paths[name])) for name, media_type in PROOF_TYPES.items()
    }
    measurements = {name: parts[name].descriptor.digest for name in MEASUREMENTS}
    proof = check_proof(
        json_files[VERDICT_JSON], json_files[EVIDENCE_JSON], measurements, bundle=bundle, recipe=recipe, where=str(run)
    )
    return RunProof(proof, parts)


def _evidence(run_proof: RunProof, pack: Pack) -> Attachment:
    annotations = {
        BUNDLE: pack.bundle_digest,
        RECIPE: run_proof.proof.verdict["recipe"],
        VERDICT: run_proof.proof.verdict["verdict"],
    }
    return Attachment(EVIDENCE_TYPE, tuple(run_proof.parts.values()), annotations)
