"""Artifacts that were damaged behind the builder's back, as broken tools damage them: each is caught, by what should catch it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.artifact import MANIFEST_NAME
from assay.pipeline import compile_recipe
from assay.progress import Progress
from assay.recipe_file import load_recipe
from assay.targets import compressed_tensors
from assay.workspace import Workspace
from assay_evals.runtimes.transformers_oracle import TransformersRuntime
from assay_evals.verdict import Verdict

pytestmark = pytest.mark.slow
Damage = Callable[[Path], None]
# Between what the sound artifact and the damaged ones have.
LIMIT = 0.02
MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture
def compile_damaged(
    tmp_path: Path, make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Damage], Verdict]:
    """Compile a tiny recipe, its candidate damaged as soon as it has been written, read back and found right."""

    def run(damage: Damage) -> Verdict:
        build = compressed_tensors.build_candidate

        def sabotaged(*arguments: Any) -> Any:
            realization = build(*arguments)
            damage(arguments[-1])
            return realization

        monkeypatch.setattr(compressed_tensors, "build_candidate", sabotaged)
        quantize = {"scheme": "W4A16_ASYM", "group_size": 32, "method": "gptq"}
        recipe = make_recipe(tmp_path, quantize=quantize, gate={"kl_divergence": {"max": LIMIT}})
        space = Workspace(tmp_path / "artifacts", Progress())
        return compile_recipe(load_recipe(recipe)[0], recipe.parent, space, publishing=False).verdict

    return run


def change(directory: Path, part: str, how: Callable[[Tensor], Tensor], only: str = MODULE) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    names = [name for name in tensors if name.startswith(only) and name.endswith(part)]
    assert names
    save_file({name: how(value) if name in names else value for name, value in tensors.items()}, path, {"format": "pt"})


def nothing(_: Path) -> None: ...


def swap_scales(directory: Path) -> None:
    """Of one layer: every row gets another's."""
    change(directory, "weight_scale", lambda scales: scales.flip(0).contiguous(), "model.layers.1.")


def shift_zero_points(directory: Path) -> None:
    """By one, everywhere, as readers of the other version of a format do."""
    change(directory, "weight_zero_point", lambda packed: packed + 0x11111111, "model.layers")


def cut_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:20]
    path.write_text(json.dumps(content), encoding="utf-8")


def other_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


def no_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()


def float_weights(directory: Path) -> None:
    """What a builder leaves that falls back without a word: the float model, called quantized."""
    source = directory.parents[2] / "model"
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, directory / name)


def test_the_sound_artifact_passes(compile_damaged: Callable[[Damage], Verdict]) -> None:
    verdict = compile_damaged(nothing)
    assert verdict.verdict == "PASS", verdict.reasons


@pytest.mark.parametrize(
    ("damage", "word", "reason"),
    [
        (swap_scales, "FAIL", "KL divergence: Even the better end"),
        (shift_zero_points, "FAIL", "KL divergence: Even the better end"),
        (cut_tokenizer, "INVALID", "tokenizer identity: the candidate's tokenizer cuts"),
        (other_template, "INVALID", "chat template identity: the source model has one, the candidate has another one"),
        (no_template, "INVALID", "chat template identity: the source model has one, the candidate has none"),
        (float_weights, "INVALID", "two arms: Candidate and baseline are the same bytes"),
    ],
)
def test_damage_is_caught_by_what_should_catch_it(
    compile_damaged: Callable[[Damage], Verdict], damage: Damage, word: str, reason: str
) -> None:
    verdict = compile_damaged(damage)
    assert verdict.verdict == word
    assert any(told.startswith(reason) for told in verdict.reasons), verdict.reasons


class BrokenSteps(TransformersRuntime):
    """Right in one pass over a window, which is how divergence is measured, and wrong for single tokens."""

    def decode_logits(self, tokens: list[int], start: int) -> NDArray[np.float32]:
        return super().decode_logits(tokens, start)[:, ::-1].copy()


def test_a_kernel_that_is_broken_for_single_tokens_is_caught(
    compile_damaged: Callable[[Damage], Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(_: str, directory: Path, *, threads: int | None = None) -> TransformersRuntime:
        return (BrokenSteps if (directory / MANIFEST_NAME).is_file() else TransformersRuntime)(directory, threads)

    monkeypatch.setattr("assay_evals.evaluate.open_runtime", opened)
    verdict = compile_damaged(nothing)
    assert verdict.verdict == "INVALID"
    assert any(told.startswith("decode path: Fed token by token, the candidate is ") for told in verdict.reasons)
