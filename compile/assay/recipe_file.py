"""Read a recipe from its file and check it against the schema and against itself (a gate needs its metric). Imports no torch.

What needs the model or the machine is checked elsewhere (checking.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from assay.errors import Problem, RecipeError, UsageError
from assay.files import canonical_json
from assay.recipe import (
    QUALITY_GATES,
    CheckpointTarget,
    ExactMatchTask,
    GroupedScheme,
    OnnxRuntime,
    Override,
    Recipe,
    Scheme,
)
from assay.recipe_encoder import ENCODER_QUALITY, encoder_contradictions
from assay.recipe_errors import explain
from assay.recipe_speed import speed_contradictions
from assay.recipe_yaml import Document, Location, apply_overrides, read_document
from assay.registry.reference import parse_address


def load_recipe(path: Path, assignments: tuple[str, ...] = ()) -> tuple[Recipe, Document]:
    """Read and check a recipe file; RecipeError names every problem with its line.

    assignments: `a.b=value` overrides, applied before validation.
    """
    document = apply_overrides(read_document(path), assignments)
    return validated(document), document


def validated(document: Document) -> Recipe:
    """The recipe in a document; RecipeError names every problem with its line."""
    try:
        recipe = Recipe.model_validate_json(canonical_json(document.data))
    except ValidationError as error:
        raise RecipeError(explain(error, document, Recipe)) from error
    if problems := _contradictions(recipe, document):
        raise RecipeError(problems)
    return recipe


def _contradictions(recipe: Recipe, document: Document) -> list[Problem]:
    """Things that are each well-formed and cannot be true together."""
    problems: list[Problem] = []

    def add(location: Location, message: str) -> None:
        problems.append(document.problem(location, message))

    measured = {metric.metric for metric in (*recipe.evaluate.quality, *recipe.evaluate.speed)}
    structured = recipe.gate.structured.declared() if recipe.gate.structured else {}
    if recipe.gate.structured and not structured:
        add(("gate", "structured"), "this gate asks for nothing; add max_new_invalid or max_drop.")
    if recipe.gate.structured and not recipe.evaluate.structured:
        add(("gate", "structured"), "the gate structured has no measurement; add structured: {} to evaluate.")
    for name in recipe.gate.declared():
        if name not in measured and name not in structured:
            where = "quality" if name in QUALITY_GATES else "speed"
            add(("gate", name), f"the gate {name} has no measurement; add {{metric: {name}}} to evaluate.{where}.")
    gated = any(name in QUALITY_GATES or name in structured for name in recipe.gate.declared())
    if not gated and not recipe.gate.tasks:
        add(("gate",), f"no quality is gated; add at least one of {', '.join(_quality_gates(recipe))}.")
    for name in recipe.gate.slices.declared() if recipe.gate.slices else ():
        if name not in measured:
            message = f"the gate {name} has no measurement; add {{metric: {name}}} to evaluate.quality."
            add(("gate", "slices", name), message)
    by_text = recipe.gate.slices is not None and (recipe.gate.slices.declared() or not recipe.gate.slices.tasks)
    if by_text and not getattr(recipe.evaluate.text, "tag", None):
        add(
            ("gate", "slices"),
            "there are no slices without evaluate.text.tag, the field that tells them apart; add it.",
        )
    for kind in ("quality", "speed"):
        names = [metric.metric for metric in getattr(recipe.evaluate, kind)]
        for index, name in enumerate(names):
            if name in names[:index]:
                add(("evaluate", kind, index), f"the metric {name} is there already; remove one of the two.")
    problems += speed_contradictions(recipe.evaluate, document)
    for location, message in (*_task_contradictions(recipe), *encoder_contradictions(recipe)):
        add(location, message)
    chosen: list[tuple[Location, Scheme | Override]] = [(("quantize",), recipe.quantize)]
    chosen += [(("quantize", "overrides", index), override) for index, override in enumerate(recipe.quantize.overrides)]
    for location, part in chosen:
        if part.group_size is None or part.scheme in get_args(GroupedScheme):
            continue
        if part.scheme == "none":
            add((*location, "group_size"), "scheme none leaves the weights as they are; remove group_size.")
        else:
            add(
                (*location, "group_size"),
                f"the scheme {part.scheme} fixes which weights share a scale; remove group_size.",
            )
    if recipe.quantize.strength is not None and recipe.quantize.transform != "smoothquant":
        add(("quantize", "strength"), "strength belongs to transform: smoothquant; remove it, or name that transform.")
    if recipe.model.revision and not recipe.model.source.startswith("hf:"):
        add(("model", "revision"), "only an hf: source has revisions; remove this line.")
    if recipe.model.dequantize and recipe.model.source.endswith(".gguf"):
        add(("model", "dequantize"), "a GGUF file is always made float first; remove this line.")
    if isinstance(recipe.target, CheckpointTarget):
        for index, metric in enumerate(recipe.evaluate.speed):
            if metric.metric != "size_on_disk":
                message = (
                    f"{metric.metric} means nothing for {recipe.target.format} here: transformers, which evaluates it, computes with "
                    "dequantized weights, as no serving engine does. Remove it; size_on_disk can be measured."
                )
                add(("evaluate", "speed", index), message)
    if recipe.publish is not None:
        try:
            parse_address(recipe.publish.registry)
        except UsageError as error:
            add(("publish", "registry"), str(error))
    return sorted(problems, key=lambda problem: problem.line)


def _quality_gates(recipe: Recipe) -> list[str]:
    """The gates of quality that a model for this target can have."""
    of_encoders = isinstance(recipe.target, OnnxRuntime)
    return [name for name in QUALITY_GATES if (name in ENCODER_QUALITY) == of_encoders] + ["tasks"] * (not of_encoders)


def _task_contradictions(recipe: Recipe) -> Iterator[tuple[Location, str]]:
    names = [task.name for task in recipe.evaluate.tasks]
    for index, task in enumerate(recipe.evaluate.tasks):
        place: Location = ("evaluate", "tasks", index)
        if task.name in names[:index]:
            yield (*place, "name"), f"there is a task {task.name!r} already; give each a name of its own."
        if task.seed is not None and task.samples is None:
            yield (*place, "seed"), "seed draws samples, and all items are asked for; add samples, or remove this line."
        if isinstance(task, ExactMatchTask) and task.extract is not None:
            try:
                re.compile(task.extract)
            except re.error as error:
                yield (*place, "extract"), f"extract is no regular expression: {error}."
    tagged = {task.name for task in recipe.evaluate.tasks if task.tag is not None}
    gates: list[Location] = [("gate", "tasks", name) for name in recipe.gate.tasks or {}]
    gates += [("gate", "slices", "tasks", name) for name in (recipe.gate.slices and recipe.gate.slices.tasks) or {}]
    for location in gates:
        name = str(location[-1])
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            yield location, f"there is no task {name!r}{meant}; evaluate.tasks has: {', '.join(names) or 'none'}."
        elif "slices" in location and name not in tagged:
            yield (
                location,
                f"the task {name} has no slices without a tag, the field that tells them apart; add it there.",
            )
