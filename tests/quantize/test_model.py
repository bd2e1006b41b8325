import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from assay.models.checkpoint import Checkpoint
from assay.models.stepping import SteppedLayer
from assay.progress import Progress
from assay.quantize.model import compare, quantize_model, walked_samples
from assay.quantize.schemes import assign_schemes
from assay.quantize.statistics import Compared, Drift, accumulate
from assay.quantize.store import LayerStore, QuantizedModule
from assay.recipe import Quantize

LAYERS = 2
HEAD = [{"match": "lm_head", "scheme": "W8A16"}]


def settings(**values: Any) -> Quantize:
    defaults = {"method": "rtn", "scheme": "W4A16", "group_size": 32}
    return TypeAdapter(Quantize).validate_json(json.dumps(defaults | values))


def tokens(samples: int = 6, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 512, (samples, length), generator=torch.Generator().manual_seed(5))


def quantize(model: Path, chosen: Quantize, directory: Path) -> dict[str, QuantizedModule]:
    checkpoint, store = Checkpoint(model), LayerStore(directory)
    quantize_model(checkpoint, tokens(), chosen, store, Progress())
    return dict(store.read_all(LAYERS + 1).modules)


def file_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("first", [1, 7, 10])
@pytest.mark.parametrize("of_outputs", [False, True])
def test_statistics_are_sums_over_all_tokens_and_the_drift_over_the_first_of_each_text(
    first: int, of_outputs: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    quantized = [torch.randn(texts, 10, 24, generator=generator) for texts in (5, 5, 2)]
    original = [
        batch[:, :first] + 0.1 * torch.randn(batch[:, :first].shape, generator=generator) for batch in quantized
    ]
    weight, columns = torch.randn(6, 24, generator=generator), 1 + torch.rand(24, generator=generator)
    given = [batch.flatten(0, 1) for batch in original]
    compared = Compared([batch / columns for batch in given], 10, columns=columns)
    if of_outputs:
        compared = Compared([batch @ weight.T for batch in given], 10, of_outputs=True)
    inputs = [batch.flatten(0, 1) for batch in quantized]
    found = accumulate(inputs, compared)
    assert found.drift is not None and found.tokens == 120
    seen = torch.cat(inputs).double()
    np.testing.assert_allclose(found.gram, seen.T @ seen, rtol=1e-5, atol=1e-4)
    part, wanted = (
        torch.cat([batch[:, :first].flatten(0, 1) for batch in quantized]).double(),
        torch.cat(given).double(),
    )
    np.testing.assert_allclose(found.drift.gram, part.T @ part, rtol=1e-5, atol=1e-4)
    pull = weight.double() @ (wanted - part).T @ part
    np.testing.assert_allclose(found.drift.pull(weight), pull, rtol=1e-4, atol=1e-3)
    assert accumulate(inputs, None).drift is None


@pytest.mark.parametrize("bias", [False, True])
def test_the_float_model_is_compared_by_outputs_where_they_are_fewer(bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(texts, 5, 12, generator=generator) for texts in (3, 2)]

    def drift(features: int, alone: bool) -> Drift:
        with torch.no_grad():
            linear = torch.nn.Linear(12, features, bias=bias)
            layer = torch.nn.Sequential(torch.nn.Tanh(), linear)
            compared = compare(SteppedLayer(layer, ["1"], batches, [{}, {}]), "1", linear, alone, 10)
            inputs = [torch.randn(2 * batch.shape[0] * 5, 12, generator=generator) for batch in batches]
            found = accumulate(inputs, compared).drift
            assert found is not None
            first = torch.cat([given.view(-1, 10, 12)[:, :5].reshape(-1, 12) for given in inputs])
            wanted = torch.cat([batch.flatten(0, 1).tanh() for batch in batches])
            pull = linear.weight @ (wanted - first).T @ first
            np.testing.assert_allclose(found.pull(linear.weight), pull, rtol=1e-4, atol=1e-4)
            return found

    assert drift(7, alone=True).moment.shape == (7, 12)
    # Not of a Linear that shares its inputs with others, nor where it saves nothing.
    assert drift(7, alone=False).moment.shape == drift(12, alone=True).moment.shape == (12, 12)


def slow_reference(
    model: Path, chosen: Quantize, naive: Any
) -> dict[str, tuple[Any, np.ndarray, np.ndarray, list[int]]]:
    """One Linear after another: run the whole model, take what reaches the Linear, replace its weight, start again."""
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(model)
    float_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    schemes = assign_schemes(chosen, checkpoint.shape).schemes
    results: dict[str, tuple[Any, np.ndarray, np.ndarray, list[int]]] = {}
    for linear in checkpoint.shape.linears:
        if linear.name not in schemes:
            continue
        scheme, module = schemes[linear.name], float_model.get_submodule(linear.name)
        seen: list[torch.Tensor] = []
        hook = module.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            float_model(tokens(), use_cache=False)
        hook.remove()
        inputs = seen[0].flatten(0, 1).double().numpy()
        gram = inputs.T @ inputs
        weight = module.weight.detach().double().numpy()
        power = gram.diagonal() / len(inputs)
        grid = naive.grid(weight, scheme, chosen.range, power)
        if chosen.method == "rtn":
            codes = naive.round_to_nearest(weight, grid)
            rounded = weight / np.repeat(grid.scales, weight.shape[1] // grid.scales.shape[1], axis=1)
            order = list(range(weight.shape[1]))
        else:
            codes, rounded, order = naive.gptq(weight, grid, gram, chosen.damping)
        # The head of a tied model is the embedding, which stays as it is.
        values = torch.tensor(naive.values(codes, grid), dtype=torch.float32)
        module.weight = torch.nn.Parameter(values, requires_grad=False)
        results[linear.name] = (grid, codes, rounded, order)
    return results


CASES = {
    "round to nearest": {"method": "rtn", "overrides": HEAD},
    "round to nearest, asymmetric": {"method": "rtn", "scheme": "W4A16_ASYM", "group_size": 64},
    "GPTQ": {"method": "gptq", "correction": 0.0, "overrides": HEAD},
    "GPTQ, asymmetric, two schemes in a group": {
        "method": "gptq",
        "correction": 0.0,
        "scheme": "W4A16_ASYM",
        "overrides": [{"match": "*.v_proj", "scheme": "W8A16"}, {"match": "*.0.mlp.down_proj", "scheme": "none"}],
    },
}


def matches_reference(model: Path, case: dict[str, Any], directory: Path, naive: Any) -> None:
    chosen = settings(**case)
    found, expected = quantize(model, chosen, directory), slow_reference(model, chosen, naive)
    assert set(found) == set(expected)
    for name, (grid, codes, rounded, order) in expected.items():
        weight = found[name].weight
        np.testing.assert_allclose(weight.scales, grid.scales, rtol=1e-6, err_msg=name)
        if weight.zero_points is not None:
            np.testing.assert_array_equal(weight.zero_points, grid.zero_points, err_msg=name)
        assert naive.differ_only_at_ties(weight.codes.numpy(), codes, rounded, order), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_model_is_quantized_as_by_a_slow_reference(
    tiny_model: Callable[[str], Path], naive: Any, tmp_path: Path, case: dict[str, Any]
) -> None:
    matches_reference(tiny_model("llama"), case, tmp_path, naive)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_family_is_quantized_as_by_a_slow_reference(
    tiny_model: Callable[[str], Path], naive: Any, tmp_path: Path, family: str, case: dict[str, Any]
) -> None:
    matches_reference(tiny_model(family), case, tmp_path, naive)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_killed_job_ends_with_the_same_bytes(tiny_model: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    chosen = settings(method="gptq", scheme="W4A16_ASYM", overrides=HEAD)
    quantize(tiny_model(family), chosen, tmp_path / "whole")
    whole = file_bytes(tmp_path / "whole")
    assert len(whole) == LAYERS + 1
    for finished in range(LAYERS + 1):
        directory = tmp_path / f"after {finished}"
        directory.mkdir()
        for name in sorted(whole)[:finished]:
            (directory / name).write_bytes(whole[name])
        quantize(tiny_model(family), chosen, directory)
        assert file_bytes(directory) == whole


def test_a_finished_job_is_left_alone(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    chosen = settings(method="rtn")
    quantize(tiny_model("llama"), chosen, tmp_path)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    quantize(tiny_model("llama"), chosen, tmp_path)
    assert {path.stat().st_mtime for path in tmp_path.iterdir()} == {1}


@pytest.mark.parametrize(
    ("chosen", "samples", "length", "walked"),
    [
        ({"method": "rtn"}, 128, 512, 16),
        ({"method": "rtn", "transform": "awq"}, 64, 512, 8),
        # An eighth would be fewer than 4,096 tokens.
        ({"method": "rtn"}, 32, 512, 8),
        ({"method": "rtn"}, 16, 128, 16),
        ({"method": "rtn", "scheme": "W8A8", "group_size": None}, 64, 512, 8),
        ({"method": "rtn", "scheme": "W8A8_STATIC", "group_size": None}, 64, 512, 64),
        ({"method": "rtn", "scheme": "NVFP4", "group_size": None}, 64, 512, 64),
        ({"method": "rtn", "kv_cache": "fp8"}, 64, 512, 64),
        ({"method": "rtn", "scheme": "W8A8", "group_size": None, "transform": "smoothquant"}, 64, 512, 64),
        ({"method": "gptq"}, 64, 512, 64),
    ],
)
def test_rounding_to_nearest_walks_a_share_of_the_texts(
    tiny_model: Callable[[str], Path], chosen: dict[str, Any], samples: int, length: int, walked: int
) -> None:
    shape = Checkpoint(tiny_model("llama")).shape
    assert walked_samples(settings(**chosen), shape, samples, length) == walked


def test_texts_that_are_not_walked_change_nothing(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assay.quantize.model.FEWEST_TOKENS_WALKED", 1)
    model, many = tiny_model("llama"), tokens(16)

    def run(chosen: Quantize, given: torch.Tensor, name: str) -> dict[str, bytes]:
        quantize_model(Checkpoint(model), given, chosen, LayerStore(tmp_path / name), Progress())
        return file_bytes(tmp_path / name)

    nearest, others = settings(method="rtn"), torch.cat([many[:2], many[2:].flip(1)])
    assert run(nearest, many, "nearest") == run(nearest, others, "others")
    assert run(settings(method="gptq"), many, "gptq") != run(settings(method="gptq"), others, "gptq others")


def test_correction_brings_the_whole_model_closer_and_no_correction_measures_no_drift(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Measured on the calibration text itself, where undoing earlier errors must help."""
    from transformers import AutoModelForCausalLM

    float_model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = float_model.model(tokens()).last_hidden_state

    def distance(correction: float) -> float:
        model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
        chosen = settings(method="gptq", correction=correction)
        for name, module in quantize(tiny_model("llama"), chosen, tmp_path / str(correction)).items():
            model.get_submodule(name).weight.data = module.weight.dequantize()
        with torch.no_grad():
            return float(((model.model(tokens()).last_hidden_state - wanted) ** 2).mean())

    assert distance(1.0) < distance(0.0)


def test_reported_errors_are_relative_to_the_output(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The first Linears see the float model's own inputs, so their errors can be measured directly."""
    from transformers import AutoModelForCausalLM

    found = quantize(tiny_model("mistral"), settings(method="rtn"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("mistral"), dtype=torch.float32).eval()
    name = "model.layers.0.self_attn.k_proj"
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(tokens())
    weight = model.get_submodule(name).weight.detach().double()
    inputs = seen[0].flatten(0, 1).double()
    difference = weight - found[name].weight.dequantize().double()
    expected = float(((inputs @ difference.T) ** 2).sum() / ((inputs @ weight.T) ** 2).sum())
    error = found[name].relative_error
    assert error is not None
    np.testing.assert_allclose(error, expected, rtol=1e-4)
    assert found[name].damping is None
    assert 0.0 < error < 0.1
