"""A plan says what is cached, builds nothing, refuses what must fail, and its sizes are near what a compile makes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.errors import RecipeError, UsageError
from assay.pipeline import compile_recipe
from assay.plan import Plan, plan_recipe
from assay.progress import Progress
from assay.recipe_file import load_recipe
from assay.workspace import Workspace

MakeRecipe = Callable[..., Path]
STAGES = ["quantize", "baseline", "compile", "quality", "speed"]


def plan(recipe: Path, workspace: Path, *assignments: str) -> Plan:
    loaded, document = load_recipe(recipe, assignments)
    return plan_recipe(loaded, document, recipe.parent, workspace, Progress())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> Path:
    return make_recipe(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def workspace(recipe: Path) -> Path:
    """Where the recipe was compiled already."""
    loaded, _ = load_recipe(recipe)
    compile_recipe(loaded, recipe.parent, Workspace(recipe.parent / "artifacts", Progress()))
    return recipe.parent / "artifacts"


def cached(found: Plan) -> set[str]:
    return {stage.name for stage in found.stages if stage.cached}


def test_a_plan_builds_nothing(recipe: Path, tmp_path: Path) -> None:
    found = plan(recipe, tmp_path / "artifacts")
    assert [stage.name for stage in found.stages] == STAGES and cached(found) == set()
    assert not (tmp_path / "artifacts").exists()
    assert found.seconds == sum(stage.seconds for stage in found.stages) > 0


def test_what_is_there_is_cached_and_costs_nothing(recipe: Path, workspace: Path) -> None:
    found = plan(recipe, workspace)
    assert cached(found) == set(STAGES) and found.seconds == 0


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("gate.kl_divergence.max=0.5", {"quantize", "baseline"}),
        ("evaluate.blocks=4", {"quantize", "baseline"}),
        ("calibration.seed=1", {"baseline"}),
        ("quantize.scheme=W4A16", {"baseline"}),
        ("target.format=onnxruntime-genai", {"quantize"}),
    ],
)
def test_a_change_leaves_cached_what_does_not_depend_on_it(
    recipe: Path, workspace: Path, change: str, kept: set[str]
) -> None:
    assert cached(plan(recipe, workspace, change)) == kept


def test_a_stage_that_was_changed_is_to_do(recipe: Path, tmp_path: Path) -> None:
    space = Workspace(tmp_path, Progress())
    loaded, _ = load_recipe(recipe)
    run = compile_recipe(loaded, recipe.parent, space).run
    (run / "artifact/config.json").write_text("{}")
    assert "compile" not in cached(plan(recipe, tmp_path))


def test_structured_output_is_a_stage_where_it_is_asked_for(recipe: Path, tmp_path: Path) -> None:
    line = json.dumps({"prompt": "Choose:", "schema": {"enum": ["a", "b"]}})
    (recipe.parent / "items.jsonl").write_text(f"{line}\n" * 20)
    asked = "evaluate.structured={{items: {{source: jsonl, path: items.jsonl}}, samples: {}, new_tokens: 8}}"
    few, many = (plan(recipe, tmp_path, asked.format(samples)) for samples in (2, 20))
    assert [stage.name for stage in few.stages] == [*STAGES, "structured"]
    assert few.stages[-1].seconds < many.stages[-1].seconds


def test_the_size_is_near_that_of_the_artifact(recipe: Path, workspace: Path) -> None:
    found = plan(recipe, workspace)
    weights = (workspace / "runs/tiny/artifact/model.safetensors").stat().st_size
    assert found.artifact_bytes == pytest.approx(weights, rel=0.1)
    linears = 2 * (3 * 64 * 64 + 3 * 64 * 128)
    assert found.bits_per_weight == 8.5 and found.parameters == 512 * 64 + linears, "norms do not count"
    assert found.peak_memory_bytes < found.machine_memory_bytes


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ("calibration.samples=40", "quantize"),
        ("evaluate.quality=[{metric: kl_divergence, tokens: 40000}]", "quality"),
        ("evaluate.speed=[{metric: peak_memory}]", "speed"),
        ("evaluate.speed=[{metric: time_to_first_token, prompt_tokens: [64, 128]}]", "speed"),
        ("quantize.method=gptq", "quantize"),
    ],
)
def test_more_work_takes_longer(recipe: Path, tmp_path: Path, change: str, stage: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("assay.plan._matrix_speed", lambda: 1e9)
    base = ("gate.size_on_disk=null", "target.format=onnxruntime-genai") if stage == "speed" else ()
    before, after = plan(recipe, tmp_path, *base), plan(recipe, tmp_path, change, *base)
    assert {stage.name for stage in before.stages} == set(STAGES)
    took = {stage.name: stage.seconds for stage in before.stages}
    takes = {stage.name: stage.seconds for stage in after.stages}
    assert takes[stage] > took[stage] and all(takes[name] == took[name] for name in STAGES if name != stage)


def test_it_says_whether_the_samples_can_conclude(recipe: Path, tmp_path: Path) -> None:
    few = plan(recipe, tmp_path).reach
    assert [row.metric for row in few] == ["kl_divergence", "size_on_disk"] and few[1].in_reach
    many = plan(recipe, tmp_path, "evaluate.quality=[{metric: kl_divergence, tokens: 30000}]").reach
    assert many[0].in_reach and many[0].samples == 30000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("evaluate.quality=[{metric: kl_divergence, tokens: 100000000}]", "declares 100000000"),
        ("calibration.samples=1000000", "Lower calibration.samples"),
    ],
)
def test_too_little_text_is_known_before_anything_is_built(
    recipe: Path, tmp_path: Path, change: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        plan(recipe, tmp_path, change)
    loaded, _ = load_recipe(recipe, (change,))
    with pytest.raises(UsageError, match=words):
        compile_recipe(loaded, recipe.parent, Workspace(tmp_path, Progress()))
    assert not list((tmp_path / "cache").glob("*")), "nothing was built in vain"


@pytest.mark.parametrize("change", ["calibration.length=512", "quantize.group_size=128", "model.source=./nowhere"])
def test_what_the_model_cannot_do_is_refused(recipe: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(RecipeError, match=rf"--set {re.escape(change)}: "):
        plan(recipe, tmp_path, change)
    assert not any(tmp_path.iterdir())


def test_tasks_are_a_stage_and_their_items_are_counted(recipe: Path, workspace: Path, tmp_path: Path) -> None:
    row = {"prompt": "The statement is", "references": "it"}
    (recipe.parent / "facts.jsonl").write_text(f"{json.dumps(row)}\n" * 30, encoding="utf-8")
    task = {"name": "facts", "kind": "exact_match", "items": {"source": "jsonl", "path": "facts.jsonl"}}
    content = json.loads(recipe.read_text(encoding="utf-8"))
    content["evaluate"]["tasks"], content["gate"]["tasks"] = [task], {"facts": {"max_drop": 0.1}}
    other = recipe.with_name("tasks.yaml")
    other.write_text(json.dumps(content), encoding="utf-8")
    found = plan(other, tmp_path / "artifacts")
    assert [stage.name for stage in found.stages] == [*STAGES[:-1], "tasks", STAGES[-1]]
    (reach,) = [one for one in found.reach if one.metric == "task.facts"]
    assert reach.samples == 30 and not reach.in_reach and reach.sentence.startswith("30 items resolve ")
