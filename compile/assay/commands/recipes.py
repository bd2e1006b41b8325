"""Commands on a recipe: check it, plan it, compile it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from assay.commands.options import (
    DEFAULT_WORKSPACE,
    JsonOption,
    KeyOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    WorkspaceOption,
)
from assay.errors import EXIT_OK, EXIT_USAGE
from assay.show import Output


def check(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH…", help="Recipe files, or directories searched for *.yaml.")
    ],
    assignments: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check recipes against the schema, themselves, and their model where it is on this machine. Computes nothing."""
    from assay.checking import check_recipes

    result = check_recipes(paths, tuple(assignments or ()))
    Output(json, quiet).checked(result)
    raise typer.Exit(EXIT_OK if result.passed else EXIT_USAGE)


def schema(
    of: Annotated[
        Literal["recipe", "policy", "verdict"], typer.Argument(metavar="[recipe|policy|verdict]", help="Of which file.")
    ] = "recipe",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Print the JSON Schema of recipes or trust policies, for editors, or of verdict.json, for programs that read it."""
    del json, quiet  # It is JSON, and nothing else, in any case.
    from assay.files import readable_json

    if of == "verdict":
        from assay_evals.verdict import verdict_schema

        sys.stdout.buffer.write(readable_json(verdict_schema()))
        return
    if of == "policy":
        from assay.registry.policy import PolicyFile

        sys.stdout.buffer.write(readable_json(PolicyFile.model_json_schema()))
        return
    from assay.recipe import Recipe

    sys.stdout.buffer.write(readable_json(Recipe.model_json_schema()))


def plan(
    recipe: RecipeArgument,
    assignments: SetOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what compiling a recipe would do: stages, what is cached, time and memory, and what its samples can detect."""
    from assay.plan import plan_recipe
    from assay.recipe_file import load_recipe

    output = Output(json, quiet)
    loaded, document = load_recipe(recipe, tuple(assignments or ()))
    output.planned(plan_recipe(loaded, document, recipe.parent, workspace, output.progress))


def compile_(
    recipe: RecipeArgument,
    assignments: SetOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    force: Annotated[bool, typer.Option("--force", help="Build every stage again, whatever is cached.")] = False,
    fresh_evidence: Annotated[
        bool, typer.Option("--fresh-evidence", help="Measure again, whatever is cached.")
    ] = False,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Stop after the verdict and the report.")] = False,
    key: KeyOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize, compile, measure against the baseline, judge, report; publish on PASS. Run again, it goes on where it stopped."""
    from json import dumps as quoted

    from assay.compatibility import check_model
    from assay.recipe_file import load_recipe

    output = Output(json, quiet)
    signed = () if key is None else (f"publish.key={quoted(key)}",)
    loaded, document = load_recipe(recipe, (*(assignments or ()), *signed))
    check_model(loaded, document, recipe.parent, fetch=True)
    from assay.pipeline import compile_recipe
    from assay.workspace import Workspace

    space = Workspace(workspace, output.progress, force)
    outcome = compile_recipe(
        loaded, recipe.parent, space, fresh_evidence=fresh_evidence or force, publishing=not no_publish
    )
    output.concluded(outcome)
    raise typer.Exit(outcome.exit_code)


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A recipe of llm-compressor (YAML), or a Truss config.yaml.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Recipe to write, instead of standard output.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="SOURCE", help="hf:ORG/NAME or a directory; llm-compressor's recipes need it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a recipe, with a gate, of another tool's file. What has no like in Assay is refused with its line; nothing is run."""
    from assay.importing import import_recipe

    Output(json, quiet).imported(import_recipe(file, output, model, force))
