from typing import Any

import numpy as np
import pytest
import torch

from assay.quantize.ranges import find_grid
from assay.quantize.schemes import WeightScheme

SCHEMES = {
    "4 bits": WeightScheme("W4A16", 4, True, 32),
    "4 bits, asymmetric": WeightScheme("W4A16_ASYM", 4, False, 32),
    "8 bits": WeightScheme("W8A16", 8, True, 64),
    "4 bits, whole rows": WeightScheme("W4A16_ASYM", 4, False, 0),
}
METHODS = ("minmax", "mse", "activation_weighted")


def weight_and_power(rows: int = 12, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.02] *= 6
    weight[1, :64] = weight[1, :64].abs()
    weight[2] = -weight[2].abs()
    power = 0.02 + torch.rand(columns, generator=generator) ** 4
    return weight.to(torch.bfloat16).float(), power


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_grids_are_those_of_plain_loops(naive: Any, scheme: WeightScheme, method: str) -> None:
    weight, power = weight_and_power()
    found = find_grid(weight, scheme, method, power, torch.bfloat16)
    expected = naive.grid(weight.double().numpy(), scheme, method, power.double().numpy())
    np.testing.assert_array_equal(found.scales.numpy(), expected.scales)
    np.testing.assert_array_equal(found.zero_points.numpy(), expected.zero_points)


def test_more_rows_than_are_searched_at_once_change_nothing() -> None:
    weight, power = weight_and_power(rows=600, columns=32)
    scheme = SCHEMES["4 bits"]
    together = find_grid(weight, scheme, "mse", power, torch.bfloat16)
    alone = find_grid(weight[590:], scheme, "mse", power, torch.bfloat16)
    assert torch.equal(together.scales[590:], alone.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_scales_survive_the_models_own_dtype(scheme: WeightScheme, method: str, dtype: torch.dtype) -> None:
    weight, power = weight_and_power()
    weight[3] = 0.0
    weight[4] = 1e-7
    grid = find_grid(weight, scheme, method, power, dtype)
    assert torch.equal(grid.scales.to(dtype).float(), grid.scales)
    assert bool((grid.scales != 0).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_zero_is_always_exact(scheme: WeightScheme, method: str) -> None:
    weight, power = weight_and_power()
    weight[:, ::5] = 0.0
    weight[5] = 0.0
    weight[6] = 3.0
    weight[6, ::5] = 0.0
    grid = find_grid(weight, scheme, method, power, torch.bfloat16)
    quantized = grid.quantize(weight).dequantize()
    assert not quantized[:, ::5].any()
    assert not quantized[5].any()
    assert bool(((grid.zero_points >= 0) & (grid.zero_points <= scheme.levels)).all())


@pytest.mark.parametrize("value", [0.7, -0.7])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_constant_rows_lose_next_to_nothing(scheme: WeightScheme, method: str, value: float) -> None:
    weight = torch.full((2, 128), value)
    quantized = find_grid(weight, scheme, method, torch.ones(128), torch.bfloat16).quantize(weight).dequantize()
    # The largest code of a symmetric grid lies half a step below what its span covers; a search may turn the grid round.
    lost = (0.5 / (scheme.levels / 2) if method == "minmax" else 0.02) if scheme.symmetric else 0.0
    assert float((quantized - weight).abs().max()) <= abs(value) * (lost + 2**-8)


def test_better_ranges_lose_less_of_what_they_look_at() -> None:
    weight, power = weight_and_power()
    scheme = SCHEMES["4 bits"]

    def loss(method: str, importance: torch.Tensor) -> float:
        quantized = find_grid(weight, scheme, method, power, torch.bfloat16).quantize(weight).dequantize()
        return float(((quantized - weight) ** 2 * importance).sum())

    ones = torch.ones_like(power)
    assert loss("mse", ones) < loss("minmax", ones)
    assert loss("activation_weighted", power) < loss("mse", power) < loss("minmax", power)


def test_activation_weighted_needs_the_power() -> None:
    with pytest.raises(ValueError, match="power of the inputs"):
        find_grid(torch.ones(2, 64), SCHEMES["4 bits"], "activation_weighted", None, torch.bfloat16)
