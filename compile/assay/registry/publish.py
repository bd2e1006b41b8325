"""Publish an artifact with its evidence, if and only if its verdict is a PASS for exactly these bytes.

The order makes a publish whole or absent: blobs, model manifest, evidence manifest (its `subject` is the model), and
last the index with the tags, in one atomic step.  Each blob is read back from the store before anything names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assay.errors import EXIT_INVALID, IntegrityError, PublishRefusedError
from assay.files import sha256_file
from assay.registry.layout import Layout
from assay.registry.modelpack import BUNDLE, CONFIG_TYPE, RECIPE, Pack, build_pack
from assay.registry.oci import (
    EMPTY_JSON,
    EMPTY_TYPE,
    MANIFEST_TYPE,
    TITLE,
    Descriptor,
    Manifest,
    describe,
    read_small,
)
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


@dataclass(frozen=True)
class Receipt:
    """What a publish did.

    digest: of the model manifest, what `pull` wants.  created: whether this name lacked this model before.  tags_set:
    those of `tags` that were new or moved.  blobs_written: blobs that were not in the registry, or were damaged
    there.
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

    @property
    def reference(self) -> str:
        """What to pull, whatever happens to the tags."""
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True)
class RunProof:
    """The proof of a run, and the files and bytes that hold it.

    json_files are kept as the bytes that were checked, so that what is stored is what was checked.
    """

    proof: Proof
    json_files: dict[str, bytes]
    other_files: dict[str, tuple[Path, Descriptor]]


def publish(
    artifact: Path,
    run: Path,
    registry: Path | str,
    name: str,
    tags: Sequence[str] = ("latest",),
    *,
    force: bool = False,
) -> Receipt:
    """Publish an artifact directory with the proof in its run directory; doing so again changes nothing.

    artifact: the model directory.  run: holds verdict.json, report.html and evidence/.  force: move a version tag; it
    does not lift the need for a PASS.
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
    layout = Layout.create(registry)
    evidence = _evidence_manifest(run_proof, pack)
    evidence_descriptor = _described_for_index(evidence)
    # Asked now so that a tag that may not move is known before gigabytes are copied; asked again under the lock.
    layout.index().publish(name, tags, model, evidence_descriptor, force=force, where=str(registry))
    written = _store_model(layout, artifact, pack, config) + _store_evidence(layout, run_proof, evidence)
    change = layout.publish(name, tags, model, evidence_descriptor, force=force)
    return Receipt(
        registry=str(registry),
        name=name,
        tags=tuple(tags),
        digest=model.digest,
        bundle_digest=pack.bundle_digest,
        evidence_digest=evidence_descriptor.digest,
        size_bytes=pack.size_bytes,
        created=change.model_is_new,
        tags_set=change.tags_set,
        evidence_created=change.evidence_is_new,
        blobs_written=written,
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
    other_files = {
        name: (path, Descriptor(PROOF_TYPES[name], sha256_file(path), path.stat().st_size))
        for name, path in paths.items()
        if name not in json_files
    }
    measurements = {name: descriptor.digest for name, (_, descriptor) in other_files.items()}
    proof = check_proof(
        json_files[VERDICT_JSON], json_files[EVIDENCE_JSON], measurements, bundle=bundle, recipe=recipe, where=str(run)
    )
    return RunProof(proof, json_files, other_files)


def _evidence_manifest(run_proof: RunProof, pack: Pack) -> Manifest:
    layers: list[Descriptor] = []
    for name, media_type in PROOF_TYPES.items():
        plain = (
            describe(run_proof.json_files[name], media_type)
            if name in run_proof.json_files
            else run_proof.other_files[name][1]
        )
        layers.append(Descriptor(media_type, plain.digest, plain.size, {TITLE: name}))
    annotations = {
        BUNDLE: pack.bundle_digest,
        RECIPE: run_proof.proof.verdict["recipe"],
        VERDICT: run_proof.proof.verdict["verdict"],
    }
    return Manifest(EVIDENCE_TYPE, describe(EMPTY_JSON, EMPTY_TYPE), tuple(layers), annotations, pack.descriptor)


def _described_for_index(evidence: Manifest) -> Descriptor:
    """The descriptor as a registry's referrers call shows it: with the manifest's type and annotations."""
    plain = describe(evidence.to_bytes(), MANIFEST_TYPE)
    return Descriptor(MANIFEST_TYPE, plain.digest, plain.size, evidence.annotations, EVIDENCE_TYPE)


def _store_model(layout: Layout, artifact: Path, pack: Pack, config: bytes) -> int:
    written = [layout.put_file(artifact / name, layer) for name, layer in pack.layers.items()]
    return sum([*written, layout.put_bytes(config, CONFIG_TYPE), layout.put_bytes(pack.manifest, MANIFEST_TYPE)])


def _store_evidence(layout: Layout, run_proof: RunProof, evidence: Manifest) -> int:
    written = [layout.put_bytes(data, PROOF_TYPES[name]) for name, data in run_proof.json_files.items()]
    written += [layout.put_file(path, descriptor) for path, descriptor in run_proof.other_files.values()]
    return sum(
        [*written, layout.put_bytes(EMPTY_JSON, EMPTY_TYPE), layout.put_bytes(evidence.to_bytes(), MANIFEST_TYPE)]
    )
