"""Files of other tools, and what is imported from them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from assay.importing import Imported, import_recipe
from assay.recipe import Recipe
from assay.recipe_file import validated
from assay.recipe_yaml import parse_document

QWEN = "hf:Qwen/Qwen3-8B"


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    """Write a file, its text indented as it likes."""

    def write(text: str) -> Path:
        path = tmp_path / "source.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


@pytest.fixture
def imported(source: Callable[[str], Path]) -> Callable[..., tuple[Recipe, Imported]]:
    """Import a text; the recipe as Assay reads it, and what was said of it."""

    def read(text: str, model: str | None = QWEN) -> tuple[Recipe, Imported]:
        found = import_recipe(source(text), None, model)
        return validated(parse_document("imported.yaml", found.recipe)), found

    return read
