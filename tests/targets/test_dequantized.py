"""A quantized checkpoint, made float again when a recipe says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.errors import IntegrityError, NotSupportedError
from assay.models.checkpoint import Checkpoint
from assay.models.dequantized import write_dequantized
from assay.recipe import Recipe

HEAD_8 = [{"match": "lm_head", "scheme": "W8A16"}]
WRITTEN: list[tuple[str, dict[str, Any]]] = [
    ("compressed-tensors", {"scheme": "W4A16_ASYM", "overrides": HEAD_8}),
    ("compressed-tensors", {"scheme": "W8A8_STATIC", "group_size": None}),
    ("compressed-tensors", {"scheme": "NVFP4", "group_size": None, "kv_cache": "fp8"}),
    ("awq", {"scheme": "W4A16_ASYM"}),
    ("gptq", {"scheme": "W4A16"}),
    ("modelopt", {"scheme": "FP8", "group_size": None}),
]


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("written", WRITTEN, ids=[f"{form} {given['scheme']}" for form, given in WRITTEN])
def test_weights_become_what_the_files_say(
    bench: Any,
    recipe_for: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: tuple[str, dict[str, Any]],
) -> None:
    recipe = recipe_for({"format": written[0]}, **written[1])
    artifact, original = bench.artifact(recipe, "qwen2"), bench.checkpoint("qwen2")
    monkeypatch.setattr("assay.models.shards.SHARD_BYTES", 100_000)
    write_dequantized(artifact, tmp_path)
    made = Checkpoint(tmp_path)
    made.check()
    assert set(made.files) == set(original.files) and len(set(made.files.values())) > 1
    stored = dict(bench.target(recipe).read_back(artifact, original.shape))
    assert stored
    for name in made.files:
        linear = stored.get(name.removesuffix(".weight"))
        expected = original.stored(name) if linear is None else linear.weight.bfloat16()
        assert torch.equal(made.stored(name), expected), name
    assert (tmp_path / "tokenizer.json").read_bytes() == (artifact / "tokenizer.json").read_bytes()


@pytest.fixture
def fp8(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model as DeepSeek publishes it, with blocks that the sizes do not divide: q/k/v and the MLP of one layer."""
    directory = make_model(tmp_path / "fp8", "qwen3")
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if "layers.1" in name and name.endswith("proj.weight")]:
        weight = tensors[name].float()
        scales = torch.empty(-(-weight.shape[0] // 48), -(-weight.shape[1] // 48))
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                block = weight[48 * row : 48 * row + 48, 48 * column : 48 * column + 48]
                scales[row, column] = block.abs().max() / 448
                block /= scales[row, column]
        tensors |= {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}
    change_config(directory, quantization_config=settings)
    return directory


def test_fine_grained_fp8_is_within_its_rounding_of_the_original(
    fp8: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    write_dequantized(fp8, tmp_path / "float")
    original, made = Checkpoint(tiny_model("qwen3")), Checkpoint(tmp_path / "float")
    assert set(made.files) == set(original.files)
    for linear in original.shape.linears:
        expected, found = original.weight(linear.name), made.weight(linear.name)
        # Four bits of significand, then bfloat16's eight.
        assert torch.allclose(found, expected, rtol=2**-4 + 2**-8, atol=2**-9 * float(expected.abs().max())), (
            linear.name
        )


def test_tensors_that_no_scale_explains_are_damage(fp8: Path, tmp_path: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, fp8 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        IntegrityError, match=r"layers\.1\.mlp\.up_proj\.weight is float8_e4m3fn, and no scale beside it"
    ):
        write_dequantized(fp8, tmp_path / "float")


def test_tensors_of_another_method_are_damage(fp8: Path, tmp_path: Path) -> None:
    change_config(fp8, quantization_config={"quant_method": "fp8"})
    with pytest.raises(
        IntegrityError, match=r"are not what quant_method fp8 makes of a module \(KeyError: 'weight_block"
    ):
        write_dequantized(fp8, tmp_path / "float")


def test_an_unknown_method_is_named_with_those_that_are_known(fp8: Path, tmp_path: Path) -> None:
    change_config(fp8, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(NotSupportedError, match="no reader of quant_method bitsandbytes; this release has compressed"):
        write_dequantized(fp8, tmp_path / "float")
