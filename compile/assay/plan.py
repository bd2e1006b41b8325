"""What a run will do and cost, and whether it can conclude, before it starts.

Times are estimates: arithmetic operations over this machine's measured matrix speed, with factors fitted to measured runs
(docs/benchmarks.md). They tell minutes from hours, no more.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from assay.compatibility import check_model
from assay.errors import AssayError
from assay.host import cores, memory_bytes
from assay.job import resolve, source_stage
from assay.models.architectures import DecoderShape
from assay.models.source import locate
from assay.progress import Progress
from assay.quantize.model import held_bytes, walked_models, walked_samples
from assay.quantize.schemes import assign_schemes
from assay.quantize.spill import MEMORY_SHARE
from assay.recipe import ExactMatchTask, GreedyAgreementMetric, PrefixReuseMetric, Recipe
from assay.recipe_yaml import Document
from assay.targets import TARGETS
from assay.workspace import Workspace
from assay_evals.encoder_findings import of_encoder
from assay_evals.encoders.compared import shapes_of
from assay_evals.encoders.texts import queries_wanted, texts_wanted
from assay_evals.evaluate import check_evaluation, measure_stages
from assay_evals.planning import Reach, plan_gates
from assay_evals.speed.measure import lengths_of
from assay_evals.speed.worker import REPETITIONS
from assay_evals.tasks.measure import read_tasks

# Share of the matrix speed that each kind of work reaches, fitted on two cores.
_QUANTIZE_EFFICIENCY = 0.55
_SCORING_EFFICIENCY = 0.45
_DECODE_BYTES_PER_SECOND = 12e9
_PROCESS_SECONDS = 3.0
# What an answer in JSON takes, prompt included, in decoded tokens; both arms write each twice.
_ANSWER_TOKENS = 64
# What an item of a task takes with its choices, some more and some less.
_TOKENS_PER_ITEM = 200
_LIBRARIES_BYTES = 600_000_000


@dataclass(frozen=True)
class PlannedStage:
    """One stage: whether it is cached, and about how many seconds it takes if it is not."""

    name: str
    cached: bool
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a compile of this recipe would do now."""

    name: str
    model: str
    parameters: int
    stages: tuple[PlannedStage, ...]
    peak_memory_bytes: float
    machine_memory_bytes: int
    artifact_bytes: float
    bits_per_weight: float
    reach: tuple[Reach, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages if not stage.cached)


def plan_recipe(recipe: Recipe, document: Document, base: Path, workspace: Path, progress: Progress) -> Plan:
    """Plan a recipe; its model is fetched if it has to be, but nothing is built."""
    shape = check_model(recipe, document, base, fetch=True)
    located = locate(recipe.model, base)
    if shape is None or located is None:
        raise AssayError(f"model.source {recipe.model.source}: not on this machine.")
    space = Workspace(workspace, progress)
    tasks = read_tasks(recipe.evaluate, base)
    seconds = _seconds(recipe, shape, _matrix_speed(), {task.name: task.used().items for task in tasks})
    cached = dict.fromkeys(seconds, False)
    if located.is_float:
        del seconds["source"], cached["source"]
    if located.is_float or space.holds(source_stage(located)):
        job = resolve(recipe, base, space)
        check_evaluation(job)
        stages = {"quantize": job.quantize_stage, "baseline": job.baseline_stage, "compile": job.candidate_stage}
        cached |= {} if located.is_float else {"source": True}
        cached |= {name: space.holds(stage) for name, stage in stages.items()}
        if cached["compile"] and cached["baseline"]:
            measured = measure_stages(job, space)
            cached |= {stage.name: space.holds(stage) for stage in measured}
        cached["quantize"] = cached["quantize"] or cached["compile"]
    quantized, bits = _quantized(recipe, shape)
    kept = shape.parameters + _head_copy(recipe, shape) - quantized
    return Plan(
        name=recipe.name,
        model=recipe.model.source,
        parameters=shape.parameters,
        stages=tuple(PlannedStage(name, cached[name], seconds[name]) for name in seconds),
        peak_memory_bytes=_peak_memory(recipe, shape),
        machine_memory_bytes=memory_bytes(),
        artifact_bytes=quantized * bits / 8 + max(0, kept) * 2,
        bits_per_weight=bits,
        reach=plan_gates(recipe.evaluate, recipe.gate, items={task.name: task.counts for task in tasks}),
    )


def _matrix_speed() -> float:
    """Floating-point operations per second of a float32 product of the kind that dominates, measured in a moment."""
    torch.set_num_threads(cores())
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds: list[float] = []
    for _ in range(12):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    # The fastest: the others waited for threads to start, or for whoever else uses this machine.
    return 2 * 1024**3 / min(seconds)


def _seconds(recipe: Recipe, shape: DecoderShape, speed: float, items: dict[str, int]) -> dict[str, float]:
    """Estimated seconds of each stage when nothing is cached.  items: how many each task has."""
    evaluation = recipe.evaluate
    tokens = _walked_tokens(recipe, shape)
    weights = sum(linear.out_features * linear.in_features for linear in shape.linears)
    grams = sum(linear.in_features**2 for linear in shape.linears) / len(shape.linears) * shape.layers
    grams *= len(shape.architecture.linears)
    quantize = tokens * 2 * walked_models(recipe.quantize, shape) * (weights + grams) / (speed * _QUANTIZE_EFFICIENCY)
    float_bytes = 4 * weights
    scored = max((getattr(metric, "tokens", 0) for metric in evaluation.quality), default=0)
    asked = max((getattr(metric, "samples", 0) for metric in evaluation.quality), default=0)
    scoring = 2 * max(scored, asked * 25) * 2 * weights / (speed * _SCORING_EFFICIENCY)
    steps = sum(one.prompts * one.new_tokens for one in evaluation.quality if isinstance(one, GreedyAgreementMetric))
    # Both arms, of which the candidate's weights are no larger.
    scoring += 2 * steps * float_bytes / _DECODE_BYTES_PER_SECOND
    structured = evaluation.structured
    written = 4 * structured.samples * min(structured.new_tokens, _ANSWER_TOKENS) if structured else 0
    answered = 2 * sum(items.values()) * _TOKENS_PER_ITEM * 2 * weights / (speed * _SCORING_EFFICIENCY)
    generated = sum(items[one.name] * one.new_tokens for one in evaluation.tasks if isinstance(one, ExactMatchTask))
    answered += 2 * generated * float_bytes / _DECODE_BYTES_PER_SECOND
    # Both arms read each text, and what a query is taken out of, once.
    texts = texts_wanted(evaluation) + queries_wanted(evaluation)[0]
    scoring += 2 * texts * evaluation.length * 2 * weights / (speed * _SCORING_EFFICIENCY)
    timed = any(metric.metric != "size_on_disk" for metric in evaluation.speed)
    # Each request is warmed up with another prompt of its length; one that finds its prefix in the cache is computed twice more.
    reused = {one.prompt_tokens for one in evaluation.speed if isinstance(one, PrefixReuseMetric)}
    request = sum(
        (4 if length in reused else 2) * length * 2 * weights / (speed * _SCORING_EFFICIENCY)
        + new * float_bytes / _DECODE_BYTES_PER_SECOND
        for length, new in lengths_of(evaluation).items()
    )
    if of_encoder(evaluation):
        encoded = sum(shape.batch * shape.tokens for shape in shapes_of(evaluation)) * (1 + REPETITIONS)
        request = encoded * 2 * weights / (speed * _SCORING_EFFICIENCY)
    return {
        "source": 5 + float_bytes / 2e8,
        "quantize": quantize,
        "baseline": 5 + float_bytes / 2e8,
        "compile": 2 + float_bytes / 1e8,
        "quality": _PROCESS_SECONDS + scoring,
        **({"tasks": _PROCESS_SECONDS + answered} if items else {}),
        "speed": evaluation.blocks * 4 * (_PROCESS_SECONDS + request) if timed else 0.0,
        **({"structured": _PROCESS_SECONDS + written * float_bytes / _DECODE_BYTES_PER_SECOND} if structured else {}),
    }


def _walked_tokens(recipe: Recipe, shape: DecoderShape) -> int:
    """How much calibration text runs through the model."""
    calibration = recipe.calibration
    return walked_samples(recipe.quantize, shape, calibration.samples, calibration.length) * calibration.length


def _quantized(recipe: Recipe, shape: DecoderShape) -> tuple[int, float]:
    """Weights that will be quantized, and their mean bits."""
    schemes = assign_schemes(recipe.quantize, shape).schemes
    chosen = [linear for linear in shape.linears if linear.name in schemes]
    weights = [linear.out_features * linear.in_features for linear in chosen]
    bits = sum(
        count * schemes[linear.name].bits_per_weight(linear.in_features)
        for linear, count in zip(chosen, weights, strict=True)
    )
    return sum(weights), bits / sum(weights)


def _head_copy(recipe: Recipe, shape: DecoderShape) -> int:
    """Weights that a tied head stores a second time once it is quantized."""
    tied = shape.tied_embeddings and shape.architecture.head in assign_schemes(recipe.quantize, shape).schemes
    return shape.vocabulary * shape.hidden_size if tied else 0


def _peak_memory(recipe: Recipe, shape: DecoderShape) -> float:
    """Bytes of the hungriest stage: quantizing holds a layer and the activations of all samples, evaluating holds both models."""
    tokens = _walked_tokens(recipe, shape)
    activations = min(held_bytes(recipe.quantize, shape, tokens), MEMORY_SHARE * memory_bytes())
    prefixes = [f"{shape.architecture.layers}.{index}." for index in range(shape.layers)]
    sizes = {linear.name: linear.out_features * linear.in_features for linear in shape.linears}
    layer = max(sum(size for name, size in sizes.items() if name.startswith(prefix)) for prefix in prefixes)
    twins = 1 + (recipe.quantize.transform != "none" and walked_models(recipe.quantize, shape) > 1)
    # Gram matrix, drift and factor; then goal, grid and codes of the largest Linear.
    matrices = 4 * max(linear.in_features for linear in shape.linears) ** 2 + 4 * max(sizes.values())
    quantize = activations + 4 * (twins * layer + matrices)
    models = 4 * shape.parameters * (2.2 if TARGETS[recipe.target.format].runtime == "onnxruntime-genai" else 2)
    return _LIBRARIES_BYTES + max(quantize, models + recipe.evaluate.length * shape.vocabulary * 4 * 3)
