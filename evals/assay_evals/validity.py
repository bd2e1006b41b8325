"""Whether a measurement is one at all: what the gate checks before it reads a number.

Each check is a sentence in the verdict, passed or not; one that failed makes the run INVALID. They fail closed: what is
missing, doubled, not a number or not what the recipe asked for is never skipped over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator

from assay.recipe import ClassMetric, ClozeAccuracyMetric, EncoderMetric, GreedyAgreementMetric, RetrievalMetric
from assay_evals.encoder_findings import of_encoder
from assay_evals.evidence import Check, ChoiceItem, Evidence, Measured, ScoredItem, TaskRow
from assay_evals.findings import UnmeasurableError
from assay_evals.speed_findings import blocks_of

KL_ROUNDING = LIKELIHOOD_ROUNDING = 1e-3
COSINE_ROUNDING = 1e-6
# What only the evaluator can see, because it takes the models. Each has to be there, once.
EVALUATORS = (
    "tokenizer identity",
    "chat template identity",
    "decode path",
    "evaluation text unseen in calibration",
)
# Of encoders, which write nothing: the same tokens everywhere, and padding that changes nothing.
TOKENIZER, PADDING = "tokenizer identity", "padding invariance"
ENCODER_EVALUATORS = (TOKENIZER, PADDING, EVALUATORS[-1])
# Also, where the recipe has tasks.
TASKS_UNSEEN = "task items unseen in calibration"


def checks_of(evidence: Evidence) -> tuple[Check, ...]:
    """The evaluator's own checks, then those that follow from the evidence alone."""
    return (
        *evidence.header.checks,
        _evaluators(evidence),
        _arms(evidence),
        _runtime(evidence),
        _samples(evidence),
        _measured_once(evidence),
        _numbers(evidence),
        _blocks(evidence),
    )


def _evaluators(evidence: Evidence) -> Check:
    found = [check.name for check in evidence.header.checks]
    evaluate = evidence.header.recipe.evaluate
    wanted = ENCODER_EVALUATORS if of_encoder(evaluate) else EVALUATORS
    wanted = (*wanted, *([TASKS_UNSEEN] if evaluate.tasks else []))
    if sorted(found) != sorted(wanted):
        return _failed("evaluator's checks", f"Wanted: {', '.join(wanted)}; found: {', '.join(found) or 'none'}.")
    return _passed("evaluator's checks", f"All {len(found)} that take the models were made.")


def _arms(evidence: Evidence) -> Check:
    candidate, baseline = evidence.header.candidate, evidence.header.baseline
    wanted = evidence.header.recipe.evaluate.baseline.scheme
    if candidate.model_digest == baseline.model_digest:
        return _failed("two arms", "Candidate and baseline are the same bytes: nothing was compared.")
    if baseline.scheme != wanted:
        return _failed("two arms", f"The baseline's scheme is {baseline.scheme!r}; the recipe asks for {wanted!r}.")
    return _passed("two arms", f"{candidate.scheme} against an unquantized baseline in {baseline.dtype}.")


def _runtime(evidence: Evidence) -> Check:
    candidate, baseline = evidence.header.candidate.runtime, evidence.header.baseline.runtime
    if not candidate or candidate != baseline:
        return _failed("one runtime", f"The candidate ran on {candidate!r}, the baseline on {baseline!r}.")
    return _passed("one runtime", f"Both arms ran on {candidate}.")


def _samples(evidence: Evidence) -> Check:
    """The samples that the recipe declared were measured: fewer mean failed requests, or a run that was cut short."""
    evaluate = evidence.header.recipe.evaluate
    tokens = sum(window.tokens for window in evidence.windows)
    short: list[str] = []
    for metric in evaluate.quality:
        if isinstance(metric, EncoderMetric):
            read, asked, what = _encoded(evidence, metric)
            if read < asked:
                short.append(f"{read:,} of {asked:,} {what} for {metric.metric}")
        elif isinstance(metric, GreedyAgreementMetric):
            if len(evidence.continuations) < metric.prompts:
                short.append(f"{len(evidence.continuations):,} of {metric.prompts:,} continuations")
        elif isinstance(metric, ClozeAccuracyMetric):
            if len(evidence.clozes) < metric.samples:
                short.append(f"{len(evidence.clozes):,} of {metric.samples:,} cloze questions")
        elif tokens < metric.tokens:
            short.append(f"{tokens:,} of {metric.tokens:,} tokens for {metric.metric}")
    if evaluate.structured and len(evidence.structured) < evaluate.structured.samples:
        short.append(f"{len(evidence.structured):,} of {evaluate.structured.samples:,} structured outputs")
    answered = Counter(row.task for row in evidence.tasks)
    for task in evaluate.tasks:
        used = evidence.header.tasks.get(task.name)
        wanted = max(used.items if used else 1, task.samples or 0)
        if answered[task.name] < wanted:
            short.append(f"{answered[task.name]:,} of {wanted:,} items of the task {task.name}")
    blocks = len({run.block for run in evidence.runs})
    if any(metric.metric != "size_on_disk" for metric in evaluate.speed) and blocks < evaluate.blocks:
        short.append(f"{blocks} of {evaluate.blocks} blocks of processes")
    if short:
        remedy = "Measure again; where the text is too short, ask for fewer samples in the recipe."
        return _failed("samples as declared", f"Measured only {', '.join(short)}. {remedy}")
    items = f"{len(evidence.tasks):,} items of tasks, " if evaluate.tasks else ""
    counts = f"{tokens:,} tokens, {len(evidence.clozes):,} cloze questions, {items}{blocks} blocks of processes"
    if of_encoder(evaluate):
        texts = len(evidence.embeddings) + len(evidence.classes)
        counts = f"{texts:,} texts, {len(evidence.retrievals):,} queries, {blocks} blocks of processes"
    return _passed("samples as declared", f"Measured {counts}.")


def _encoded(evidence: Evidence, metric: EncoderMetric) -> tuple[int, int, str]:
    """Samples that an encoder's metric has, those that it asks for, and what they are."""
    if isinstance(metric, RetrievalMetric):
        return len(evidence.retrievals), metric.queries, "queries"
    return len(evidence.classes if isinstance(metric, ClassMetric) else evidence.embeddings), metric.texts, "texts"


def _measured_once(evidence: Evidence) -> Check:
    repeated = [
        *_repeated("window", ((row.document, row.window) for row in evidence.windows)),
        *_repeated("cloze question", ((row.document, row.window, row.position) for row in evidence.clozes)),
        *_repeated("continuation", ((row.document, row.window) for row in evidence.continuations)),
        *_repeated("structured output", (row.item for row in evidence.structured)),
        *_repeated("item", ((row.task, row.item) for row in evidence.tasks)),
        *_repeated("text", ((row.kind, row.document, row.window) for row in evidence.encoded)),
        *_repeated("process", ((row.block, row.position) for row in evidence.runs)),
    ]
    if repeated:
        return _failed("each sample once", f"Measured more than once: {', '.join(repeated[:3])}.")
    return _passed("each sample once", "No window, question or process is there twice.")


def _repeated(what: str, keys: Iterable[Hashable]) -> list[str]:
    return [f"{what} {key}" for key, count in Counter(keys).items() if count > 1]


def _numbers(evidence: Evidence) -> Check:
    """Every measured number is finite and possible; a divergence below zero by more than rounding is a defect."""
    wrong: list[str] = []
    for window in evidence.windows:
        place = f"window {window.window} of {window.document!r}"
        if any(value is None for value in (*window.kl, window.nll_baseline, window.nll_candidate)):
            wrong.append(f"{place} has a value that is not a finite number")
        elif any(value is not None and value < -KL_ROUNDING for value in window.kl):
            wrong.append(f"{place} has a KL divergence below zero")
    for row in evidence.structured:
        # Without a schema that compiles there is nothing to time.
        times = [] if row.refused is not None else [row.compile_seconds, *row.step_seconds]
        if any(value is None or value <= 0 for value in times):
            wrong.append(f"the enforced output of {row.item!r} has a time that is not a number above zero")
    for row in evidence.tasks:
        wrong += [f"item {row.item!r} of the task {row.task} has {reason}" for reason in _impossible(row)]
    for row in evidence.embeddings:
        if any(not _is_cosine(value) for value in (row.cosine, *row.baseline, *row.candidate)):
            wrong.append(f"text {row.window} of {row.document!r} has a cosine that is not a number from −1 to 1")
    for row in evidence.classes:
        if any(arm.share is None or not 0 < arm.share <= 1 for arm in (row.baseline, row.candidate)):
            wrong.append(f"text {row.window} of {row.document!r} has a probability that is not a number above 0, to 1")
    for run in evidence.runs:
        place = f"process {run.position} of block {run.block}"
        times = [run.load_seconds, *(seconds for item in run.generations for seconds in item.token_seconds)]
        times += [seconds for item in run.encodings for seconds in item.seconds]
        if any(value is None for value in times):
            wrong.append(f"{place} has a time that is not a finite number")
        elif any(value is not None and value <= 0 for value in times) or run.peak_memory_bytes <= 0:
            wrong.append(f"{place} has a time or memory that is not above zero")
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return _failed("finite numbers", f"{wrong[0][0].upper()}{wrong[0][1:]}{more}.")
    return _passed("finite numbers", "Every measurement is a finite, possible number.")


def _is_cosine(value: Measured) -> bool:
    return value is not None and abs(value) <= 1 + COSINE_ROUNDING


def _impossible(row: TaskRow) -> Iterator[str]:
    if isinstance(row, ChoiceItem):
        if any(value is None for value in (*row.baseline, *row.candidate)):
            yield "a log-likelihood that is not a finite number"
        elif any(value is not None and value > LIKELIHOOD_ROUNDING for value in (*row.baseline, *row.candidate)):
            yield "a log-likelihood above zero"
    elif isinstance(row, ScoredItem) and not all(
        arm.score is not None and 0 <= arm.score <= 1 for arm in (row.baseline, row.candidate)
    ):
        yield "a score that is not a number from 0 to 1"


def _blocks(evidence: Evidence) -> Check:
    try:
        blocks = blocks_of(evidence)
    except UnmeasurableError as error:
        return _failed("complete blocks", str(error))
    return _passed("complete blocks", f"{len(blocks)} blocks of four fresh processes each, in the order ABBA or BAAB.")


def _passed(name: str, detail: str) -> Check:
    return Check(name=name, passed=True, detail=detail)


def _failed(name: str, detail: str) -> Check:
    return Check(name=name, passed=False, detail=detail)
