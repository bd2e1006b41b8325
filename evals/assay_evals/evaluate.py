"""Measure a candidate against its baseline on their own runtime; measurements of the same bytes are taken from the cache.

The stages of quality, tasks and speed are cached apart, by the digests of the model files, the text, the settings, the tools, this
machine and the code that measures; the gate is not part of their keys, so another gate is judged on the same measurements.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.artifact import LOCK_NAME, MANIFEST_NAME, bundle_digest, read_manifest, size_bytes
from assay.calibration import encode
from assay.errors import UsageError
from assay.host import code_digest, cores, environment, machine_facts
from assay.job import Job, evaluation_documents, load_tokenizer
from assay.progress import Progress
from assay.recipe import QUALITY_GATES, SPEED_GATES, EnergyMetric, Recipe, Structured
from assay.targets import TARGETS
from assay.text import Document, texts_digest
from assay.workspace import Stage, Workspace
from assay_evals.cost_findings import ENERGY
from assay_evals.encoder_findings import of_encoder
from assay_evals.encoders.compared import check_encoder, encoder_requests, measure_encoder
from assay_evals.evidence import (
    Arm,
    Check,
    Evidence,
    Header,
    QualityRow,
    RecipeUsed,
    SpeedRun,
    StructuredRow,
    TextUsed,
    Window,
    read_evidence,
    write_evidence,
)
from assay_evals.gate import judge
from assay_evals.planning import plan_gates
from assay_evals.quality.checks import decode_path, disjoint_texts, same_template, same_tokenizer
from assay_evals.quality.measure import measure_continuations, measure_quality
from assay_evals.quality.passages import select_passages, select_prompts
from assay_evals.runtimes.base import Runtime, end_tokens, open_encoder, open_runtime, runtime_version
from assay_evals.speed.energy import find_counters
from assay_evals.speed.measure import Arm as ArmName
from assay_evals.speed.measure import measure_speed, requests_of
from assay_evals.structured.constraint import Enforcer, enforcing_library
from assay_evals.tasks.measure import ReadTask, check_tasks, measure_tasks, read_tasks, unseen_items
from assay_evals.verdict import Verdict
from assay_evals.wording import SLICE, TASK, words

if TYPE_CHECKING:
    from assay_evals.structured.items import Item as StructuredItem

_ROWS = "rows"
_QUALITY_CODE = ("assay_evals.evaluate", "assay_evals.quality", "assay_evals.encoders", "assay_evals.runtimes")
_STRUCTURED_CODE = ("assay_evals.evaluate", "assay_evals.structured", "assay_evals.runtimes")
_TASKS_CODE = ("assay_evals.evaluate", "assay_evals.tasks", "assay_evals.runtimes")
_SPEED_CODE = ("assay_evals.evaluate", "assay_evals.speed", "assay_evals.runtimes")
SPEED_MEASUREMENTS = "speed_measurements"


def evaluate(job: Job, workspace: Workspace, destination: Path, *, fresh: bool) -> Evidence:
    """Write the evidence on the built candidate to `destination`.  fresh: measure again although cached."""
    comparison, looks = _Comparison.of(job, workspace), job.recipe.evaluate.looks
    quality, speed = comparison.quality(workspace, 1, fresh), comparison.speed(workspace, 1, fresh)
    structured, tasks = comparison.structured(workspace, 1, fresh), comparison.answers(workspace, 1, fresh)
    for look in range(2, looks + 1):
        undecided = comparison.undecided(judge(comparison.together(quality, speed, structured, tasks)), look)
        if not undecided:
            break
        told = ", ".join(words(metric).label for metric in undecided)
        workspace.progress.note(f"evaluate: not settled yet: {told}; look {look} of {looks}, at twice the samples")
        if any(metric in QUALITY_GATES for metric in undecided):
            quality = comparison.quality(workspace, look, fresh)
        if any(metric in SPEED_GATES for metric in undecided):
            speed = comparison.speed(workspace, look, fresh)
        if any(metric.startswith("structured.") for metric in undecided):
            structured = comparison.structured(workspace, look, fresh)
        if any(metric.startswith(TASK) for metric in undecided):
            tasks = comparison.answers(workspace, look, fresh)
    found = comparison.together(quality, speed, structured, tasks)
    return write_evidence(destination, found.header, found.quality, found.runs)


def check_evaluation(job: Job) -> None:
    """UsageError when evaluating must fail: text that is too short or was calibrated on, or a runtime that is not there.

    Asked before hours are spent on building what could then not be measured.
    """
    runtime_version(TARGETS[job.recipe.target.format].runtime)
    tasks = read_tasks(job.recipe.evaluate, job.base)
    _check_reach(job.recipe, tasks)
    documents, tokenizer = evaluation_documents(job), load_tokenizer(job.checkpoint.directory)
    if of_encoder(job.recipe.evaluate):
        check_encoder(job, documents, tokenizer)
        return
    last = job.recipe.evaluate.at(job.recipe.evaluate.looks)
    passages = select_passages(documents, tokenizer, last)
    select_prompts(passages, last)
    _requests(job, documents, tokenizer)
    if last.structured is not None:
        _check_structured(job, last.structured, tokenizer)
    unseen = disjoint_texts(job.tokens.tolist(), [passage.tokens for passage in passages])
    if not unseen.passed:
        raise UsageError(f"evaluate.text was calibrated on: {unseen.detail} Use another text for one of the two.")
    check_tasks(tasks, tokenizer, job.checkpoint.shape.context_length or sys.maxsize, job.tokens.tolist())


def _check_reach(recipe: Recipe, tasks: Sequence[ReadTask]) -> None:
    """UsageError for gates that the declared samples are not expected to settle, where the recipe wants it refused."""
    if recipe.evaluate.unreachable == "refuse":
        items = {task.name: task.counts for task in tasks}
        far = [reach for reach in plan_gates(recipe.evaluate, recipe.gate, items=items) if not reach.in_reach]
        if far:
            told = " ".join(f"{words(reach.metric).label}: {reach.sentence}" for reach in far)
            raise UsageError(f"the samples are too few for the gate (evaluate.unreachable: refuse). {told}")


def _check_structured(job: Job, settings: Structured, tokenizer: Any) -> None:
    """UsageError when structured output could not be measured: libraries, items, prompts that are too long, nothing that is right."""
    enforcing_library()
    # jsonschema is in an extra; what needs it is imported where it is known to be there.
    from assay_evals.structured.items import load_items, prompt_tokens

    items, longest = load_items(settings, job.base), job.checkpoint.shape.context_length
    for item in items:
        length = len(prompt_tokens(item, tokenizer))
        if not length or (longest and length + settings.new_tokens > longest):
            raise UsageError(
                f"evaluate.structured: the prompt of {item.name} has {length:,} tokens; with {settings.new_tokens:,} new ones it must fit "
                f"the model's context of {longest:,}, and it must have one. Shorten it, or lower new_tokens."
            )
    gate = job.recipe.gate.structured
    known = sum(item.expected is not None for item in items)
    if gate is not None and gate.max_drop is not None and known < 2:
        raise UsageError(
            f"gate.structured.max_drop needs items that say what is right; {known} of the {len(items):,} do. Give them "
            "an expected object, or remove max_drop."
        )
    Enforcer(tokenizer, end_tokens(tokenizer.eos_token_id))


def measure_stages(job: Job, workspace: Workspace) -> tuple[Stage, ...]:
    """The quality stage and the speed stage of the two built artifacts, and those of structured output and tasks if any, at the first look."""
    comparison = _Comparison.of(job, workspace)
    stages = [comparison.quality_stage(1), comparison.speed_stage(1)]
    structured = job.recipe.evaluate.structured
    stages += [] if structured is None else [comparison.structured_stage(structured)]
    return (*stages, comparison.tasks_stage(1)) if comparison.tasks else tuple(stages)


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Two artifacts, what they are compared on, and what the evidence will say of them.

    tasks, items: of tasks and of structured output, for every look.
    """

    job: Job
    candidate: Path
    baseline: Path
    documents: list[Document]
    tasks: list[ReadTask]
    items: list[StructuredItem]
    header: Header

    @classmethod
    def of(cls, job: Job, workspace: Workspace) -> _Comparison:
        documents = evaluation_documents(job)
        candidate, baseline = workspace.path(job.candidate_stage), workspace.path(job.baseline_stage)
        tasks = read_tasks(job.recipe.evaluate, job.base)
        items = _structured_items(job)
        return cls(job, candidate, baseline, documents, tasks, items, _header(job, workspace, documents))

    @property
    def runtime(self) -> str:
        return TARGETS[self.job.recipe.target.format].runtime

    def _open(self, directory: Path) -> Runtime:
        """An arm to be scored: what it computes is the same on every core there is, only sooner. Speed is timed as it is served."""
        return open_runtime(self.runtime, directory, threads=cores())

    @property
    def _facts(self) -> dict[str, Any]:
        return {
            "candidate": self.header.candidate.model_digest,
            "baseline": self.header.baseline.model_digest,
            "text": self.header.text.digest,
            "tools": self.job.lock["tools"],
            "host": self.job.lock["host"],
        }

    def quality_stage(self, look: int) -> Stage:
        settings = self.job.recipe.evaluate.at(look).model_dump(mode="json")
        asked = {name: settings[name] for name in ("text", "length", "quality")}
        calibration = {"calibration": self.job.lock["calibration"]["tokens_digest"]}
        return Stage("quality", self._facts | calibration | asked | {"code": code_digest(*_QUALITY_CODE)})

    def undecided(self, verdict: Verdict, look: int) -> list[str]:
        """The metrics whose gates a look may settle with more samples; none when the verdict stands whatever they become."""
        if verdict.verdict != "INCONCLUSIVE":
            return []
        unsettled = [row.metric.partition(SLICE)[0] for row in verdict.gates if row.verdict == "INCONCLUSIVE"]
        # A task all of whose items have been answered stays as it is.
        if {TASK + task.name for task in self.tasks if not task.added(look)}.intersection(unsettled):
            return []
        return list(dict.fromkeys(unsettled))

    def tasks_stage(self, look: int) -> Stage:
        asked = self.job.recipe.evaluate.model_dump(mode="json", include={"tasks"})
        items = {task.name: dataclasses.asdict(task.used(look)) for task in self.tasks}
        calibration = {"calibration": self.job.lock["calibration"]["tokens_digest"]}
        facts = self._facts | calibration | asked | {"items": items, "code": code_digest(*_TASKS_CODE)}
        return Stage("tasks", facts)

    def speed_stage(self, look: int) -> Stage:
        settings = self.job.recipe.evaluate.at(look).model_dump(mode="json")
        asked = {name: settings[name] for name in ("speed", "blocks")}
        return Stage("speed", self._facts | asked | {"machine": machine_facts(), "code": code_digest(*_SPEED_CODE)})

    def quality(self, workspace: Workspace, look: int, fresh: bool) -> Evidence:
        """What was measured of quality up to a look; the samples of the look before are not measured again."""

        def make(partial: Path) -> None:
            earlier = read_evidence(workspace.path(self.quality_stage(look - 1)) / _ROWS) if look > 1 else None
            header, rows = self._measure_quality(workspace.progress, look, earlier)
            write_evidence(partial / _ROWS, header, rows, ())

        return read_evidence(workspace.build(self.quality_stage(look), make, again=fresh) / _ROWS)

    def answers(self, workspace: Workspace, look: int, fresh: bool) -> Evidence | None:
        """What both arms answered to the tasks up to a look; None where there are none."""

        def make(partial: Path) -> None:
            tokenizer = load_tokenizer(self.job.checkpoint.directory)
            earlier = read_evidence(workspace.path(self.tasks_stage(look - 1)) / _ROWS).tasks if look > 1 else ()
            baseline, candidate = self._open(self.baseline), self._open(self.candidate)
            rows = measure_tasks(self.tasks, tokenizer, baseline, candidate, workspace.progress, look=look)
            checks = (unseen_items(self.job.tokens.tolist(), self.tasks, tokenizer, look),)
            used = {task.name: task.used(look) for task in self.tasks}
            header = dataclasses.replace(self.header, checks=checks, tasks=used)
            write_evidence(partial / _ROWS, header, (*earlier, *rows), ())

        if not self.tasks:
            return None
        return read_evidence(workspace.build(self.tasks_stage(look), make, again=fresh) / _ROWS)

    def speed(self, workspace: Workspace, look: int, fresh: bool) -> Evidence:
        """What was measured of speed up to a look; the blocks of the look before are not measured again."""
        stage = self.speed_stage(look)

        def make(partial: Path) -> None:
            known = self.speed_stage(look - 1) if look > 1 else stage
            rows = workspace.path(known) / _ROWS
            earlier = read_evidence(rows) if rows.is_dir() else None
            # Who measures until the numbers please has to show how often.
            count = earlier.header.environment.get(SPEED_MEASUREMENTS, 0) if earlier else 0
            environment = self.header.environment | {SPEED_MEASUREMENTS: count + (look == 1)}
            if any(isinstance(metric, EnergyMetric) for metric in self.job.recipe.evaluate.speed):
                environment |= {ENERGY: find_counters().said}
            runs = earlier.runs if earlier and look > 1 else ()
            runs += tuple(self._measure_speed(workspace.progress, look))
            write_evidence(partial / _ROWS, dataclasses.replace(self.header, environment=environment), (), runs)

        return read_evidence(workspace.build(stage, make, again=fresh) / _ROWS)

    def structured_stage(self, settings: Structured) -> Stage:
        from assay_evals.structured.items import items_digest

        # Its times are this machine's.
        asked = {
            "settings": settings.model_dump(mode="json"),
            "items": items_digest(self.items[: settings.samples]),
            "enforced_by": enforcing_library(),
            "machine": machine_facts(),
        }
        return Stage("structured", self._facts | asked | {"code": code_digest(*_STRUCTURED_CODE)})

    def structured(self, workspace: Workspace, look: int, fresh: bool) -> tuple[StructuredRow, ...]:
        """What was written up to a look; the items of the look before are not asked for again."""
        evaluate = self.job.recipe.evaluate
        settings = evaluate.at(look).structured
        if settings is None:
            return ()

        def make(partial: Path) -> None:
            before = evaluate.at(look - 1).structured if look > 1 else None
            known = None if before is None else workspace.path(self.structured_stage(before))
            earlier = () if known is None else read_evidence(known / _ROWS).structured
            rows = self._measure_structured(workspace.progress, settings, len(earlier))
            write_evidence(partial / _ROWS, self.header, (*earlier, *rows), ())

        return read_evidence(workspace.build(self.structured_stage(settings), make, again=fresh) / _ROWS).structured

    def together(
        self, quality: Evidence, speed: Evidence, structured: tuple[StructuredRow, ...], tasks: Evidence | None
    ) -> Evidence:
        """All as one."""
        text, checks = quality.header.text, quality.header.checks + (tasks.header.checks if tasks else ())
        header = dataclasses.replace(self.header, text=text, checks=checks, environment=speed.header.environment)
        header = dataclasses.replace(header, tasks=tasks.header.tasks) if tasks else header
        rows = tasks.tasks if tasks else ()
        return dataclasses.replace(quality, header=header, runs=speed.runs, structured=structured, tasks=rows)

    def _measure_quality(
        self, progress: Progress, look: int, earlier: Evidence | None
    ) -> tuple[Header, list[QualityRow]]:
        if of_encoder(self.job.recipe.evaluate):
            # A later look has more passages to find, so nothing of an earlier one stands.
            encoders = [open_encoder(self.runtime, place, threads=cores()) for place in (self.baseline, self.candidate)]
            found = measure_encoder(self.job, (encoders[0], encoders[1]), self.documents, look, progress)
            return self._measured(found[0], {row.document for row in found[1]}), [*found[1]]
        tokenizer = load_tokenizer(self.job.checkpoint.directory)
        asked = self.job.recipe.evaluate.at(look)
        passages = select_passages(self.documents, tokenizer, asked)
        baseline, candidate = self._open(self.baseline), self._open(self.candidate)
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
        rows: list[QualityRow] = [*earlier.quality] if earlier else []
        read = {(row.document, row.window) for row in rows if isinstance(row, Window)}
        unread = [passage for passage in passages if (passage.document, passage.window) not in read]
        rows += measure_quality(baseline, candidate, unread, progress)
        # More samples are the same ones and further ones, in the same order.
        prompts = select_prompts(passages, asked)[len(earlier.continuations) if earlier else 0 :]
        rows += measure_continuations(baseline, candidate, prompts, progress)
        return self._measured(checks, {passage.document for passage in passages}), rows

    def _measured(self, checks: tuple[Check, ...], measured: set[str]) -> Header:
        """The header with the evaluator's checks, and the slices of the documents that were measured."""
        tags = {one.name: one.tag for one in self.documents if one.tag is not None and one.name in measured}
        return dataclasses.replace(self.header, checks=checks, text=dataclasses.replace(self.header.text, tags=tags))

    def _measure_structured(self, progress: Progress, settings: Structured, known: int) -> Iterator[StructuredRow]:
        """known: how many of the items were measured before."""
        from assay_evals.structured.items import prompt_tokens
        from assay_evals.structured.measure import WritingArm, measure_structured

        tokenizer = load_tokenizer(self.job.checkpoint.directory)
        arms: list[WritingArm] = []
        for directory in (self.baseline, self.candidate):
            runtime = self._open(directory)
            arms.append(WritingArm(runtime, Enforcer(load_tokenizer(directory), runtime.ends)))
        items = self.items[known : settings.samples]
        asked = [(item, prompt_tokens(item, tokenizer)) for item in items]
        return measure_structured(arms[0], arms[1], asked, settings, progress)

    def _measure_speed(self, progress: Progress, look: int) -> Iterator[SpeedRun]:
        requests = _requests(self.job, self.documents, load_tokenizer(self.job.checkpoint.directory))
        if not requests:
            return iter(())
        evaluate = self.job.recipe.evaluate
        blocks = range(evaluate.at(look - 1).blocks if look > 1 else 0, evaluate.at(look).blocks)
        arms: dict[ArmName, Path] = {"baseline": self.baseline, "candidate": self.candidate}
        return measure_speed(arms, self.runtime, requests, blocks, progress)


def _requests(job: Job, documents: list[Document], tokenizer: Any) -> list[dict[str, Any]]:
    if of_encoder(job.recipe.evaluate):
        return encoder_requests(job.recipe.evaluate, documents, tokenizer)
    stream = (token for document in documents for token in encode(document, tokenizer))
    return requests_of(job.recipe.evaluate, stream)


def _structured_items(job: Job) -> list[StructuredItem]:
    """Those of the last look, which begin with those of every look before it."""
    settings = job.recipe.evaluate.at(job.recipe.evaluate.looks).structured
    if settings is None:
        return []
    from assay_evals.structured.items import load_items

    return load_items(settings, job.base)


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
