"""AWQ's and SmoothQuant's factors against plain loops over real inputs, and layers that compute the same with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from assay.models.architectures import ARCHITECTURES
from assay.models.checkpoint import Checkpoint
from assay.models.folds import Fold
from assay.progress import Progress
from assay.quantize.model import quantize_model
from assay.quantize.schemes import weight_scheme
from assay.quantize.store import LayerStore, QuantizedLayer
from assay.quantize.transforms import Surveyed, find_factors, fold_into
from assay.recipe import Quantize

pytestmark = pytest.mark.slow

ROWS, COLUMNS, TOKENS = 24, 64, 200
FOLD = Fold("norm", ("one", "two"), COLUMNS)


def settings(**values: Any) -> Quantize:
    return TypeAdapter(Quantize).validate_json(
        json.dumps(
            {"method": "rtn", "scheme": "W4A16", "group_size": 32, "transform": "awq", "range": "minmax"} | values
        )
    )


def problem() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Inputs with a few channels of great power, and the weights that read them."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(TOKENS, COLUMNS, generator=generator)
    inputs[:, ::9] *= 20
    weights = {
        name: torch.randn(ROWS, COLUMNS, generator=generator) * (1 + 3 * torch.rand(COLUMNS, generator=generator))
        for name in FOLD.linears
    }
    return inputs, weights


def found(
    inputs: torch.Tensor, weights: dict[str, torch.Tensor], chosen: Quantize, diagonal: bool = False
) -> torch.Tensor | None:
    survey = dict.fromkeys(weights, Surveyed.of([inputs[:50], inputs[50:]], diagonal))
    schemes = dict.fromkeys(weights, weight_scheme(chosen.scheme, chosen.group_size))
    return find_factors(FOLD, weights, survey, schemes, settings=chosen, scale_dtype=torch.bfloat16)


def naive_loss(naive: Any, inputs: np.ndarray, weights: dict[str, torch.Tensor], factors: np.ndarray) -> float:
    """Squared error of all outputs, token by token."""
    total = 0.0
    for weight in weights.values():
        moved = weight.double().numpy() / factors
        grid = naive.grid(moved, weight_scheme("W4A16", 32), "minmax", None)
        rounded = naive.values(naive.round_to_nearest(moved, grid), grid) * factors
        total += float(((inputs @ (rounded - weight.double().numpy()).T) ** 2).sum())
    return total


def naive_candidates(inputs: np.ndarray, weights: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """1 / s of s = x^r and of s = x^r / w^(1 − r), centred, for r from 0.05 to 1."""
    power = np.sqrt(2 * (inputs**2).sum(0))
    rows = np.concatenate([weight.double().numpy() for weight in weights.values()])
    relative = (np.abs(rows) / np.abs(rows).max(1, keepdims=True)).mean(0)
    made: list[np.ndarray] = []
    for step in range(1, 21):
        ratio = step / 20
        for scales in (power**ratio, power**ratio / relative ** (1 - ratio)):
            made.append(1 / np.clip(scales / np.sqrt(scales.max() * scales.min()), 1e-4, 1e4))
    return made


def test_the_factors_are_those_with_the_least_error_of_plain_loops(naive: Any) -> None:
    inputs, weights = problem()
    factors = found(inputs, weights, settings())
    assert factors is not None
    losses = [
        (naive_loss(naive, inputs.double().numpy(), weights, one), one)
        for one in naive_candidates(inputs.double().numpy(), weights)
    ]
    least, best = min(losses, key=lambda pair: pair[0])
    np.testing.assert_allclose(factors, best, rtol=1e-4)
    assert least < 0.9 * naive_loss(naive, inputs.double().numpy(), weights, np.ones(COLUMNS))


def test_the_identity_stays_where_nothing_is_better() -> None:
    """Weights that lie on the grid already lose nothing as they are."""
    inputs, _ = problem()
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1)).float()
    codes[:, ::32] = 0.0
    weights = dict.fromkeys(FOLD.linears, (codes - 8) * 0.5 * 8 / 7.5)
    assert found(inputs, weights, settings(range="activation_weighted")) is None


def test_experts_are_judged_by_the_power_of_their_inputs_alone() -> None:
    inputs, weights = problem()
    factors = found(inputs, weights, settings(), diagonal=True)
    assert factors is not None and bool((factors > 0).all())
    none = Surveyed.of([inputs[:0]], True)
    assert not none.power.any() and len(none.sample) == 1


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_smoothquant_divides_the_largest_inputs_by_the_largest_weights(strength: float) -> None:
    inputs, weights = problem()
    factors = found(
        inputs, weights, settings(scheme="W8A8", group_size=None, transform="smoothquant", strength=strength)
    )
    largest = torch.cat(list(weights.values())).abs().amax(0)
    scales = inputs.abs().amax(0) ** strength / largest ** (1 - strength)
    np.testing.assert_allclose(factors, (scales.max() * scales.min()).sqrt() / scales, rtol=1e-5)


def test_a_searched_strength_is_better_than_every_fixed_one() -> None:
    """By errors relative to each token's outputs, so that one token of a hundred times the size does not decide."""
    from assay.quantize.activations import quantize_inputs
    from assay.quantize.ranges import find_grid

    inputs, weights = problem()
    inputs[7] *= 100
    expected = {name: inputs @ weight.T for name, weight in weights.items()}
    power = sum((outputs.square().sum(1) for outputs in expected.values()), start=torch.zeros(1))
    scheme = weight_scheme("W8A8")
    w8a8 = {"scheme": "W8A8", "group_size": None, "transform": "smoothquant"}

    def loss(factors: torch.Tensor | None) -> float:
        columns = torch.ones(COLUMNS) if factors is None else factors
        total = 0.0
        for name, weight in weights.items():
            moved = weight / columns
            rounded = find_grid(moved, scheme, "minmax", None, torch.bfloat16).quantize(moved).dequantize()
            assert scheme.activations is not None
            outputs = quantize_inputs(inputs * columns, scheme.activations, None) @ rounded.T
            total += float(((outputs - expected[name]).square().sum(1) / power).sum())
        return total

    searched = loss(found(inputs, weights, settings(**w8a8)))
    fixed = [loss(found(inputs, weights, settings(**w8a8, strength=step / 10))) for step in range(1, 10)]
    assert searched < 0.95 * min(fixed) < 0.7 * loss(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_that_took_up_factors_is_what_the_checkpoint_stores(dtype: torch.dtype) -> None:
    """Rounding the norm's weight must not change the layer: the Linears make up for it."""
    generator = torch.Generator().manual_seed(2)
    layer = torch.nn.ModuleDict(
        {
            "input_layernorm": torch.nn.RMSNorm(COLUMNS),
            "one": torch.nn.Linear(COLUMNS, 8),
            "two": torch.nn.Linear(COLUMNS, 8),
        }
    )
    layer["input_layernorm"].weight.data = torch.randn(COLUMNS, generator=generator).to(dtype).float()
    layer["input_layernorm"].weight.data[3] = 0.0
    layer.requires_grad_(False)
    values = torch.randn(5, COLUMNS, generator=generator)
    before = layer["one"](layer["input_layernorm"](values))
    fold = Fold("input_layernorm", ("one", "two"), COLUMNS)
    factors = torch.rand(COLUMNS, generator=generator) * 3 + 0.1
    factors[3] = 1.0
    changed, columns = fold_into(layer, ARCHITECTURES["LlamaForCausalLM"], fold, factors, dtype)
    assert set(changed) == {"input_layernorm.weight"} and changed["input_layernorm.weight"].dtype == dtype
    assert torch.equal(changed["input_layernorm.weight"].float(), layer["input_layernorm"].weight)
    np.testing.assert_allclose(columns, factors, rtol=2**-8)
    np.testing.assert_allclose(layer["one"](layer["input_layernorm"](values)), before, rtol=1e-5, atol=1e-5)


def tokens(samples: int = 8, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 512, (samples, length), generator=torch.Generator().manual_seed(5))


def quantize(model: Path, chosen: Quantize, directory: Path) -> QuantizedLayer:
    store = LayerStore(directory)
    quantize_model(Checkpoint(model), tokens(), chosen, store, Progress())
    return store.read_all(3)


def distance(model: Path, done: QuantizedLayer) -> float:
    """Mean squared difference of the last hidden states, with everything that the job changed in place."""
    from transformers import AutoModelForCausalLM

    float_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    changed = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, module in done.modules.items():
        changed.get_submodule(name).weight.data = module.weight.dequantize()
    for name, value in done.tensors.items():
        changed.get_parameter(name).data = value.float()
    with torch.no_grad():
        one, other = (network.model(tokens()).last_hidden_state for network in (float_model, changed))
    return float((one - other).square().mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_awq_brings_whole_models_closer_and_its_norms_belong_to_the_artifact(
    tiny_model: Callable[[str], Path], tmp_path: Path, family: str, method: str
) -> None:
    model = tiny_model(family)
    plain, awq = (
        quantize(model, settings(method=method, transform=transform, range="activation_weighted"), tmp_path / transform)
        for transform in ("none", "awq")
    )
    assert not plain.tensors and any(name.endswith("norm.weight") for name in awq.tensors)
    # GPTQ makes up for most of what awq is there for.
    assert distance(model, awq) < distance(model, plain) * (1.0 if method == "rtn" else 1.25)
    whole = distance(model, QuantizedLayer({}, {}))
    assert whole == 0.0


def test_a_killed_job_with_a_transform_ends_with_the_same_bytes(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    chosen = settings(
        method="gptq",
        scheme="W8A8",
        group_size=None,
        transform="smoothquant",
        overrides=[{"match": "lm_head", "scheme": "W8A8_STATIC"}],
    )
    quantize(tiny_model("llama"), chosen, tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/layer-0000.safetensors").write_bytes(whole["layer-0000.safetensors"])
    quantize(tiny_model("llama"), chosen, tmp_path / "killed")
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()} == whole


def test_a_fold_into_a_linear_that_stays_float_is_left_out_and_said(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    overrides = [{"match": "*.v_proj", "scheme": "none"}]
    done = quantize(tiny_model("llama"), settings(overrides=overrides), tmp_path)
    assert "model.layers.0.self_attn.v_proj: awq was skipped, because self_attn.v_proj is not quantized." in done.notes
    assert "model.layers.0.input_layernorm: awq was skipped, because self_attn.v_proj is not quantized." in done.notes
