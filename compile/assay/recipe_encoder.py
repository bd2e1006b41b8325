"""What cannot be true together in a recipe because of what its target takes: encoders have other metrics than decoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from assay.recipe import (
    ClassAccuracyMetric,
    ClassMetric,
    EncoderMetric,
    EncoderSpeedMetric,
    HubDataset,
    JsonLines,
    LoadTimeMetric,
    OnnxRuntime,
    PeakMemoryMetric,
    Recipe,
    RetrievalMetric,
    SizeOnDiskMetric,
)
from assay.recipe_yaml import Location

_EVERYWHERE = (LoadTimeMetric, PeakMemoryMetric, SizeOnDiskMetric)


# The quality metrics of encoders, which are the names of their gates too.
ENCODER_QUALITY = tuple(str(get_args(one.model_fields["metric"].annotation)[0]) for one in get_args(EncoderMetric))


def encoder_contradictions(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Where, and what is wrong."""
    yield from _wrong_kind(recipe)
    if not isinstance(recipe.target, OnnxRuntime):
        return
    quality, text = recipe.evaluate.quality, recipe.evaluate.text
    for key in ("structured", "tasks"):
        if getattr(recipe.evaluate, key):
            yield ("evaluate", key), f"{key} asks for text, which an encoder does not write; remove it."
    if len({isinstance(metric, ClassMetric) for metric in quality if isinstance(metric, EncoderMetric)}) > 1:
        yield ("evaluate", "quality"), "a model gives classes or embeddings, not both; keep the metrics of one of them."
    queries: dict[int, str] = {}
    for index, metric in enumerate(quality):
        place: Location = ("evaluate", "quality", index)
        if isinstance(metric, ClassAccuracyMetric) and not isinstance(text, JsonLines | HubDataset):
            yield (*place, "label"), "classes are known of rows only; let evaluate.text be of source jsonl or hf."
        if isinstance(metric, RetrievalMetric):
            first = queries.setdefault(metric.query_tokens, metric.metric)
            if len(queries) > 1 and first == metric.metric:
                yield (
                    (*place, "query_tokens"),
                    "both retrieval metrics take the same queries; give them the same query_tokens.",
                )
            if 2 * metric.query_tokens > recipe.evaluate.length:
                message = f"a query of {metric.query_tokens} tokens leaves too little of a text of {recipe.evaluate.length} to be found."
                yield (*place, "query_tokens"), f"{message} Lower it, or raise evaluate.length."


def _wrong_kind(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    """Metrics of encoders for a decoder's target, and the other way round."""
    encoders = isinstance(recipe.target, OnnxRuntime)
    speed = [str(get_args(one.model_fields["metric"].annotation)[0]) for one in get_args(EncoderSpeedMetric)]
    own = {"quality": [*ENCODER_QUALITY], "speed": [*speed, "load_time", "peak_memory", "size_on_disk"]}
    for kind, metrics in (("quality", recipe.evaluate.quality), ("speed", recipe.evaluate.speed)):
        for index, metric in enumerate(metrics):
            of_encoders = isinstance(metric, EncoderMetric | EncoderSpeedMetric)
            if of_encoders == encoders or isinstance(metric, _EVERYWHERE):
                continue
            place: Location = ("evaluate", kind, index)
            if encoders:
                yield (
                    place,
                    f"{metric.metric} means nothing for an encoder, which onnxruntime takes; there are: {', '.join(own[kind])}.",
                )
            else:
                yield (
                    place,
                    f"{metric.metric} is measured on encoders, which target onnxruntime takes; {recipe.target.format} takes decoders.",
                )
