"""The quality of two built encoders, as the evaluator asks for it: what can be checked before anything is built, and the measurement."""

from __future__ import annotations

import itertools
from typing import Any

from assay.calibration import encode, frame_of
from assay.errors import UsageError
from assay.job import Job, load_tokenizer
from assay.progress import Progress
from assay.recipe import (
    BatchShape,
    EncoderSpeedMetric,
    Evaluate,
    LoadTimeMetric,
    PeakMemoryMetric,
    RetrievalAgreementMetric,
)
from assay.text import Document, load_documents
from assay_evals.encoders.checks import padding_invariance, same_tokens, unseen_texts
from assay_evals.encoders.measure import Arms, measure_classes, measure_embeddings, measure_retrieval
from assay_evals.encoders.texts import classifies, label_field, select_queries, select_texts
from assay_evals.evidence import Check, EncoderRow

_LOADED_SHAPE = BatchShape(batch=1, tokens=32)


def check_encoder(job: Job, documents: list[Document], tokenizer: Any) -> None:
    """UsageError when evaluating must fail: too little text, text that was calibrated on, or rows whose class no model gives."""
    last = job.recipe.evaluate.at(job.recipe.evaluate.looks)
    texts, queries = select_texts(documents, tokenizer, last), select_queries(documents, tokenizer, last)
    encoder_requests(job.recipe.evaluate, documents, tokenizer)
    unseen = unseen_texts(job.tokens.tolist(), (*texts, *(one.passage for one in queries)))
    if not unseen.passed:
        raise UsageError(f"evaluate.text was calibrated on: {unseen.detail} Use another text for one of the two.")
    known, labels = class_names(job), set(_labels(job).values())
    if unknown := sorted(labels - known):
        raise UsageError(
            f"evaluate.quality: class_accuracy's field holds {unknown[0]!r}, which is no class of the model; it has: "
            f"{', '.join(sorted(known))}."
        )


def class_names(job: Job) -> set[str]:
    """The classes of a classifier, by name and by number."""
    named = job.checkpoint.config.get("id2label")
    return {str(one) for pair in named.items() for one in pair} if isinstance(named, dict) else {"0", "1"}


def _labels(job: Job) -> dict[str, str]:
    """Document → its class as its row says it, where accuracy is measured."""
    field, text = label_field(job.recipe.evaluate), job.recipe.evaluate.text
    if field is None:
        return {}
    # A tag is read and checked just so.
    rows = load_documents(text.model_copy(update={"tag": field}), "evaluation", job.base)
    return {row.name: row.tag for row in rows if row.tag is not None}


def _named_labels(job: Job) -> dict[str, str]:
    """The same with the names that the model gives, where rows have numbers."""
    named = job.checkpoint.config.get("id2label")
    names = {str(number): str(name) for number, name in named.items()} if isinstance(named, dict) else {}
    return {document: names.get(label, label) for document, label in _labels(job).items()}


def measure_encoder(
    job: Job, arms: Arms, documents: list[Document], look: int, progress: Progress
) -> tuple[tuple[Check, ...], list[EncoderRow]]:
    """The checks and the evidence.  arms: the baseline's and the candidate's runtime."""
    asked, tokenizer = job.recipe.evaluate.at(look), load_tokenizer(job.checkpoint.directory)
    texts, queries = select_texts(documents, tokenizer, asked), select_queries(documents, tokenizer, asked)
    named, read = {"baseline": arms[0], "candidate": arms[1]}, texts or [one.passage for one in queries]
    checks = (
        same_tokens(named, tokenizer, read),
        padding_invariance(named, read),
        unseen_texts(job.tokens.tolist(), (*texts, *(one.passage for one in queries))),
    )
    rows: list[EncoderRow] = []
    if classifies(asked):
        rows += measure_classes(arms, texts, _named_labels(job), progress)
    elif texts:
        rows += measure_embeddings(arms, texts, progress)
    top = max((metric.top for metric in asked.quality if isinstance(metric, RetrievalAgreementMetric)), default=1)
    rows += measure_retrieval(arms, queries, min(top, len(queries)), progress)
    return checks, rows


def shapes_of(evaluate: Evaluate) -> list[BatchShape]:
    """Every shape of a batch that the recipe's speed metrics need."""
    found = [shape for metric in evaluate.speed if isinstance(metric, EncoderSpeedMetric) for shape in metric.shapes]
    if not found and any(isinstance(metric, LoadTimeMetric | PeakMemoryMetric) for metric in evaluate.speed):
        found = [_LOADED_SHAPE]
    return list(dict.fromkeys(found))


def encoder_requests(evaluate: Evaluate, documents: list[Document], tokenizer: Any) -> list[dict[str, Any]]:
    """One batch for each shape, as the worker takes them: texts of the evaluation text, over again where it is too short."""
    stream = [token for document in documents for token in encode(document, tokenizer)]
    before, after = frame_of(tokenizer)
    requests: list[dict[str, Any]] = []
    for shape in shapes_of(evaluate):
        inner = shape.tokens - len(before) - len(after)
        if inner < 1:
            raise UsageError(
                f"evaluate.speed: {shape.tokens} tokens leave no room beside the encoder's own; raise tokens."
            )
        taken = itertools.cycle(stream)
        texts = [[*before, *itertools.islice(taken, inner), *after] for _ in range(shape.batch)]
        requests.append({"batch": texts})
    return requests
