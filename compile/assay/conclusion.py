"""What follows from a run's evidence: its verdict, its report, and whether it may be published. Needs no model and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from assay.artifact import LOCK_NAME, directory_digest, read_manifest
from assay.errors import IntegrityError, UsageError
from assay.files import canonical_json, read_json, sha256_bytes, write_atomic
from assay.recipe import Evaluate, Gate
from assay.recipe_file import load_recipe
from assay.registry.attestations import attest
from assay.registry.publish import Receipt, publish
from assay.registry.signing import Signer
from assay_evals.comparison import Compared, Finished, compare
from assay_evals.evidence import HEADER_NAME, Evidence, read_evidence
from assay_evals.gate import judge
from assay_evals.report import ReportFormat, render_report
from assay_evals.verdict import Verdict, read_verdict, write_verdict

ARTIFACT, EVIDENCE, VERDICT, REPORT = "artifact", "evidence", "verdict.json", "report.html"
_WRITTEN: dict[str, ReportFormat] = {REPORT: "html", "report.md": "markdown", "junit.xml": "junit"}


def conclude(run: Path, evidence: Evidence) -> Verdict:
    """Judge the evidence of a run, and write its verdict and reports."""
    artifact = run / ARTIFACT
    _check_recipe(artifact, evidence)
    verdict = judge(evidence)
    write_verdict(run / VERDICT, verdict)
    manifest, lock = read_manifest(artifact), read_json(artifact / LOCK_NAME)
    for name, form in _WRITTEN.items():
        write_atomic(run / name, render_report(form, verdict, evidence, manifest, lock))
    return verdict


def report_run(run: Path, form: ReportFormat) -> bytes:
    """The report of a finished run in a form; nothing is measured or written."""
    verdict, evidence = _finished(run)
    artifact = run / ARTIFACT
    return render_report(form, verdict, evidence, read_manifest(artifact), read_json(artifact / LOCK_NAME))


def compare_runs(runs: Sequence[Path]) -> tuple[Compared, ...]:
    """Finished runs against the first of them, by their evidence."""
    return compare([Finished(str(run), evidence, verdict) for run in runs for verdict, evidence in [_finished(run)]])


def publish_run(
    run: Path, registry: Path | str, tags: Sequence[str], *, force: bool = False, signer: Signer | None = None
) -> Receipt:
    """Publish a finished run, when its verdict is PASS, follows from its evidence, and names exactly its artifact's bytes.

    signer: signs what is said about it; without one it is said unsigned.
    """
    _finished(run)
    artifact = run / ARTIFACT
    name = read_manifest(artifact)["name"]
    return publish(
        artifact, run, registry, name, tags, force=force, attach=lambda judged: attest(artifact, run, judged, signer)
    )


def _finished(run: Path) -> tuple[Verdict, Evidence]:
    """The verdict and the evidence of a run, of which the one follows from the other."""
    artifact = run / ARTIFACT
    if not artifact.is_dir() or not (run / VERDICT).is_file():
        raise UsageError(
            f"{run}: not a finished run (no {ARTIFACT} or {VERDICT}); give the directory that `assay compile` named."
        )
    written, evidence = read_verdict(run / VERDICT), read_evidence(run / EVIDENCE)
    _check_recipe(artifact, evidence)
    follows = judge(evidence)
    if written != follows:
        raise IntegrityError(
            f"{run / VERDICT}: says {written.verdict}, but {follows.verdict} follows from the evidence; the file was changed. "
            f"Run `assay gate {run}` to write it anew."
        )
    return written, evidence


def _check_recipe(artifact: Path, evidence: Evidence) -> None:
    """The gate and the samples that the evidence states are those of the recipe in the artifact's lock, by its digest."""
    stated, lock = evidence.header.recipe, read_json(artifact / LOCK_NAME)
    try:
        content = lock["recipe"]["content"]
        gate = Gate.model_validate_json(canonical_json(content["gate"]))
        evaluate = Evaluate.model_validate_json(canonical_json(content["evaluate"]))
        same = (stated.digest, stated.gate, stated.evaluate) == (sha256_bytes(canonical_json(content)), gate, evaluate)
    except (KeyError, TypeError, ValueError):
        same = False
    if not same:
        raise IntegrityError(
            f"{artifact.parent / EVIDENCE}: the recipe that it states is not the one in {artifact / LOCK_NAME}; one of them was "
            "changed. Run `assay compile` again."
        )


def judge_again(path: Path, recipe: Path | None = None) -> Verdict:
    """Judge evidence again.

    path: a run directory, whose verdict and report are written anew, or an evidence directory, beside which nothing is written.
    recipe: judge by its gate instead; then nothing is written in either case.
    """
    is_run = (path / EVIDENCE).is_dir()
    if not is_run and not (path / HEADER_NAME).is_file():
        raise UsageError(
            f"{path}: neither a run directory (no {EVIDENCE}/) nor an evidence directory (no {HEADER_NAME})."
        )
    evidence = read_evidence(path / EVIDENCE if is_run else path)
    if recipe is not None:
        return judge(evidence, load_recipe(recipe)[0].gate)
    if not is_run:
        return judge(evidence)
    found = directory_digest(path / ARTIFACT)
    if found != evidence.header.candidate.bundle_digest:
        raise IntegrityError(
            f"{path / ARTIFACT}: these are not the bytes that the evidence was measured on (bundle digest {found})."
        )
    return conclude(path, evidence)
