"""Every scheme as a compressed-tensors checkpoint: the package's own tools read our numbers, and models compute with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from assay.quantize.activations import quantize_inputs
from assay.quantize.schemes import WeightScheme, weight_scheme
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.recipe import Recipe
from assay.targets.compressed_tensors_formats import arguments_of, pack_module
from assay_evals.runtimes.base import open_runtime

FORMAT = {"format": "compressed-tensors"}
SCHEMES = ["W8A8", "W8A8_STATIC", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "MXFP4", "NVFP4A16", "NVFP4"]
PRESETS = {"W8A8_STATIC": None, "W8A8": "W8A8"} | {name: name for name in SCHEMES[2:]}
Q_PROJ = "model.layers.0.self_attn.q_proj"
PROMPT = [5, 400, 17, 301, 77, 8, 9, 250, 33, 4, 511, 1]


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """Blocks of 128 rows and columns: several, and rows that do not fill the last one."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 64}
    return make_model(tmp_path_factory.mktemp("wide"), "llama", num_key_value_heads=1, **sizes)


@pytest.fixture
def built(
    bench: Any, recipe_for: Callable[..., Recipe], wide_model: Path, request: pytest.FixtureRequest
) -> tuple[str, Path, dict[str, QuantizedModule]]:
    """A scheme, its artifact, and what the quantizer chose."""
    scheme = request.param
    recipe = recipe_for(FORMAT, scheme=scheme, group_size=None)
    return scheme, bench.artifact(recipe, str(wide_model)), bench.modules(recipe, str(wide_model))


every_scheme = pytest.mark.parametrize("built", SCHEMES, indirect=True)


@every_scheme
def test_compressed_tensors_reads_our_numbers_and_writes_our_bytes(
    built: tuple[str, Path, dict[str, QuantizedModule]],
) -> None:
    _, directory, modules = built
    tensors = load_file(directory / "model.safetensors")
    config = QuantizationConfig.model_validate(AutoConfig.from_pretrained(directory).quantization_config)
    (group,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    for name, module in modules.items():
        weight = module.weight
        found = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        scale = found["weight_scale"]
        wide = found | {"weight_scale": scale if scale.dtype == torch.uint8 else scale.float()}
        decompressed, expected = compressor.decompress(wide, group)["weight"], weight.dequantize()
        # Of 4-bit floats it makes bfloat16.
        assert torch.equal(decompressed, expected.to(decompressed.dtype)), name

        scales = compressor.decompress(wide, group)["weight_scale"] if weight.scheme.bits == 4 else wide["weight_scale"]
        values = {key: value for key, value in found.items() if key not in ("weight", "weight_packed")}
        made = compressor.compress(values | {"weight": weight.dequantize(), "weight_scale": scales}, group)
        for part in ("weight", "weight_packed"):
            assert (part in made) == (part in found)
            assert part not in found or torch.equal(made[part].view(torch.uint8), found[part].view(torch.uint8)), name


def simulated(model: Path, modules: dict[str, QuantizedModule], dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Logits of the float model with our weights in it, rounded to a dtype, and our own quantization of activations."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, module in modules.items():
        linear = network.get_submodule(name)
        linear.weight.data = module.weight.dequantize().to(dtype).float()
        if module.weight.scheme.activations is not None:
            linear.register_forward_pre_hook(
                lambda _module, inputs, module=module: quantize_inputs(
                    inputs[0], module.weight.scheme.activations, module.input_scale
                )
            )
    with torch.no_grad():
        return network(torch.tensor([PROMPT])).logits[0].numpy()


@every_scheme
def test_transformers_loads_it_and_computes_as_we_simulate(
    built: tuple[str, Path, dict[str, QuantizedModule]], wide_model: Path
) -> None:
    _, directory, modules = built
    # It decompresses in the first forward pass, 4-bit floats to bfloat16.
    dtype = torch.bfloat16 if modules[Q_PROJ].weight.scheme.scale != "float" else torch.float32
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        loaded(torch.tensor([PROMPT]))
        theirs = torch.nn.Module.float(loaded)(torch.tensor([PROMPT])).logits[0].numpy()
    ours = simulated(wide_model, modules, dtype)
    # A value that lies halfway between two levels may be rounded either way.
    np.testing.assert_allclose(theirs, ours, atol=2e-3 * float(np.abs(ours).max()))


@every_scheme
def test_the_oracle_computes_as_we_simulate(
    built: tuple[str, Path, dict[str, QuantizedModule]], wide_model: Path
) -> None:
    _, directory, modules = built
    ours = simulated(wide_model, modules)
    runtime = open_runtime("transformers", directory)
    np.testing.assert_allclose(runtime.logits(PROMPT), ours, atol=2e-3 * float(np.abs(ours).max()))
    # Fewer rows at once are summed in another order, and 8 bits of difference may become one level.
    np.testing.assert_allclose(runtime.decode_logits(PROMPT, 6), ours[6:], atol=5e-2 * float(np.abs(ours).max()))


def test_the_oracle_quantizes_what_each_expert_is_given(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    recipe = recipe_for(FORMAT, scheme="FP8_DYNAMIC", group_size=None)
    ours = bench.simulated_logits(recipe, "mixtral", PROMPT)
    found = open_runtime("transformers", bench.artifact(recipe, "mixtral")).logits(PROMPT)
    np.testing.assert_allclose(found, ours, atol=2e-3 * float(np.abs(ours).max()))


@pytest.mark.parametrize(("scheme", "preset"), PRESETS.items())
def test_arguments_are_those_of_the_preset_of_that_name(scheme: str, preset: str | None) -> None:
    arguments = arguments_of(weight_scheme(scheme)) | {"targets": ["Linear"]}
    config = QuantizationConfig.model_validate({"config_groups": {"group_0": arguments}, "quant_method": "x"})
    found = config.config_groups["group_0"]
    if preset is None:
        assert (found.input_activations.strategy, found.input_activations.dynamic) == ("tensor", False)
        return
    theirs = preset_name_to_scheme(preset, ["Linear"])
    for part in ("weights", "input_activations"):
        one, other = getattr(found, part), getattr(theirs, part)
        assert (one is None) == (other is None), part
        for key in (
            "num_bits",
            "type",
            "symmetric",
            "strategy",
            "dynamic",
            "group_size",
            "block_structure",
            "scale_dtype",
        ):
            assert one is None or getattr(one, key) == getattr(other, key), (part, key)


def test_golden_bytes_of_microscaled_modules() -> None:
    """E2M1: 0, ½, 1, 1½, 2, 3, 4, 6 are the codes 0 to 7; 8 more for negatives; the even channel in the low half of a byte."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    mx = QuantizedWeight(weight_scheme("MXFP4A16"), codes, torch.tensor([[0.25]]), None)
    assert mx.dequantize()[0, :16].tolist() == [
        level * 0.25 for level in (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
    ]
    packed = pack_module(QuantizedModule(mx, None), torch.bfloat16)
    assert packed["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]
    assert packed["weight_scale"].tolist() == [[125]], "2⁻²: 127 − 2"
    share = torch.tensor([4.0])
    nv = QuantizedWeight(weight_scheme("NVFP4A16"), codes, torch.tensor([[0.5, 112.0]]), None, share)
    packed = pack_module(QuantizedModule(nv, None, input_scale=torch.tensor([3.0])), torch.bfloat16)
    assert packed["weight_scale"].view(torch.uint8).tolist() == [[0x40, 0x7E]], "2 and 448 in E4M3"
    assert packed["weight_global_scale"].tolist() == [4.0] and packed["weight_global_scale"].dtype == torch.float32
    assert nv.dequantize()[0, 1] == 0.25 and nv.dequantize()[0, 31] == -672


def test_golden_bytes_of_8_bit_modules() -> None:
    codes = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    integers = QuantizedWeight(weight_scheme("W8A8"), codes, torch.tensor([[0.5]]), None)
    packed = pack_module(QuantizedModule(integers, None), torch.bfloat16)
    assert packed["weight"].dtype == torch.int8 and packed["weight"].tolist() == [[-128, -1, 0, 127]]
    floats = QuantizedWeight(weight_scheme("FP8"), codes.clamp(max=254), torch.full((1, 1), 0.5), None)
    packed = pack_module(QuantizedModule(floats, None, input_scale=torch.tensor([0.25])), torch.bfloat16)
    assert packed["weight_scale"].tolist() == [0.5] and packed["input_scale"].tolist() == [0.25]
    assert packed["weight"].view(torch.uint8).tolist() == [[0, 127, 128, 254]]
    blocks = WeightScheme("FP8_BLOCK", 8, True, 2, "float", 2)
    scales = torch.tensor([[1.0, 2.0], [1.0, 2.0], [4.0, 8.0]])
    ragged = QuantizedWeight(blocks, torch.zeros(3, 4, dtype=torch.uint8), scales, None)
    assert pack_module(QuantizedModule(ragged, None), torch.bfloat16)["weight_scale"].tolist() == [[1, 2], [4, 8]]
