"""`check_recipes` finds what can be found without computing, in an instant and without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from assay.checking import CheckResult, check_recipes
from assay.errors import UsageError

RECIPE = """\
version: 1
name: tiny
model: {source: SOURCE}
calibration: {source: python-docs, samples: 8, length: 64}
quantize: {scheme: W4A16, group_size: 32, method: rtn}
target: {format: compressed-tensors}
evaluate:
  length: 64
  quality: [{metric: kl_divergence, tokens: 500}]
gate: {kl_divergence: {max: 0.1}}
"""
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """good.yaml, hub.yaml (not cached), absent.yaml (no such model), below/typo.yaml, and a file that is no recipe."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "below").mkdir()
    for name, text in {
        "good.yaml": RECIPE.replace("SOURCE", "./model"),
        "hub.yaml": RECIPE.replace("SOURCE", "hf:org/never-fetched"),
        "absent.yaml": RECIPE.replace("SOURCE", "./absent"),
        "below/typo.yaml": RECIPE.replace("SOURCE", "../model").replace("group_size", "groupsize"),
        "notes.txt": "version: 7",
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def only(result: CheckResult) -> tuple[list[str], str | None]:
    (checked,) = result.files
    return [str(problem) for problem in checked.problems], checked.note


def test_a_good_recipe_has_neither_problem_nor_note(recipes: Path) -> None:
    result = check_recipes([recipes / "good.yaml"])
    assert only(result) == ([], None)
    assert result.passed


def test_a_hub_model_that_is_not_cached_is_a_note_and_no_problem(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    result = check_recipes([recipes / "hub.yaml"])
    assert only(result) == ([], "hf:org/never-fetched is not on this machine, so its layers were not checked")
    assert result.passed


def test_directories_are_searched_to_the_bottom(recipes: Path) -> None:
    result = check_recipes([recipes])
    assert [Path(checked.file).relative_to(recipes).as_posix() for checked in result.files] == [
        "absent.yaml",
        "below/typo.yaml",
        "good.yaml",
        "hub.yaml",
    ]
    assert [bool(checked.problems) for checked in result.files] == [True, True, False, False]
    assert not result.passed
    assert check_recipes([recipes / "good.yaml", recipes / "below"]).files[1].file.endswith("typo.yaml")


def test_problems_name_file_line_and_cause(recipes: Path) -> None:
    problems, _ = only(check_recipes([recipes / "absent.yaml"]))
    assert len(problems) == 1
    assert problems[0].startswith(f"{recipes}/absent.yaml:3: model.source ./absent: ")
    problems, _ = only(check_recipes([recipes / "below" / "typo.yaml"]))
    assert problems[0].startswith(f"{recipes}/below/typo.yaml:5: ")
    assert "groupsize" in problems[0]


def test_assignments_are_checked_too(recipes: Path) -> None:
    assert only(check_recipes([recipes / "good.yaml"], ("quantize.group_size=64",))) == ([], None)
    problems, _ = only(check_recipes([recipes / "good.yaml"], ("quantize.group_size=128",)))
    assert problems[0].startswith("--set quantize.group_size=128: group_size 128 does not divide the inputs of")


def test_a_damaged_model_is_a_problem_without_a_line(recipes: Path) -> None:
    (recipes / "model" / "config.json").write_text("{")
    problems, _ = only(check_recipes([recipes / "good.yaml"]))
    assert len(problems) == 1
    assert problems[0].startswith(f"{recipes}/good.yaml: {recipes}/model/config.json: not valid JSON")


def test_a_damaged_gguf_file_is_a_problem(recipes: Path) -> None:
    (recipes / "tiny.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (recipes / "good.yaml").write_text(RECIPE.replace("SOURCE", "./tiny.gguf"))
    problems, _ = only(check_recipes([recipes / "good.yaml"]))
    assert "cut short" in problems[0]


def test_a_file_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    problems, _ = only(check_recipes([tmp_path / "absent.yaml"]))
    assert problems == [f"{tmp_path}/absent.yaml: cannot be read: No such file or directory."]


def test_a_directory_without_recipes_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"no \*\.yaml below {tmp_path}\."):
        check_recipes([tmp_path])


def test_checking_imports_neither_torch_nor_transformers(recipes: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from assay.checking import check_recipes\n"
        "result = check_recipes([Path(sys.argv[1])])\n"
        "print(len(result.files), *({'torch', 'transformers', 'numpy', 'onnxruntime', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, recipes],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["4"]
