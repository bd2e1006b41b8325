"""Which recipes a branch changed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

BOTH = ["recipes/a.yaml", "recipes/deep/b.yaml"]


def found(repository: Any, **environment: str) -> list[str]:
    done = repository.script("recipes.sh", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_only_what_changed_since_the_base(repository: Any) -> None:
    assert found(repository, ASSAY_BASE=repository.base) == []
    repository.recipe("recipes/deep/b.yaml", name="b2", verdict="PASS", code=0)
    repository.recipe("recipes/new.yaml", name="new", verdict="PASS", code=0)
    repository.write("recipes/notes.txt", "not a recipe")
    repository.write("other.yaml", "elsewhere")
    repository.commit()
    assert found(repository, ASSAY_BASE=repository.base) == ["recipes/deep/b.yaml", "recipes/new.yaml"]
    assert found(repository, ASSAY_BASE=repository.base, ASSAY_CHANGED="false") == [*BOTH, "recipes/new.yaml"]
    assert found(repository, ASSAY_BASE=repository.base, ASSAY_RECIPES="*.yaml\n\n ./recipes/*.yaml \r\n") == [
        "other.yaml",
        "recipes/new.yaml",
    ]


def test_a_deleted_recipe_is_not_run_and_a_renamed_one_is(repository: Any) -> None:
    repository.git("rm", "-q", "recipes/a.yaml")
    repository.git("mv", "recipes/deep/b.yaml", "recipes/renamed.yaml")
    repository.commit()
    assert found(repository, ASSAY_BASE=repository.base) == ["recipes/renamed.yaml"]


def test_what_the_base_gained_since_is_no_change_of_the_branch(repository: Any) -> None:
    repository.git("checkout", "-q", "-b", "feature")
    repository.recipe("recipes/new.yaml", name="new", verdict="PASS", code=0)
    repository.commit()
    repository.git("checkout", "-q", "main")
    repository.recipe("recipes/a.yaml", name="changed-on-main", verdict="PASS", code=0)
    ahead = repository.commit()
    repository.git("checkout", "-q", "feature")
    assert found(repository, ASSAY_BASE=ahead) == ["recipes/new.yaml"]


@pytest.mark.parametrize("base", ["", "0" * 40])
def test_without_a_base_all_recipes_are_run(repository: Any, base: str) -> None:
    assert found(repository, ASSAY_BASE=base) == BOTH


def test_gitlab_names_the_base_in_its_own_variables(repository: Any) -> None:
    repository.recipe("recipes/new.yaml", name="new", verdict="PASS", code=0)
    middle = repository.commit()
    repository.recipe("recipes/newer.yaml", name="newer", verdict="PASS", code=0)
    repository.commit()
    zeros = "0" * 40
    request = {"CI_MERGE_REQUEST_DIFF_BASE_SHA": middle, "CI_COMMIT_BEFORE_SHA": zeros}
    assert found(repository, **request) == ["recipes/newer.yaml"]
    assert found(repository, CI_COMMIT_BEFORE_SHA=repository.base) == ["recipes/new.yaml", "recipes/newer.yaml"]
    assert len(found(repository, CI_COMMIT_BEFORE_SHA=zeros)) == 4


def test_a_shared_file_runs_every_recipe(repository: Any) -> None:
    repository.write("data/calibration.jsonl", "{}")
    repository.commit()
    assert found(repository, ASSAY_BASE=repository.base, ASSAY_SHARED="data/**") == BOTH
    assert found(repository, ASSAY_BASE=repository.base, ASSAY_SHARED="texts/**") == []


def test_a_shallow_clone_fetches_the_base(repository: Any, tmp_path: Path) -> None:
    repository.recipe("recipes/new.yaml", name="new", verdict="PASS", code=0)
    repository.commit()
    repository.git("config", "uploadpack.allowAnySHA1InWant", "true")
    url = f"file://{repository.path}"
    subprocess.run(["git", "clone", "-q", "--depth", "1", url, str(tmp_path / "shallow")], check=True)
    done = repository.script("recipes.sh", cwd=tmp_path / "shallow", ASSAY_BASE=repository.base)
    assert (done.returncode, done.stdout) == (0, "recipes/new.yaml\0")
    repository.git("config", "uploadpack.allowAnySHA1InWant", "false")
    lost = repository.script("recipes.sh", cwd=tmp_path / "shallow", ASSAY_BASE="1" * 40)
    assert lost.returncode == 2 and "fetch-depth: 0" in lost.stderr


@pytest.mark.parametrize(
    "name", ["$(touch owned).yaml", "`touch owned`.yaml", "a;touch owned.yaml", "-x.yaml", "ü b'\".yaml"]
)
def test_a_name_is_only_ever_a_name(repository: Any, name: str) -> None:
    repository.recipe(f"recipes/{name}", name="x", verdict="PASS", code=0)
    repository.commit()
    assert found(repository, ASSAY_BASE=repository.base) == [f"recipes/{name}"]
    assert not (repository.path / "owned").exists()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ASSAY_RECIPES": "recpies/*.yaml"}, "no file in git matches recpies/"),
        ({"ASSAY_RECIPES": " \n"}, "no recipes are named"),
        ({"ASSAY_CHANGED": "yes"}, "changed is yes; allowed: true, false"),
        ({"ASSAY_BASE": "main; touch owned"}, "the base is no commit"),
        ({"ASSAY_BASE": "--output=owned"}, "the base is no commit"),
        ({"ASSAY_RECIPES": "--help"}, "no file in git matches"),
        ({"ASSAY_RECIPES": ":(exclude)recipes"}, "no file in git matches"),
    ],
)
def test_a_wrong_request_is_exit_code_2(repository: Any, environment: dict[str, str], words: str) -> None:
    done = repository.script("recipes.sh", **environment)
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr
    assert not (repository.path / "owned").exists()


def test_a_name_with_a_line_end_is_refused(repository: Any) -> None:
    repository.recipe("recipes/x\n::error::y.yaml", name="x", verdict="PASS", code=0)
    repository.commit()
    done = repository.script("recipes.sh", ASSAY_BASE=repository.base)
    assert (done.returncode, done.stdout) == (2, "") and "rename the file" in done.stderr
    assert not any(line.startswith("::") for line in done.stderr.splitlines())


def test_outside_a_repository(repository: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = repository.script("recipes.sh", cwd=tmp_path / "empty")
    assert done.returncode == 2 and "is not a git repository" in done.stderr
