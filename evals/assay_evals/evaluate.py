"""Measure a candidate against its baseline on their own runtime; measurements of the same bytes are taken from the cache.

The quality stage and the speed stage are cached apart, by the digests of the model files, the text, the settings, the tools, this
machine and the code that measures; the gate is not part of their keys, so another gate is judged on the same measurements.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from assay.artifact import LOCK_NAME, MANIFEST_NAME, bundle_digest, read_manifest, size_bytes
from assay.calibration import encode
from assay.errors import UsageError
from assay.host import code_digest, environment, machine_facts
from assay.job import Job, evaluation_documents, load_tokenizer
from assay.targets import TARGETS
from assay.text import Document, texts_digest
from assay.workspace import Stage, Workspace
from assay_evals.evidence import Arm, Evidence, Header, QualityRow, RecipeUsed, TextUsed, read_evidence, write_evidence
from assay_evals.quality.checks import decode_path, disjoint_texts, same_template, same_tokenizer
from assay_evals.quality.measure import measure_continuations, measure_quality
from assay_evals.quality.passages import select_passages, select_prompts
from assay_evals.runtimes.base import open_runtime, runtime_version
from assay_evals.speed.measure import Arm as ArmName
from assay_evals.speed.measure import measure_speed, requests_of

_ROWS = "rows"
_QUALITY_CODE = ("assay_evals.evaluate", "assay_evals.quality", "assay_evals.runtimes")
_SPEED_CODE = ("assay_evals.evaluate", "assay_evals.speed", "assay_evals.runtimes")
SPEED_MEASUREMENTS = "speed_measurements"


def evaluate(job: Job, workspace: Workspace, destination: Path, *, fresh: bool) -> Evidence:
    """Write the evidence on the built candidate to `destination`.  fresh: measure again although cached."""
    comparison = _Comparison.of(job, workspace)
    quality_stage, speed_stage = comparison.stages()

    def quality_rows(partial: Path) -> None:
        comparison.quality(partial, workspace)

    def speed_rows(partial: Path) -> None:
        comparison.speed(partial, workspace, speed_stage)

    quality = read_evidence(workspace.build(quality_stage, quality_rows, again=fresh) / _ROWS)
    speed = read_evidence(workspace.build(speed_stage, speed_rows, again=fresh) / _ROWS)
    environment = speed.header.environment
    text, checks = quality.header.text, quality.header.checks
    whole = dataclasses.replace(comparison.header, text=text, checks=checks, environment=environment)
    return write_evidence(destination, whole, (*quality.windows, *quality.clozes, *quality.continuations), speed.runs)


def check_evaluation(job: Job) -> None:
    """UsageError when evaluating must fail: text that is too short or was calibrated on, or a runtime that is not there.

    Asked before hours are spent on building what could then not be measured.
    """
    runtime_version(TARGETS[job.recipe.target.format].runtime)
    documents, tokenizer = evaluation_documents(job), load_tokenizer(job.checkpoint.directory)
    passages = select_passages(documents, tokenizer, job.recipe.evaluate)
    select_prompts(passages, job.recipe.evaluate)
    _requests(job, documents, tokenizer)
    unseen = disjoint_texts(job.tokens.tolist(), [passage.tokens for passage in passages])
    if not unseen.passed:
        raise UsageError(f"evaluate.text was calibrated on: {unseen.detail} Use another text for one of the two.")


def measure_stages(job: Job, workspace: Workspace) -> tuple[Stage, Stage]:
    """The quality stage and the speed stage of the two built artifacts."""
    return _Comparison.of(job, workspace).stages()


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Two artifacts, the text they are compared on, and what the evidence will say of them."""

    job: Job
    candidate: Path
    baseline: Path
    documents: list[Document]
    header: Header

    @classmethod
    def of(cls, job: Job, workspace: Workspace) -> _Comparison:
        documents = evaluation_documents(job)
        candidate, baseline = workspace.path(job.candidate_stage), workspace.path(job.baseline_stage)
        return cls(job, candidate, baseline, documents, _header(job, workspace, documents))

    @property
    def runtime(self) -> str:
        return TARGETS[self.job.recipe.target.format].runtime

    def stages(self) -> tuple[Stage, Stage]:
        """The quality stage and the speed stage."""
        facts = {
            "candidate": self.header.candidate.model_digest,
            "baseline": self.header.baseline.model_digest,
            "text": self.header.text.digest,
            "tools": self.job.lock["tools"],
            "host": self.job.lock["host"],
        }
        settings = self.job.recipe.evaluate.model_dump(mode="json")
        calibration = {"calibration": self.job.lock["calibration"]["tokens_digest"]}
        quality = calibration | {name: settings[name] for name in ("text", "length", "quality")}
        speed = {name: settings[name] for name in ("speed", "blocks")} | {"machine": machine_facts()}
        return (
            Stage("quality", facts | quality | {"code": code_digest(*_QUALITY_CODE)}),
            Stage("speed", facts | speed | {"code": code_digest(*_SPEED_CODE)}),
        )

    def quality(self, partial: Path, workspace: Workspace) -> None:
        tokenizer = load_tokenizer(self.job.checkpoint.directory)
        passages = select_passages(self.documents, tokenizer, self.job.recipe.evaluate)
        baseline, candidate = open_runtime(self.runtime, self.baseline), open_runtime(self.runtime, self.candidate)
        checks = (
            same_tokenizer(baseline, candidate, tokenizer, self.documents),
            same_template(
                tokenizer.chat_template,
                {
                    "baseline": load_tokenizer(self.baseline).chat_template,
                    "candidate": load_tokenizer(self.candidate).chat_template,
                },
            ),
            decode_path(baseline, candidate, passages),
            disjoint_texts(self.job.tokens.tolist(), [passage.tokens for passage in passages]),
        )
        prompts = select_prompts(passages, self.job.recipe.evaluate)
        rows: list[QualityRow] = list(measure_quality(baseline, candidate, passages, workspace.progress))
        rows += measure_continuations(baseline, candidate, prompts, workspace.progress)
        measured = {passage.document for passage in passages}
        tags = {one.name: one.tag for one in self.documents if one.tag is not None and one.name in measured}
        text = dataclasses.replace(self.header.text, tags=tags)
        write_evidence(partial / _ROWS, dataclasses.replace(self.header, checks=checks, text=text), rows, ())

    def speed(self, partial: Path, workspace: Workspace, stage: Stage) -> None:
        requests = _requests(self.job, self.documents, load_tokenizer(self.job.checkpoint.directory))
        runs = []
        if requests:
            arms: dict[ArmName, Path] = {"baseline": self.baseline, "candidate": self.candidate}
            blocks = self.job.recipe.evaluate.blocks
            runs = list(measure_speed(arms, self.runtime, requests, blocks, workspace.progress))
        # Who measures until the numbers please has to show how often.
        earlier = workspace.path(stage) / _ROWS
        count = read_evidence(earlier).header.environment.get(SPEED_MEASUREMENTS, 0) if earlier.is_dir() else 0
        known = self.header.environment | {SPEED_MEASUREMENTS: count + 1}
        write_evidence(partial / _ROWS, dataclasses.replace(self.header, environment=known), (), runs)


def _requests(job: Job, documents: list[Document], tokenizer: Any) -> list[dict[str, Any]]:
    stream = (token for document in documents for token in encode(document, tokenizer))
    return requests_of(job.recipe.evaluate, stream)


def _header(job: Job, workspace: Workspace, documents: list[Document]) -> Header:
    target = TARGETS[job.recipe.target.format]
    manifest = read_manifest(workspace.path(job.candidate_stage))
    files = {arm: workspace.files(stage) for arm, stage in _arms(job).items()}
    runtime = runtime_version(target.runtime)

    def arm(name: str, scheme: str, bits_per_weight: float | None) -> Arm:
        return Arm(
            bundle_digest=bundle_digest(files[name]),
            model_digest=_model_digest(files[name]),
            runtime=runtime,
            size_bytes=size_bytes(workspace.path(_arms(job)[name])),
            scheme=scheme,
            dtype=manifest["precision"] if target.baseline_dtype == "as the source" else target.baseline_dtype,
            bits_per_weight=bits_per_weight,
        )

    return Header(
        recipe=RecipeUsed(
            name=job.recipe.name, digest=job.recipe.digest(), gate=job.recipe.gate, evaluate=job.recipe.evaluate
        ),
        candidate=arm("candidate", manifest["scheme"], manifest["bits_per_weight"]),
        baseline=arm("baseline", "none", None),
        text=TextUsed(source=job.recipe.evaluate.text.source, digest=texts_digest(documents), documents=len(documents)),
        checks=(),
        environment=environment(),
    )


def _arms(job: Job) -> dict[str, Stage]:
    return {"candidate": job.candidate_stage, "baseline": job.baseline_stage}


def _model_digest(files: dict[str, str]) -> str:
    """Digest of what the runtime loads: all files but Assay's own lock and manifest."""
    return bundle_digest({name: digest for name, digest in files.items() if name not in (LOCK_NAME, MANIFEST_NAME)})
