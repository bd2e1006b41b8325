import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from assay.errors import AssayError
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.recipe import Recipe
from assay.targets import gptq as target
from assay.targets.realized import verify

FORMAT = {"format": "gptq"}
K_PROJ = "model.layers.0.self_attn.k_proj"


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def packed(scheme: WeightScheme, codes: torch.Tensor, points: torch.Tensor | None) -> dict[str, torch.Tensor]:
    scales = torch.full((len(codes), scheme.groups(codes.shape[1])), -0.25)
    return target.pack_module(QuantizedModule(QuantizedWeight(scheme, codes, scales, points), None), torch.float16)


def test_golden_bytes_of_an_asymmetric_module() -> None:
    """Codes along the inputs, zero points along the outputs, as they are: checkpoint_format "gptq_v2"."""
    outputs, inputs = torch.arange(8, dtype=torch.uint8)[:, None], torch.arange(16, dtype=torch.uint8)[None, :]
    points = torch.cat([outputs, 15 - outputs], dim=1)
    found = packed(WeightScheme("W4A16_ASYM", 4, False, 8), (outputs + inputs) % 16, points)
    words = found["qweight"].tolist()
    assert [words[0][0], words[1][0]] == [0x76543210, signed(0xFEDCBA98)]
    assert [words[0][1], words[1][1]] == [signed(0x87654321), 0x0FEDCBA9]
    assert found["qweight"].shape == (2, 8)
    assert found["qzeros"].tolist() == [[0x76543210], [signed(0x89ABCDEF)]]
    assert found["g_idx"].tolist() == [0] * 8 + [1] * 8
    assert found["scales"].tolist() == [[-0.25] * 8] * 2
    assert [found[part].dtype for part in ("qweight", "qzeros", "g_idx")] == [torch.int32] * 3


def test_golden_bytes_of_symmetric_modules() -> None:
    """The zero point less one: checkpoint_format "gptq"."""
    codes = torch.full((8, 8), 9, dtype=torch.uint8)
    assert packed(WeightScheme("W4A16", 4, True, 0), codes, None)["qzeros"].tolist() == [[0x77777777]]
    found = packed(WeightScheme("W8A16", 8, True, 0), torch.arange(32, dtype=torch.uint8).view(4, 8), None)
    assert found["qzeros"].tolist() == [[0x7F7F7F7F]]
    assert found["qweight"].tolist()[0][0] == 0x03020100
    assert found["qweight"].shape == (2, 4)
    assert found["g_idx"].tolist() == [0] * 8


@pytest.mark.parametrize(
    ("scheme", "bits", "sym", "written", "head"),
    [("W4A16", 4, True, "gptq", True), ("W8A16", 8, True, "gptq", False), ("W4A16_ASYM", 4, False, "gptq_v2", False)],
)
def test_the_configuration_is_in_both_files(
    bench: Any, recipe_for: Callable[..., Recipe], scheme: str, bits: int, *, sym: bool, written: str, head: bool
) -> None:
    overrides = [{"match": "lm_head", "scheme": scheme}] * head
    directory, _ = bench.build(recipe_for(FORMAT, scheme=scheme, overrides=overrides), "llama")
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"] == {
        "bits": bits,
        "checkpoint_format": written,
        "desc_act": False,
        "group_size": 32,
        "lm_head": head,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": sym,
    }
    assert json.loads((directory / "quantize_config.json").read_text()) == config["quantization_config"]
    assert config["tie_word_embeddings"] is not head
    assert ("lm_head.qweight" in load_file(directory / "model.safetensors")) == head


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_changed_number_is_noticed(bench: Any, recipe_for: Callable[..., Recipe], part: str) -> None:
    recipe = recipe_for(FORMAT)
    directory, _ = bench.build(recipe, "llama")
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{K_PROJ}.{part}"].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, directory / "model.safetensors")
    shape, modules = bench.checkpoint("llama").shape, bench.modules(recipe, "llama")
    with pytest.raises(
        AssayError, match=f"{K_PROJ}(: the compiled model's numbers|.g_idx: the compiled model's groups)"
    ):
        verify(shape, assign_schemes(recipe.quantize, shape).schemes, modules, target.read_back(directory, shape))
