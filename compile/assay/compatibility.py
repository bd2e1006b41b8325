"""What cannot work is refused before anything is computed: the recipe against its model and its target. Imports no torch."""

from __future__ import annotations

import fnmatch
import importlib.util
from pathlib import Path
from typing import get_args

from assay.errors import Problem, RecipeError, UsageError
from assay.models.architectures import DecoderShape, LinearShape, already_quantized, quantized_by
from assay.models.encoders import is_encoder, longest_text, shape_of, task_of
from assay.models.source import configuration, locate
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.recipe import (
    CheckpointTarget,
    ClassMetric,
    EncoderSpeedMetric,
    GroupedScheme,
    LmEvalTask,
    OnnxRuntime,
    OnnxRuntimeGenai,
    Quantize,
    Recipe,
    request_lengths,
)
from assay.recipe_yaml import Document, Location
from assay.targets import TARGETS
from assay.targets.refusals import engine_refusals, format_refusals, split_product

_GROUP_SIZES = (32, 64, 128)
_FUSED_BY_ORT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def check_model(recipe: Recipe, document: Document, base: Path, fetch: bool) -> DecoderShape | None:
    """Check a recipe against its model; RecipeError with every problem.  None when the model is not on this machine."""
    if problems := _missing_extras(recipe, document):
        raise RecipeError(problems)
    try:
        located = locate(recipe.model, base, fetch)
        if located is None:
            return None
        found = configuration(located)
        shape = shape_of(found, recipe.model.source)
    except UsageError as error:
        raise RecipeError([document.problem(("model", "source"), str(error))]) from error
    method = quantized_by(found)
    if method and not recipe.model.dequantize:
        raise RecipeError(
            [document.problem(("model", "source"), f"{recipe.model.source}: {already_quantized(method)}")]
        )
    if recipe.model.dequantize and not method:
        message = "config.json says nothing of quantized weights; remove this line."
        raise RecipeError([document.problem(("model", "dequantize"), message)])
    if problems := _kind_problems(recipe, shape, document) or shape_problems(recipe, shape, document):
        raise RecipeError(problems)
    if is_encoder(shape) and (problems := _length_problems(recipe, longest_text(shape, found), document)):
        raise RecipeError(problems)
    return shape


def _kind_problems(recipe: Recipe, shape: DecoderShape, document: Document) -> list[Problem]:
    """A decoder for a target that takes encoders, or the other way round; a head that nothing here measures."""
    name, target = shape.architecture.class_name, recipe.target.format
    if is_encoder(shape) != TARGETS[target].encoders:
        takes = f"{name} is a decoder, and onnxruntime takes encoders; use onnxruntime-genai."
        if is_encoder(shape):
            takes = f"{name} is an encoder, and {target} takes decoders; use onnxruntime."
        return [document.problem(("target", "format"), takes)]
    task = task_of(shape) if is_encoder(shape) else ""
    if task not in ("", "embedding", "classification"):
        message = (
            f"{name} is no bare encoder ({task}); onnxruntime takes those, for embeddings, and sequence classifiers."
        )
        return [document.problem(("model", "source"), message)]
    classes = [isinstance(metric, ClassMetric) for metric in recipe.evaluate.quality]
    if task and any(of_classes != (task == "classification") for of_classes in classes):
        gives = "classes, not embeddings" if task == "classification" else "embeddings, not classes"
        return [document.problem(("evaluate", "quality"), f"{name} gives {gives}; measure those.")]
    return []


def _length_problems(recipe: Recipe, longest: int, document: Document) -> list[Problem]:
    """Texts that are longer than an encoder reads."""
    message = "{} tokens exceed what the encoder has positions for, {}."
    lengths = (("calibration", recipe.calibration.length), ("evaluate", recipe.evaluate.length))
    problems = [
        document.problem((place, "length"), message.format(length, longest))
        for place, length in lengths
        if length > longest
    ]
    for index, metric in enumerate(recipe.evaluate.speed):
        most = max((one.tokens for one in metric.shapes), default=0) if isinstance(metric, EncoderSpeedMetric) else 0
        if most > longest:
            problems.append(document.problem(("evaluate", "speed", index, "shapes"), message.format(most, longest)))
    return problems


def _missing_extras(recipe: Recipe, document: Document) -> list[Problem]:
    """What the recipe asks for that is not installed here."""
    if importlib.util.find_spec("lm_eval") is not None:
        return []
    message = "tasks of lm-evaluation-harness need the extra `lm-eval`: pip install 'assay[lm-eval]'."
    return [
        document.problem(("evaluate", "tasks", index, "kind"), message)
        for index, task in enumerate(recipe.evaluate.tasks)
        if isinstance(task, LmEvalTask)
    ]


def shape_problems(recipe: Recipe, shape: DecoderShape, document: Document) -> list[Problem]:
    """Everything in the recipe that this decoder, or this target with this decoder, cannot do."""
    problems: list[Problem] = []
    assignment = assign_schemes(recipe.quantize, shape)
    problems += [
        document.problem(
            ("quantize", "overrides", index, "match"),
            f"the override {recipe.quantize.overrides[index].match!r} matches no module; there are "
            f"{f'{shape.architecture.head} and, ' if shape.architecture.head else ''}in each layer, {', '.join(shape.patterns)}.",
        )
        for index in assignment.unmatched
    ]
    if not assignment.schemes:
        problems.append(document.problem(("quantize", "overrides"), "the overrides leave nothing to quantize."))
    problems += _group_problems(recipe.quantize, assignment.schemes, shape, document)
    problems += _target_problems(recipe, assignment.schemes, shape, document)
    if isinstance(recipe.target, OnnxRuntimeGenai):
        names = split_product(shape, assignment.schemes, only=_FUSED_BY_ORT)
        problems += _fused_problems("onnxruntime-genai computes", names, document)
    elif not isinstance(recipe.target, OnnxRuntime):
        names = split_product(shape, assignment.schemes)
        problems += _fused_problems("serving engines such as vLLM compute", names, document)
    for place, length in (("calibration", recipe.calibration.length), ("evaluate", recipe.evaluate.length)):
        if shape.context_length and length > shape.context_length:
            message = f"length {length} exceeds the model's context of {shape.context_length} tokens."
            problems.append(document.problem((place, "length"), message))
    structured = recipe.evaluate.structured
    if structured and shape.context_length and structured.new_tokens >= shape.context_length:
        message = (
            f"{structured.new_tokens} new tokens leave no room in the model's context of {shape.context_length} tokens."
        )
        problems.append(document.problem(("evaluate", "structured"), message))
    for kind, metrics in (("quality", recipe.evaluate.quality), ("speed", recipe.evaluate.speed)):
        for index, metric in enumerate(metrics):
            asked = max((sum(lengths) for lengths in request_lengths(metric).items()), default=0)
            if shape.context_length and asked > shape.context_length:
                message = f"a request of {asked} tokens exceeds the model's context of {shape.context_length} tokens."
                problems.append(document.problem(("evaluate", kind, index), message))
    return problems


def _group_problems(
    settings: Quantize, schemes: dict[str, WeightScheme], shape: DecoderShape, document: Document
) -> list[Problem]:
    """One problem per group size that does not divide the inputs it is meant for."""
    refused: dict[tuple[str, int], list[LinearShape]] = {}
    for linear in shape.linears:
        scheme = schemes.get(linear.name)
        if scheme and scheme.group_size and linear.in_features % scheme.group_size:
            chosen = "" if scheme.name in get_args(GroupedScheme) else scheme.name
            refused.setdefault((chosen, scheme.group_size), []).append(linear)
    problems: list[Problem] = []
    for (fixed, group_size), linears in refused.items():
        kinds = sorted({(linear.name.rsplit(".", 2)[-1], linear.in_features) for linear in linears})
        sizes = [size for size in _GROUP_SIZES if all(linear.in_features % size == 0 for linear in linears)]
        named = ", ".join(f"{name} ({features} inputs)" for name, features in kinds)
        if fixed:
            message = (
                f"{fixed} has one scale for every {group_size} inputs, which does not divide those of {named} "
                f"({len(linears)} Linears); give them another scheme in overrides."
            )
            places = [index for index, override in enumerate(settings.overrides) if override.scheme == fixed]
            own = settings.scheme == fixed or not places
            where = ("quantize", "scheme") if own else ("quantize", "overrides", places[0], "scheme")
            problems.append(document.problem(where, message))
            continue
        works = ", ".join([*map(str, sizes), "channel"])
        message = f"group_size {group_size} does not divide the inputs of {named} ({len(linears)} Linears); sizes that work: {works}."
        overrides = [index for index, override in enumerate(settings.overrides) if override.group_size == group_size]
        own = settings.group_size == group_size or not overrides
        place = ("quantize", "group_size") if own else ("quantize", "overrides", overrides[0], "group_size")
        problems.append(document.problem(place, message))
    return problems


def _target_problems(
    recipe: Recipe, schemes: dict[str, WeightScheme], shape: DecoderShape, document: Document
) -> list[Problem]:
    """What the target's format cannot say, and what the engine that is to serve it does not read."""
    target, settings = recipe.target.format, recipe.quantize
    problems = [
        document.problem(_place(settings, refusal.module), refusal.message)
        for refusal in format_refusals(target, shape, schemes)
    ]
    families, family = TARGETS[target].families, shape.architecture.model_type
    if families and family not in families:
        message = (
            f"{target} takes models of type {', '.join(families)} here, not {family}; compressed-tensors takes it."
        )
        problems.append(document.problem(("target", "format"), message))
    if settings.kv_cache is not None and (reason := TARGETS[target].no_kv_cache):
        message = f"{target} {reason}; remove kv_cache{'' if TARGETS[target].encoders else ', or compile for compressed-tensors'}."
        problems.append(document.problem(("quantize", "kv_cache"), message))
    if isinstance(recipe.target, CheckpointTarget) and recipe.target.engine is not None:
        refusals = engine_refusals(target, recipe.target.engine, shape, schemes)
        problems += [document.problem(("target", "engine"), refusal.message) for refusal in refusals]
    return problems


def _place(settings: Quantize, module: str) -> Location:
    """Where the recipe says what a module's scheme is."""
    for index, override in enumerate(settings.overrides):
        if fnmatch.fnmatchcase(module, override.match):
            return ("quantize", "overrides", index, "scheme")
    return ("quantize", "scheme")


def _fused_problems(who: str, names: tuple[str, ...], document: Document) -> list[Problem]:
    """A problem when there are Linears that are computed as one product and that differ in scheme."""
    if not names:
        return []
    example = "*.self_attn.[qkv]_proj" if names[0].endswith("q_proj") else "*.mlp.[gu]*_proj"
    if ".experts." in names[0]:
        example = "*.experts.*"
    message = (
        f"{who} {', '.join(names)} as one product, so they need the same scheme and group size; "
        f'let one override match all of them, e.g. "{example}".'
    )
    return [document.problem(("quantize", "overrides"), message)]
