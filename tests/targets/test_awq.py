import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from assay.errors import AssayError
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.recipe import Recipe
from assay.targets import awq as target
from assay.targets.realized import verify

FORMAT = {"format": "awq"}
K_PROJ = "model.layers.0.self_attn.k_proj"


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def test_golden_bytes_of_one_module() -> None:
    """AutoAWQ's order: from the lowest bits up, the outputs 0 2 4 6 1 3 5 7."""
    outputs = torch.arange(8, dtype=torch.uint8)[:, None]
    codes = torch.cat([outputs, 15 - outputs], dim=1)
    points, scales = 7 - outputs, torch.arange(1.0, 9.0)[:, None]
    weight = QuantizedWeight(WeightScheme("W4A16_ASYM", 4, False, 2), codes, scales, points)
    packed = target.pack_module(QuantizedModule(weight, None), torch.float16)
    assert packed["qweight"].tolist() == [[0x75316420], [signed(0x8ACE9BDF)]]
    assert packed["qzeros"].tolist() == [[0x02461357]]
    assert packed["scales"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert [packed[part].dtype for part in ("qweight", "qzeros", "scales")] == [torch.int32] * 2 + [torch.float16]


def test_symmetric_weights_have_the_zero_point_8() -> None:
    codes = torch.full((16, 4), 9, dtype=torch.uint8)
    weight = QuantizedWeight(WeightScheme("W4A16", 4, True, 2), codes, torch.full((16, 2), -0.5), None)
    packed = target.pack_module(QuantizedModule(weight, None), torch.bfloat16)
    assert packed["qzeros"].tolist() == [[signed(0x88888888)] * 2] * 2
    assert packed["scales"].tolist() == [[-0.5] * 16] * 2


@pytest.mark.parametrize(("group_size", "written"), [(32, 32), ("channel", -1)])
def test_the_configuration_names_what_stays_float(
    bench: Any, recipe_for: Callable[..., Recipe], group_size: int | str, written: int
) -> None:
    overrides = [{"match": "*.0.mlp.down_proj", "scheme": "none"}]
    recipe = recipe_for(FORMAT, scheme="W4A16", group_size=group_size, overrides=overrides)
    directory, realization = bench.build(recipe, "llama")
    assert json.loads((directory / "config.json").read_text())["quantization_config"] == {
        "bits": 4,
        "group_size": written,
        "modules_to_not_convert": ["model.layers.0.mlp.down_proj", "lm_head"],
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    assert realization.fallbacks == ()
    tensors = load_file(directory / "model.safetensors")
    assert {"model.layers.0.mlp.down_proj.weight", f"{K_PROJ}.qweight"} <= set(tensors)
    assert f"{K_PROJ}.weight" not in tensors
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".scales")} == {torch.float16}


def test_scales_that_float16_does_not_hold_stay_in_the_models_dtype(
    bench: Any, recipe_for: Callable[..., Recipe]
) -> None:
    recipe = recipe_for(FORMAT)
    modules = bench.modules(recipe, "llama")
    weight = modules[K_PROJ].weight
    tiny = QuantizedWeight(weight.scheme, weight.codes, torch.full_like(weight.scales, 2.0**-30), None)
    directory, realization = bench.build(recipe, "llama", modules | {K_PROJ: QuantizedModule(tiny, None)})
    (note,) = realization.fallbacks
    assert note.startswith(f"awq stores scales as float16 by custom; these are bfloat16, because those of {K_PROJ}")
    tensors = load_file(directory / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".scales")} == {torch.bfloat16}


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_changed_number_is_noticed(bench: Any, recipe_for: Callable[..., Recipe], part: str) -> None:
    from safetensors.torch import save_file

    recipe = recipe_for(FORMAT, scheme="W4A16_ASYM")
    directory, _ = bench.build(recipe, "llama")
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{K_PROJ}.{part}"].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, directory / "model.safetensors")
    shape, modules = bench.checkpoint("llama").shape, bench.modules(recipe, "llama")
    with pytest.raises(AssayError, match=f"{K_PROJ}: the compiled model's numbers are not the ones"):
        verify(shape, assign_schemes(recipe.quantize, shape).schemes, modules, target.read_back(directory, shape))
