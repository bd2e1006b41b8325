"""Check recipe files without computing anything, and without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from assay.compatibility import check_model
from assay.errors import AssayError, Problem, RecipeError, UsageError
from assay.recipe_file import load_recipe


@dataclass(frozen=True)
class Checked:
    """One recipe file.  note: what could not be checked."""

    file: str
    problems: tuple[Problem, ...]
    note: str | None = None


@dataclass(frozen=True)
class CheckResult:
    """What was found in all files."""

    files: tuple[Checked, ...]

    @property
    def passed(self) -> bool:
        return not any(checked.problems for checked in self.files)


def check_recipes(paths: list[Path], assignments: tuple[str, ...] = ()) -> CheckResult:
    """Check files, and every *.yaml below directories."""
    files = [file for path in paths for file in (sorted(path.rglob("*.yaml")) if path.is_dir() else [path])]
    if not files:
        raise UsageError(f"no *.yaml below {', '.join(map(str, paths))}.")
    return CheckResult(tuple(_check(file, assignments) for file in files))


def _check(path: Path, assignments: tuple[str, ...]) -> Checked:
    try:
        recipe, document = load_recipe(path, assignments)
        shape = check_model(recipe, document, path.parent, fetch=False)
    except RecipeError as error:
        return Checked(str(path), error.problems)
    except AssayError as error:
        return Checked(str(path), (Problem(str(path), 0, str(error)),))
    note = None if shape else f"{recipe.model.source} is not on this machine, so its layers were not checked"
    return Checked(str(path), (), note)
