import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter
from safetensors.torch import load_file, save_file

from assay import __version__
from assay.errors import AssayError
from assay.quantize.schemes import assign_schemes, weight_scheme
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.recipe import Recipe
from assay.targets import compressed_tensors_formats
from assay.targets import modelopt as target
from assay.targets.realized import verify
from assay_evals.runtimes.base import open_runtime

FORMAT = {"format": "modelopt"}
Q_PROJ = "model.layers.0.self_attn.q_proj"
PROMPT = [5, 400, 17, 301, 77, 8, 9, 250, 33, 4, 511, 1]
both = pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])


@pytest.fixture
def recipe(recipe_for: Callable[..., Recipe]) -> Callable[..., Recipe]:
    return lambda scheme, **more: recipe_for(FORMAT, scheme=scheme, group_size=None, **more)


def test_golden_bytes_of_an_fp8_module() -> None:
    codes = torch.tensor([[0, 127, 128, 254]], dtype=torch.uint8)
    weight = QuantizedWeight(weight_scheme("FP8"), codes, torch.full((1, 1), 0.5), None)
    packed = target.pack_module(QuantizedModule(weight, None, input_scale=torch.tensor([0.25])), torch.bfloat16)
    assert packed["weight"].dtype == torch.float8_e4m3fn
    assert packed["weight"].view(torch.uint8).tolist() == [[0, 127, 128, 254]]
    assert {part: packed[part].item() for part in ("weight_scale", "input_scale")} == {
        "weight_scale": 0.5,
        "input_scale": 0.25,
    }
    assert all(
        packed[part].shape == () and packed[part].dtype == torch.float32 for part in ("weight_scale", "input_scale")
    )


def test_golden_bytes_of_an_nvfp4_module() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    scales, shared = torch.tensor([[0.5, 112.0]]), torch.tensor([4.0])
    weight = QuantizedWeight(weight_scheme("NVFP4"), codes, scales, None, shared)
    module = QuantizedModule(weight, None, input_scale=torch.tensor([8.0]))
    packed = target.pack_module(module, torch.bfloat16)
    assert packed["weight"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]
    assert packed["weight_scale"].dtype == torch.float8_e4m3fn
    assert packed["weight_scale"].view(torch.uint8).tolist() == [[0x40, 0x7E]], "2 and 448 in E4M3"
    assert (packed["weight_scale_2"].item(), packed["input_scale"].item()) == (0.25, 0.125)
    assert all(packed[part].shape == () for part in ("weight_scale_2", "input_scale"))
    assert torch.equal(target.rendered(module).weight.scales, scales), "a power of two has an exact reciprocal"


def test_the_formats_own_scales_are_within_one_part_in_four_million_of_ours() -> None:
    generator = torch.Generator().manual_seed(3)
    different = 0
    for _ in range(200):
        shared = torch.rand(1, generator=generator) * 1e4 + 1e-3
        stored = (torch.rand(64, 4, generator=generator) * 447 + 1).to(torch.float8_e4m3fn).float()
        codes = torch.zeros(64, 64, dtype=torch.uint8)
        weight = QuantizedWeight(weight_scheme("NVFP4"), codes, stored / shared, None, shared)
        scales = target.rendered(QuantizedModule(weight, None)).weight.scales
        difference = (scales / weight.scales - 1).abs().max()
        assert difference <= 2.0**-22
        different += int(difference > 0)
    assert 0 < different < 200


def test_scales_that_the_format_cannot_multiply_out_are_refused() -> None:
    codes, shared = torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([1.0])
    weight = QuantizedWeight(weight_scheme("NVFP4"), codes, torch.tensor([[0.3]]), None, shared)
    with pytest.raises(
        AssayError, match="no E4M3 values over the global scale 1, or its reciprocal is not exact enough"
    ):
        target.rendered(QuantizedModule(weight, None))


@both
def test_the_configuration_is_in_both_files(bench: Any, recipe: Callable[..., Recipe], scheme: str) -> None:
    overrides = [{"match": "*.0.mlp.down_proj", "scheme": "none"}]
    directory, realization = bench.build(recipe(scheme, overrides=overrides, kv_cache="fp8"), "llama")
    unquantized = ["model.layers.0.mlp.down_proj", "lm_head"]
    producer = {"name": "assay", "version": __version__}
    bits, grouped = (8, {}) if scheme == "FP8" else (4, {"group_size": 16})
    number = {"dynamic": False, "num_bits": bits, "type": "float"} | grouped
    assert json.loads((directory / "config.json").read_text())["quantization_config"] == {
        "config_groups": {"group_0": {"input_activations": number, "weights": number, "targets": ["Linear"]}},
        "ignore": unquantized,
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": producer,
        "quant_algo": scheme,
        "quant_method": "modelopt",
        **grouped,
    }
    nested = {"exclude_modules": unquantized, "kv_cache_quant_algo": "FP8", "quant_algo": scheme, **grouped}
    assert json.loads((directory / "hf_quant_config.json").read_text()) == {
        "producer": producer,
        "quantization": nested,
    }
    assert [note.partition(" each ")[0] for note in realization.fallbacks] == ["modelopt stores the reciprocal of"] * (
        scheme == "NVFP4"
    )


@both
def test_the_cache_has_its_scales_where_keys_and_values_are_made(
    bench: Any, recipe: Callable[..., Recipe], scheme: str
) -> None:
    settings = recipe(scheme, kv_cache="fp8")
    directory, _ = bench.build(settings, "llama")
    tensors = load_file(directory / "model.safetensors")
    chosen = bench.quantized(settings, "llama").tensors
    for layer in range(2):
        for letter in "kv":
            found = tensors[f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"]
            assert found.shape == () and found.dtype == torch.float32
            assert found == chosen[f"model.layers.{layer}.self_attn.{letter}_scale"].float()
    assert not any(name.endswith(("self_attn.k_scale", "self_attn.v_scale")) for name in tensors)
    plain, _ = bench.build(recipe(scheme), "llama")
    quantized_cache, float_cache = (open_runtime("transformers", path).logits(PROMPT) for path in (directory, plain))
    assert not np.array_equal(quantized_cache, float_cache)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@both
def test_the_oracle_computes_as_we_simulate(
    bench: Any, recipe: Callable[..., Recipe], scheme: str, family: str
) -> None:
    settings = recipe(scheme)
    ours = bench.simulated_logits(settings, family, PROMPT)
    found = open_runtime("transformers", bench.artifact(settings, family)).logits(PROMPT)
    np.testing.assert_allclose(found, ours, atol=2e-3 * float(np.abs(ours).max()))
    assert not np.allclose(
        found, bench.expected_logits(settings, family, PROMPT), atol=5e-3 * float(np.abs(ours).max())
    )


def test_compressed_tensors_converts_our_nvfp4_to_what_we_write_for_it(
    bench: Any, recipe: Callable[..., Recipe]
) -> None:
    settings = recipe("NVFP4")
    directory = bench.artifact(settings, "llama")
    converter = ModelOptNvfp4Converter(ignore=["lm_head"], targets=[r"re:.*_proj$"])
    converted = converter.validate(load_file(directory / "model.safetensors"))
    for name, module in bench.modules(settings, "llama").items():
        ours = compressed_tensors_formats.pack_module(module, torch.bfloat16)
        assert torch.equal(converted[f"{name}.weight_packed"], ours["weight_packed"]), name
        assert torch.equal(
            converted[f"{name}.weight_scale"].view(torch.uint8), ours["weight_scale"].view(torch.uint8)
        ), name
        for part in ("weight_global_scale", "input_global_scale"):
            torch.testing.assert_close(converted[f"{name}.{part}"].view(1), ours[part], rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        ("FP8", "weight"),
        ("FP8", "weight_scale"),
        ("NVFP4", "weight"),
        ("NVFP4", "weight_scale"),
        ("NVFP4", "weight_scale_2"),
    ],
)
def test_a_changed_number_is_noticed(bench: Any, recipe: Callable[..., Recipe], scheme: str, part: str) -> None:
    """Down to the last bit of the reciprocal."""
    settings = recipe(scheme)
    directory, _ = bench.build(settings, "llama")
    shape, modules = bench.checkpoint("llama").shape, bench.modules(settings, "llama")
    rendered = {name: target.rendered(module) for name, module in modules.items()}
    assigned = assign_schemes(settings.quantize, shape).schemes
    verify(shape, assigned, rendered, target.read_back(directory, shape))
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{Q_PROJ}.{part}"].view(-1).view(torch.uint8)[0] ^= 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(AssayError, match=f"{Q_PROJ}: the compiled model's numbers are not the ones"):
        verify(shape, assigned, rendered, target.read_back(directory, shape))
