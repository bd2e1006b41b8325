"""Recipes from the files of other tools: what they say of a job, checked, with a gate. One file per source format.

What cannot be said in a recipe, and would make another artifact, is refused with its line; what is of no consequence here is left out and
listed. Files are data: nothing that they name is imported, run or fetched.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from assay.compatibility import check_model
from assay.errors import AssayError, Problem, RecipeError, UsageError
from assay.files import write_atomic
from assay.importing.llm_compressor import is_llm_compressor, read_llm_compressor
from assay.importing.reading import Draft, Reading
from assay.importing.truss import is_truss, read_truss
from assay.importing.writing import complete, render
from assay.models.architectures import DecoderShape, decoder_shape
from assay.models.source import configuration, locate
from assay.recipe import Model
from assay.recipe_file import validated
from assay.recipe_yaml import Document, parse_document, read_document

LLM_COMPRESSOR, TRUSS = "llm-compressor", "Truss"
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Imported:
    """A recipe that passes `assay check`.

    source: which tool's file it was.  left_out: what of that file has no place in it.  chosen: part of the recipe → why it is not from
    that file.  note: what could not be checked.  written: where it is, None when it was only made.
    """

    source: str
    recipe: str
    left_out: tuple[Problem, ...]
    chosen: dict[str, str]
    note: str | None
    written: str | None = None


def import_recipe(file: Path, output: Path | None, model: str | None = None, force: bool = False) -> Imported:
    """Read a file of another tool and write the recipe that does the same; RecipeError with every problem, and nothing written.

    model: hf:ORG/NAME or a path, in place of what the file says, or because it says nothing.  output: None only makes the text.
    """
    if output is not None and output.exists() and not (force and output.is_file()):
        raise UsageError(
            f"{output} exists already; choose another name" + (", or add --force." if output.is_file() else ".")
        )
    base = output.parent if output else Path()
    reading = Reading(_document(file))
    given = None if model is None else _given(model, base)
    shape = _shape(given, base)
    source, draft = _read(reading, shape, model_given=given is not None)
    chosen = given or draft.model
    if chosen is None:
        raise UsageError(
            f"{file}: a recipe of {LLM_COMPRESSOR} does not name its model; add --model hf:ORG/NAME, or --model ./directory."
        )
    recipe = complete(draft, chosen, _name(draft, chosen), shape.context_length if shape else 0)
    left_out = tuple(sorted(reading.left_out, key=lambda problem: problem.line))
    text = render(recipe, draft, f"{file.name} ({source})", left_out)
    note = _check(text, file, output or Path("recipe.yaml"), recipe)
    if output is not None:
        write_atomic(output, text.encode())
    chosen_parts = draft.chosen | {"evaluate": "not in the file", "gate": "not in the file"}
    return Imported(source, text, left_out, chosen_parts, note, None if output is None else str(output))


def _document(file: Path) -> Document:
    """The file as plain data, by the same rules as a recipe."""
    try:
        return read_document(file, f"recipe of {LLM_COMPRESSOR} or {TRUSS} config", "`default_stage` or `trt_llm`")
    except RecipeError as error:
        # llm-compressor itself writes Python objects into the recipes that it saves.
        advice = " Remove the tag, and brackets around its value: `type: int`; or the line, if the value is an object."
        raise RecipeError(
            [replace(found, message=found.message + advice * ("!!python" in found.message)) for found in error.problems]
        ) from error


def _read(reading: Reading, shape: DecoderShape | None, model_given: bool) -> tuple[str, Draft]:
    data = reading.document.data
    if is_llm_compressor(data):
        return LLM_COMPRESSOR, read_llm_compressor(reading, shape)
    if is_truss(data):
        return TRUSS, read_truss(reading, model_given)
    reading.refuse(
        (),
        "this is a recipe of Assay already; there is nothing to import."
        if data.get("version") == 1 and "quantize" in data
        else f"neither a recipe of {LLM_COMPRESSOR} (stages, such as default_stage) nor a {TRUSS} config (trt_llm).",
    )
    raise RecipeError(reading.problems)


def _shape(model: dict[str, Any] | None, base: Path) -> DecoderShape | None:
    """The model's shape where it is on this machine; what is wrong with it is found again, with its line, when the recipe is checked."""
    if model is None:
        return None
    located = locate(Model(**model), base, fetch=False)
    return located and decoder_shape(configuration(located), model["source"])


def _check(text: str, file: Path, output: Path, wanted: dict[str, Any]) -> str | None:
    """What `assay check` does, before anything is written; returns what it could not check."""
    document = parse_document(str(output), text)
    if document.data != wanted:
        raise AssayError(
            f"{file}: the recipe for it would not be read as it is meant. Nothing was written; please report this."
        )
    try:
        recipe = validated(document)
        shape = check_model(recipe, document, output.parent, fetch=False)
    except RecipeError as error:
        raise RecipeError(
            [
                Problem(str(file), 0, f"its recipe would not pass `assay check`: {problem.message}")
                for problem in error.problems
            ]
        ) from error
    return None if shape else f"{recipe.model.source} is not on this machine, so its layers were not checked"


def _given(model: str, base: Path) -> dict[str, Any]:
    """A model as a recipe in `base` names it: a path from there."""
    if not model.startswith(("hf:", "package:")) and not Path(model).is_absolute():
        path = os.path.relpath(model, base)
        model = path if path.startswith("..") else f"./{path}"
    try:
        return Model(source=model).model_dump(exclude_defaults=True)
    except ValidationError as error:
        allowed = Model.model_fields["source"].description
        raise UsageError(f"--model is {model!r}; write {allowed}.") from error


def _name(draft: Draft, model: dict[str, Any]) -> str:
    """What the file calls the job, or the model and its scheme."""
    stem = Path(str(model["source"])).name.removesuffix(".gguf")
    words = draft.name or f"{stem}-{draft.quantize['scheme']}"
    slug = re.sub(r"[^a-z0-9._-]+", "-", words.lower().replace("_", "-"))[:_LONGEST_NAME].strip("._-")
    return slug or "imported"
