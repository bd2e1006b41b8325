"""Mixtures of experts, and calibration text that says nothing: what is done about it, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from assay.errors import AssayError
from assay.models.checkpoint import Checkpoint
from assay.progress import Progress
from assay.quantize.model import quantize_model
from assay.quantize.statistics import check_inputs
from assay.quantize.store import LayerStore, QuantizedLayer
from assay.recipe import Quantize

pytestmark = pytest.mark.slow


def settings(**values: Any) -> Quantize:
    return TypeAdapter(Quantize).validate_json(
        json.dumps({"method": "gptq", "scheme": "W4A16", "group_size": 32} | values)
    )


def quantize(model: Path, chosen: Quantize, directory: Path, tokens: torch.Tensor) -> QuantizedLayer:
    store = LayerStore(directory)
    quantize_model(Checkpoint(model), tokens, chosen, store, Progress())
    return store.read_all(Checkpoint(model).shape.layers + 1)


def tokens(samples: int, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 512, (samples, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_every_expert_is_quantized_by_its_name_on_the_hub_and_the_router_is_not(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, scheme: str
) -> None:
    model = tiny_model(family)
    chosen = settings(scheme=scheme, group_size=32 if scheme == "W4A16" else None)
    done = quantize(model, chosen, tmp_path, tokens(24))
    shape = Checkpoint(model).shape
    experts = [name for name in done.modules if ".experts." in name]
    assert len(experts) == 3 * sum(shape.experts) > 0
    assert set(done.modules) == {linear.name for linear in shape.linears} - {"lm_head"}
    assert not set(done.modules) & set(shape.routers)
    for name in experts:
        module = done.modules[name]
        assert module.relative_error is not None and module.relative_error < 0.05, name
        assert module.weight.dequantize().abs().max() > 0, name


def test_an_expert_that_saw_too_few_tokens_is_rounded_to_nearest_and_named(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of 12 tokens no expert gets half as many as it has inputs; some get none, which must not make their weights zero."""
    model = tiny_model("mixtral")
    done = quantize(model, settings(), tmp_path, tokens(1, 12))
    shape = Checkpoint(model).shape
    said = " ".join(done.notes)
    for name in (name for name in done.modules if ".experts." in name):
        assert name in said and done.modules[name].damping is None
        weight = Checkpoint(model).weight(name)
        difference = done.modules[name].weight.dequantize() - weight
        assert float(difference.square().sum() / weight.square().sum()) < 0.02, name
    assert "too few for" in said and "rounded to nearest" in said
    attention = [name for name in done.modules if ".self_attn." in name]
    assert not any(name in said for name in attention) and len(attention) == 4 * shape.layers


def test_a_transform_scales_the_router_along(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    done = quantize(tiny_model("mixtral"), settings(transform="awq", method="rtn"), tmp_path, tokens(24))
    assert "model.layers.0.block_sparse_moe.gate.weight" in done.tensors
    assert done.tensors["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_text_of_one_token_only_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path, method: str) -> None:
    """The first layer's inputs are then one vector over and over."""
    with pytest.raises(AssayError, match=r"q_proj: its inputs on the calibration text are the same in every token"):
        quantize(tiny_model("llama"), settings(method=method), tmp_path, torch.full((4, 32), 7))
    assert not any(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_a_token_of_great_size_makes_no_constant_inputs() -> None:
    """Large models put a thousand times the usual into a channel of the first token: no reason to refuse them."""
    inputs = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    inputs[0, 3] = 1e6
    check_inputs("x", [inputs[:40], inputs[40:]])
    with pytest.raises(AssayError, match="the same in every token"):
        check_inputs("x", [inputs[:1] * torch.rand(50, 1), torch.zeros(3, 16)])


def test_inputs_that_are_all_zero_are_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        AssayError, match=r"layers\.1\.self_attn\.q_proj: its inputs on the calibration text are all zero"
    ):
        quantize(model, settings(), tmp_path / "layers", tokens(8))
    assert [path.name for path in (tmp_path / "layers").iterdir()] == ["layer-0000.safetensors"], (
        "the first layer is kept"
    )


def test_scales_of_the_cache_cover_keys_and_values_as_they_are_stored(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    text = tokens(8)
    done = quantize(model, settings(scheme="W8A16", group_size=32, kv_cache="fp8"), tmp_path, text)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = network(text, use_cache=True).past_key_values
    for index in range(Checkpoint(model).shape.layers):
        for letter, states in (("k", cache.layers[index].keys), ("v", cache.layers[index].values)):
            scale = float(done.tensors[f"model.layers.{index}.self_attn.{letter}_scale"])
            assert scale * 448 == pytest.approx(float(states.abs().max()), rel=0.02)
