"""Measure a candidate against its baseline on their own runtime; measurements of the same bytes are taken from the cache.

The quality stage and the speed stage are cached apart, by the digests of the model files, the text, the settings, the tools and
this machine; the gate is not part of their keys, so another gate is judged on the same measurements.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from assay.artifact import LOCK_NAME, MANIFEST_NAME, bundle_digest, file_digests, read_manifest
from assay.calibration import encode
from assay.host import environment
from assay.job import Job, evaluation_documents, load_tokenizer
from assay.targets import TARGETS
from assay.text import Document, texts_digest
from assay.workspace import Stage, Workspace
from assay_evals.evidence import Arm, Evidence, Header, RecipeUsed, TextUsed, read_evidence, write_evidence
from assay_evals.quality.checks import decode_path, disjoint_texts, same_runtime, same_tokenizer
from assay_evals.quality.measure import measure_quality
from assay_evals.quality.passages import select_passages
from assay_evals.runtimes.base import open_runtime, runtime_version
from assay_evals.speed.measure import Arm as ArmName
from assay_evals.speed.measure import measure_speed, requests_of

_REVISION = 1
_ROWS = "rows"
_PROMPTS, _PROMPT_TOKENS = 4, 64


def evaluate(
    job: Job, candidate: Path, baseline: Path, workspace: Workspace, destination: Path, *, fresh: bool
) -> Evidence:
    """Write the evidence on a candidate to `destination`.  fresh: measure again although cached."""
    comparison = _Comparison.of(job, candidate, baseline)
    quality_stage, speed_stage = comparison.stages()

    def quality_rows(partial: Path) -> None:
        comparison.quality(partial, workspace)

    def speed_rows(partial: Path) -> None:
        comparison.speed(partial, workspace)

    quality = read_evidence(workspace.build(quality_stage, quality_rows, again=fresh) / _ROWS)
    speed = read_evidence(workspace.build(speed_stage, speed_rows, again=fresh) / _ROWS)
    environment = speed.header.environment
    whole = dataclasses.replace(comparison.header, checks=quality.header.checks, environment=environment)
    return write_evidence(destination, whole, (*quality.windows, *quality.clozes), speed.runs)


def check_evaluation(job: Job) -> None:
    """UsageError when evaluating must fail: the text is too short for what the recipe declares, or the runtime is not there.

    Asked before hours are spent on building what could then not be measured.
    """
    runtime_version(TARGETS[job.recipe.target.format].runtime)
    documents, tokenizer = evaluation_documents(job), load_tokenizer(job.checkpoint.directory)
    select_passages(documents, tokenizer, job.recipe.evaluate)
    _requests(job, documents, tokenizer)


def measure_stages(job: Job, candidate: Path, baseline: Path) -> tuple[Stage, Stage]:
    """The quality stage and the speed stage of two built artifacts."""
    return _Comparison.of(job, candidate, baseline).stages()


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Two artifacts, the text they are compared on, and what the evidence will say of them."""

    job: Job
    candidate: Path
    baseline: Path
    documents: list[Document]
    header: Header

    @classmethod
    def of(cls, job: Job, candidate: Path, baseline: Path) -> _Comparison:
        documents = evaluation_documents(job)
        return cls(job, candidate, baseline, documents, _header(job, candidate, baseline, documents))

    @property
    def runtime(self) -> str:
        return TARGETS[self.job.recipe.target.format].runtime

    def stages(self) -> tuple[Stage, Stage]:
        """The quality stage and the speed stage."""
        facts = {
            "revision": _REVISION,
            "candidate": _model_digest(self.candidate),
            "baseline": _model_digest(self.baseline),
            "text": self.header.text.digest,
            "calibration": self.job.lock["calibration"]["tokens_digest"],
            "tools": self.job.lock["tools"],
            "host": self.job.lock["host"],
        }
        settings = self.job.recipe.evaluate.model_dump(mode="json")
        return (
            Stage("quality", facts | {name: settings[name] for name in ("text", "length", "quality")}),
            Stage("speed", facts | {name: settings[name] for name in ("speed", "blocks")}),
        )

    def quality(self, partial: Path, workspace: Workspace) -> None:
        tokenizer = load_tokenizer(self.job.checkpoint.directory)
        passages = select_passages(self.documents, tokenizer, self.job.recipe.evaluate)
        baseline, candidate = open_runtime(self.runtime, self.baseline), open_runtime(self.runtime, self.candidate)
        checks = (
            same_runtime(baseline, candidate),
            same_tokenizer(baseline, candidate, tokenizer, self.documents),
            decode_path(
                candidate, [passage.tokens[:_PROMPT_TOKENS] for passage in passages[:_PROMPTS]], tokenizer.eos_token_id
            ),
            disjoint_texts(self.job.tokens.tolist(), [passage.tokens for passage in passages]),
        )
        rows = list(measure_quality(baseline, candidate, passages, workspace.progress))
        write_evidence(partial / _ROWS, dataclasses.replace(self.header, checks=checks), rows, ())

    def speed(self, partial: Path, workspace: Workspace) -> None:
        requests = _requests(self.job, self.documents, load_tokenizer(self.job.checkpoint.directory))
        runs = []
        if requests:
            arms: dict[ArmName, Path] = {"baseline": self.baseline, "candidate": self.candidate}
            blocks = self.job.recipe.evaluate.blocks
            runs = list(measure_speed(arms, self.runtime, requests, blocks, workspace.progress))
        write_evidence(partial / _ROWS, self.header, (), runs)


def _requests(job: Job, documents: list[Document], tokenizer: Any) -> list[dict[str, Any]]:
    stream = [token for document in documents for token in encode(document, tokenizer)]
    return requests_of(job.recipe.evaluate, stream)


def _header(job: Job, candidate: Path, baseline: Path, documents: list[Document]) -> Header:
    manifest = read_manifest(candidate)
    runtime = runtime_version(TARGETS[job.recipe.target.format].runtime)
    files = {arm: file_digests(directory) for arm, directory in (("candidate", candidate), ("baseline", baseline))}
    return Header(
        recipe=RecipeUsed(
            name=job.recipe.name, digest=job.recipe.digest(), gate=job.recipe.gate, evaluate=job.recipe.evaluate
        ),
        candidate=Arm(
            bundle_digest=bundle_digest(files["candidate"]),
            runtime=runtime,
            size_bytes=_bytes(candidate, files["candidate"]),
            scheme=manifest["scheme"],
            bits_per_weight=manifest["bits_per_weight"],
        ),
        baseline=Arm(
            bundle_digest=bundle_digest(files["baseline"]),
            runtime=runtime,
            size_bytes=_bytes(baseline, files["baseline"]),
            scheme="none",
            bits_per_weight=None,
        ),
        text=TextUsed(source=job.recipe.evaluate.text.source, digest=texts_digest(documents), documents=len(documents)),
        checks=(),
        environment=environment(),
    )


def _model_digest(directory: Path) -> str:
    """Digest of what the runtime loads: all files but Assay's own lock and manifest."""
    files = {name: digest for name, digest in file_digests(directory).items() if name not in (LOCK_NAME, MANIFEST_NAME)}
    return bundle_digest(files)


def _bytes(directory: Path, files: dict[str, str]) -> int:
    return sum((directory / name).stat().st_size for name in files)
