"""`assay import`: what is written, what is not, and what is said."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from foreign_recipes import CONFIG, FP8_CACHE, GPTQ, OLD_AWQ, SMOOTH

from assay.errors import AssayError
from assay.importing import import_recipe
from assay.importing.writing import render
from assay.recipe_file import load_recipe
from assay.recipe_yaml import parse_document

Assay = Callable[..., CompletedProcess[str]]
RECIPE = "default_stage:\n  default_modifiers:\n    GPTQModifier: {scheme: W4A16, ignore: [lm_head], n_grid: 3}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gptq.yaml"
    path.write_text(RECIPE)
    return path


def test_the_recipe_is_written_and_passes_check(assay: Assay, file: Path, tmp_path: Path) -> None:
    output = tmp_path / "recipes.yaml"
    done = assay("import", file, "-o", output, "--model", "hf:org/model")
    assert done.returncode == 0, done.stderr
    assert f"{output}: ok (hf:org/model is not on this machine" in done.stdout
    assert "chosen here: calibration, target, evaluate, gate" in done.stdout
    assert f"{file}:3: default_stage.default_modifiers.GPTQModifier.n_grid: Assay's search" in done.stderr
    assert assay("check", output).returncode == 0
    text = output.read_text()
    assert "# From gptq.yaml (llm-compressor), by `assay import`." in text and "#   line 3: default_stage" in text
    assert "gate:  # chosen: margins for a first run" in text
    assert load_recipe(output)[0].quantize.scheme == "W4A16"


def test_nothing_is_replaced_unless_asked_for(assay: Assay, file: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine.yaml"
    output.write_text("my own work\n")
    arguments = ("import", file, "-o", output, "--model", "hf:org/model")
    done = assay(*arguments)
    assert done.returncode == 2 and f"{output} exists already" in done.stderr and "--force" in done.stderr
    assert output.read_text() == "my own work\n"
    assert assay(*arguments, "--force").returncode == 0 and output.read_text().startswith("# From gptq.yaml")
    first = output.read_bytes()
    assert assay(*arguments, "--force").returncode == 0 and output.read_bytes() == first
    into = assay("import", file, "-o", tmp_path, "--model", "hf:org/model", "--force")
    assert into.returncode == 2 and "exists already" in into.stderr


def test_without_a_place_it_is_printed(assay: Assay, file: Path, tmp_path: Path) -> None:
    done = assay("import", file, "--model", "hf:org/model", cwd=tmp_path)
    assert done.returncode == 0 and parse_document("x", done.stdout).data["version"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptq.yaml"]


def test_as_json(assay: Assay, file: Path) -> None:
    found = json.loads(assay("import", file, "--model", "hf:org/model", "--json").stdout)
    assert (found["source"], found["written"]) == ("llm-compressor", None)
    assert parse_document("x", found["recipe"]).data["quantize"]["method"] == "gptq"
    assert [problem["line"] for problem in found["left_out"]] == [3]
    assert set(found["chosen"]) == {"calibration", "target", "evaluate", "gate"}
    file.write_text(RECIPE.replace("W4A16", "W3A16"))
    done = assay("import", file, "--model", "hf:org/model", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["problems"][0]["line"] == 3


def test_a_recipe_of_llm_compressor_needs_a_model(assay: Assay, file: Path, tmp_path: Path) -> None:
    done = assay("import", file, "-o", tmp_path / "x.yaml")
    assert done.returncode == 2 and "does not name its model; add --model hf:ORG/NAME" in done.stderr
    for model, words in (("hf:only", "--model is 'hf:only'; write hf:ORG/NAME"), ("./nowhere", "does not exist")):
        wrong = assay("import", file, "-o", tmp_path / "x.yaml", "--model", model, cwd=tmp_path)
        assert wrong.returncode == 2 and words in wrong.stderr and "Traceback" not in wrong.stderr
    assert not (tmp_path / "x.yaml").exists()


def test_a_model_that_is_here_is_checked_and_named_from_the_recipe(
    assay: Assay, file: Path, tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "models/tiny")
    (tmp_path / "recipes").mkdir()
    arguments = ("import", file.name, "-o", "recipes/x.yaml", "--model", "models/tiny")
    done = assay(*arguments, cwd=tmp_path)
    assert (
        done.returncode == 2
        and "its recipe would not pass `assay check`: group_size 128 does not divide" in done.stderr
    )
    assert not list((tmp_path / "recipes").iterdir()), "nothing is half-written"
    file.write_text(RECIPE.replace("W4A16", "FP8_DYNAMIC"))
    written = assay(*arguments, cwd=tmp_path)
    assert written.returncode == 0 and "is not on this machine" not in written.stdout
    assert load_recipe(tmp_path / "recipes/x.yaml")[0].model.source == "../models/tiny"
    assert assay("check", "recipes/x.yaml", cwd=tmp_path).stdout == "recipes/x.yaml: ok\n"


def test_a_file_that_is_not_there(assay: Assay, tmp_path: Path) -> None:
    done = assay("import", tmp_path / "nowhere.yaml")
    assert done.returncode == 2 and "nowhere.yaml: cannot be read" in done.stderr


def test_what_a_file_says_cannot_leave_a_comment(assay: Assay, file: Path, tmp_path: Path) -> None:
    file.write_text(RECIPE.replace("[lm_head]", '["lm_head", "x\\nname: owned\\u2028\\u202e"]'))
    done = assay("import", file, "-o", tmp_path / "x.yaml", "--model", "hf:org/model")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "x.yaml").read_text()
    assert text.count("\nname: ") == 1 and "\u202e" not in text and "\u2028" not in text


ODD = (None, True, -1, 10**30, "", "re:(", [], {}, [[1]], [{}], {"a": None}, "a\nb: c")


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything in plain data is."""
    yield place
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*place, key))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    found = dict(content) if isinstance(content, dict) else list(content)
    found[place[0]] = changed(content[place[0]], place[1:], value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [GPTQ, OLD_AWQ, SMOOTH, FP8_CACHE, CONFIG], ids=["gptq", "awq", "smooth", "fp8", "truss"]
)
def test_whatever_stands_somewhere_is_read_or_refused(tmp_path: Path, text: str) -> None:
    content, file = yaml.safe_load(textwrap.dedent(text)), tmp_path / "odd.yaml"
    endings: list[bool] = []
    for place in places(content):
        for value in ODD:
            file.write_text(json.dumps(changed(content, place, value)))
            try:
                import_recipe(file, None, "hf:org/model")
                endings.append(True)
            except AssayError as error:
                assert error.exit_code == 2 and str(error)
                endings.append(False)
    assert any(endings) and not all(endings)


@pytest.mark.parametrize(
    "value", ["no", "12", "1e3", "a: b", "a #b", "*x", "{x}", "", "true", "x:", "-", "naïve ü", '"q"', "a\nb"]
)
def test_text_is_written_as_it_is_read(value: str) -> None:
    from assay.importing.reading import Draft

    recipe = {
        "version": 1,
        "name": value,
        "model": {"source": value},
        "target": {"format": value},
        "quantize": {"scheme": value},
    }
    text = render(recipe, Draft({}, {}), "x.yaml (test)", ())
    assert parse_document("x", text).data == recipe
