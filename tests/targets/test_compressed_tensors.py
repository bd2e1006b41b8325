import json
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file

from assay.errors import AssayError
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.recipe import Recipe
from assay.targets import compressed_tensors as target
from assay.targets import compressed_tensors_formats as formats
from assay.targets.realized import verify

FORMAT = {"format": "compressed-tensors"}
HEAD_8 = [{"match": "lm_head", "scheme": "W8A16"}]
MIXED = [
    {"match": "*.self_attn.[qkv]_proj", "scheme": "W8A16", "group_size": "channel"},
    {"match": "*.0.mlp.down_proj", "scheme": "none"},
    {"match": "lm_head", "scheme": "W4A16_ASYM", "group_size": 64},
]
K_PROJ = "model.layers.0.self_attn.k_proj"


def quantization_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@contextmanager
def opened(directory: Path, name: str) -> Iterator[tuple[bytearray, int, int]]:
    """A safetensors file's bytes, to be changed, and where one tensor lies in them."""
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    yield data, 8 + length + start, 8 + length + stop
    path.write_bytes(data)


def test_golden_bytes_of_one_module(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    recipe = recipe_for(FORMAT, scheme="W4A16_ASYM")
    scheme = WeightScheme("W4A16_ASYM", 4, False, 32)
    rows = torch.arange(32, dtype=torch.uint8)[:, None]
    columns = torch.arange(64, dtype=torch.uint8)[None, :]
    codes = (columns + rows) % 16
    points = torch.cat([rows % 16, 15 - rows % 16], dim=1)
    scales = torch.cat([torch.full((32, 1), 0.5), torch.full((32, 1), 0.0625)], dim=1)
    modules = bench.modules(recipe, "llama")
    modules[K_PROJ] = QuantizedModule(QuantizedWeight(scheme, codes, scales, points), 0.5)
    directory, _ = bench.build(recipe, "llama", modules)
    tensors = load_file(directory / "model.safetensors")

    packed = tensors[f"{K_PROJ}.weight_packed"]
    assert packed.shape == (32, 8)
    assert packed[0].tolist() == [0x76543210, 0xFEDCBA98 - (1 << 32)] * 4
    assert packed[1].tolist() == [0x87654321 - (1 << 32), 0x0FEDCBA9] * 4
    zero_points = tensors[f"{K_PROJ}.weight_zero_point"]
    assert zero_points.T.tolist() == [
        [0x76543210, 0xFEDCBA98 - (1 << 32)] * 2,
        [0x89ABCDEF - (1 << 32), 0x01234567] * 2,
    ]
    assert tensors[f"{K_PROJ}.weight_scale"].dtype == torch.bfloat16
    assert tensors[f"{K_PROJ}.weight_scale"].tolist() == [[0.5, 0.0625]] * 32
    assert tensors[f"{K_PROJ}.weight_shape"].tolist() == [32, 64]
    assert f"{K_PROJ}.weight" not in tensors


@pytest.mark.parametrize("group_size", [32, "channel"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_compressed_tensors_writes_the_same_and_reads_the_same(
    bench: Any, recipe_for: Callable[..., Recipe], scheme: str, group_size: int | str
) -> None:
    """Its own compressor, given our weights, makes our bytes; its decompressor makes our weights of them."""
    recipe = recipe_for(FORMAT, scheme=scheme, group_size=group_size)
    directory, _ = bench.build(recipe, "qwen2")
    tensors = load_file(directory / "model.safetensors")
    config = QuantizationConfig.model_validate(quantization_config(directory))
    (group,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, module in bench.modules(recipe, "qwen2").items():
        weight = module.weight
        found = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.weight_")}
        wide = found | {"weight_scale": found["weight_scale"].float()}
        assert torch.equal(compressor.decompress(wide, group)["weight"], weight.dequantize()), name

        # It always wants zero points, in signed codes.
        points = torch.zeros_like(weight.scales, dtype=torch.int8)
        if weight.zero_points is not None:
            points = (weight.zero_points.int() - weight.scheme.symmetric_zero_point).to(torch.int8)
        values = {"weight": weight.dequantize(), "weight_scale": weight.scales, "weight_zero_point": points}
        made = compressor.compress(values, group)
        assert set(made) == set(found), name
        assert torch.equal(made["weight_packed"], found["weight_packed"]), name
        if "weight_zero_point" in found:
            assert torch.equal(made["weight_zero_point"], found["weight_zero_point"]), name


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("overrides", [[], HEAD_8, MIXED], ids=["one group", "8-bit head", "mixed"])
def test_every_module_finds_its_scheme(
    bench: Any,
    recipe_for: Callable[..., Recipe],
    caplog: pytest.LogCaptureFixture,
    family: str,
    overrides: list[dict[str, Any]],
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = recipe_for(FORMAT, overrides=overrides)
    directory, _ = bench.build(recipe, family)
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with caplog.at_level(logging.WARNING):
        apply_quantization_config(
            model, QuantizationConfig.model_validate(config.quantization_config), show_progress=False
        )
    assert "Could not match" not in caplog.text
    shape = bench.checkpoint(family).shape
    assigned = assign_schemes(recipe.quantize, shape).schemes
    for linear in shape.linears:
        found = getattr(model.get_submodule(linear.name), "quantization_scheme", None)
        scheme = assigned.get(linear.name)
        assert (found is None) == (scheme is None), linear.name
        if found is not None and scheme is not None:
            arguments = found.weights
            assert (arguments.num_bits, arguments.symmetric) == (scheme.bits, scheme.symmetric), linear.name
            assert (arguments.group_size or 0) == scheme.group_size, linear.name


def test_one_group_targets_every_linear_and_the_head_by_name(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    directory, _ = bench.build(recipe_for(FORMAT), "mistral")
    config = quantization_config(directory)
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert config["ignore"] == ["lm_head"]
    directory, _ = bench.build(recipe_for(FORMAT, overrides=[{"match": "*", "scheme": "W4A16"}]), "mistral")
    config = quantization_config(directory)
    assert [group["targets"] for group in config["config_groups"].values()] == [["lm_head", "Linear"]]
    assert config["ignore"] == []


def test_several_groups_name_every_module_once(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    """Readers that try class names before the parts of a fused q/k/v would else give those the group of every Linear."""
    recipe = recipe_for(FORMAT, overrides=MIXED)
    directory, _ = bench.build(recipe, "mistral")
    config = quantization_config(directory)
    named = [name for group in config["config_groups"].values() for name in group["targets"]]
    shape = bench.checkpoint("mistral").shape
    assert sorted(named) == sorted(assign_schemes(recipe.quantize, shape).schemes)
    assert config["ignore"] == ["model.layers.0.mlp.down_proj"]
    assert config["format"] == "pack-quantized"


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
@pytest.mark.parametrize("overrides", [[], HEAD_8], ids=["float head", "8-bit head"])
def test_transformers_alone_loads_symmetric_checkpoints(
    bench: Any, recipe_for: Callable[..., Recipe], scheme: str, overrides: list[dict[str, Any]]
) -> None:
    from transformers import AutoModelForCausalLM

    recipe = recipe_for(FORMAT, scheme=scheme, overrides=overrides)
    directory, realization = bench.build(recipe, "llama")
    assert realization.fallbacks == ()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = [4, 8, 15, 16, 23, 42]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0].numpy()
    np.testing.assert_allclose(logits, bench.expected_logits(recipe, "llama", prompt), rtol=0, atol=1e-5)


def test_the_manifest_says_that_transformers_alone_cannot_load_asymmetric_ones(
    bench: Any, recipe_for: Callable[..., Recipe]
) -> None:
    """When this begins to load, the sentence has to go."""
    from transformers import AutoModelForCausalLM

    directory, realization = bench.build(recipe_for(FORMAT, scheme="W4A16_ASYM"), "llama")
    assert len(realization.fallbacks) == 1
    assert "cannot load packed zero points by from_pretrained alone" in realization.fallbacks[0]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def test_a_quantized_head_is_no_longer_tied(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    directory, _ = bench.build(recipe_for(FORMAT, overrides=HEAD_8), "llama")
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is False
    names = set(load_file(directory / "model.safetensors"))
    assert {"model.embed_tokens.weight", "lm_head.weight_packed"} <= names
    assert "lm_head.weight" not in names
    directory, _ = bench.build(recipe_for(FORMAT), "llama")
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is True


def test_tensors_that_are_not_quantized_are_the_sources_bytes(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    recipe = recipe_for(FORMAT)
    directory, _ = bench.build(recipe, "qwen3")
    source = load_file(bench.checkpoint("qwen3").directory / "model.safetensors")
    for name, found in load_file(directory / "model.safetensors").items():
        if name in source:
            assert found.dtype == source[name].dtype
            assert torch.equal(found, source[name]), name
    baseline = load_file(bench.baseline(recipe, "qwen3") / "model.safetensors")
    assert set(baseline) == set(source)
    assert all(torch.equal(baseline[name], tensor) for name, tensor in source.items())


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_changed_byte_is_noticed(bench: Any, recipe_for: Callable[..., Recipe], suffix: str) -> None:
    recipe = recipe_for(FORMAT, scheme="W4A16_ASYM")
    directory, _ = bench.build(recipe, "llama")
    shape, modules = bench.checkpoint("llama").shape, bench.modules(recipe, "llama")
    assigned = assign_schemes(recipe.quantize, shape).schemes
    with opened(directory, f"{K_PROJ}.{suffix}") as (data, start, stop):
        data[(start + stop) // 2] ^= 1
    with pytest.raises(AssayError, match=f"{K_PROJ}: the compiled model's numbers are not the ones"):
        verify(shape, assigned, modules, target.read_back(directory, shape))


def test_a_lost_tensor_is_noticed(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    directory, _ = bench.build(recipe_for(FORMAT), "llama")
    path = directory / "model.safetensors"
    name = b"0.mlp.up_proj.weight_scale"
    assert path.read_bytes().count(name) == 1
    path.write_bytes(path.read_bytes().replace(name, name[::-1]))
    with pytest.raises(AssayError, match=r"up_proj.weight_scale is missing"):
        dict(target.read_back(directory, bench.checkpoint("llama").shape))


def test_files_are_for_everyone_to_read(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    recipe = recipe_for(FORMAT)
    directory, _ = bench.build(recipe, "llama")
    for path in (*directory.iterdir(), *bench.baseline(recipe, "llama").iterdir()):
        assert path.stat().st_mode & 0o777 == 0o644, path.name


def test_shards_hold_the_same_model(
    bench: Any, recipe_for: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So small that the parts of one module lie in two of them."""
    from assay_evals.runtimes.base import open_runtime

    recipe = recipe_for(FORMAT, scheme="W4A16_ASYM", overrides=HEAD_8)
    single, _ = bench.build(recipe, "llama")
    limit = 3000
    monkeypatch.setattr("assay.models.shards.SHARD_BYTES", limit)
    directory, _ = bench.build(recipe, "llama")

    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = sorted(directory.glob("model-*.safetensors"))
    assert sorted(path.name for path in directory.glob("*.safetensors")) == sorted(set(index["weight_map"].values()))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    placed = {path.name: load_file(path) for path in shards}
    together = {name: tensor for tensors in placed.values() for name, tensor in tensors.items()}
    whole = load_file(single / "model.safetensors")
    assert set(together) == set(whole) == set(index["weight_map"])
    assert all(torch.equal(together[name], tensor) for name, tensor in whole.items())
    assert all(name in placed[file] for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for tensors in placed.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    homes: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        homes.setdefault(name.rpartition(".")[0], set()).add(file)
    assert any(len(files) > 1 for files in homes.values())

    prompt = [4, 8, 15, 16, 23, 42]
    one, many = (open_runtime("transformers", path).logits(prompt) for path in (single, directory))
    np.testing.assert_array_equal(one, many)


def test_a_baseline_in_shards_stays_a_checkpoint(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from assay.models.checkpoint import Checkpoint

    monkeypatch.setattr("assay.models.shards.SHARD_BYTES", 100_000)
    checkpoint = bench.checkpoint("qwen2")
    target.build_baseline(checkpoint, tmp_path)
    again = Checkpoint(tmp_path)
    assert set(again.files) == set(checkpoint.files)
    assert len(set(again.files.values())) > 1
    assert all(torch.equal(again.stored(name), checkpoint.stored(name)) for name in checkpoint.files)


@pytest.mark.parametrize("rows", [1, 5, 8, 13])
def test_zero_points_of_any_number_of_rows_are_padded(rows: int) -> None:
    """As compressed-tensors pads them: with the code 0."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values = torch.randint(0, 16, (rows, 3), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)
    signed = (values.int() - 8).to(torch.int8)
    words = formats._pack_rows(values, 4)
    assert words.shape == (-(-rows // 8), 3)
    assert torch.equal(words, pack_to_int32(signed, 4, packed_dim=0))
    assert torch.equal(formats._unpack_rows(words, 4, rows), values)
