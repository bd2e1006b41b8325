from typing import Any

import numpy as np
import pytest
import torch

from assay.errors import AssayError
from assay.quantize.gptq import factorize, gptq, output_error
from assay.quantize.ranges import find_grid
from assay.quantize.schemes import WeightScheme
from assay.quantize.weights import Grid

SYMMETRIC = WeightScheme("W4A16", 4, True, 32)
ASYMMETRIC = WeightScheme("W4A16_ASYM", 4, False, 32)
WHOLE_ROWS = WeightScheme("W8A16", 8, True, 0)


def correlated(columns: int, tokens: int = 1000, seed: int = 3) -> torch.Tensor:
    """Inputs whose channels share a few causes and differ in power."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, max(2, columns // 4), generator=generator)
    mixed = causes @ torch.randn(causes.shape[1], columns, generator=generator)
    noise = 0.3 * torch.randn(tokens, columns, generator=generator)
    return (mixed + noise) * (0.1 + torch.rand(columns, generator=generator))


def weight_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16).float()


def naive_grid(naive: Any, weight: torch.Tensor, scheme: WeightScheme) -> Any:
    return naive.grid(weight.double().numpy(), scheme, "minmax", None)


@pytest.mark.parametrize("columns", [64, 288])
@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, WHOLE_ROWS], ids=lambda scheme: scheme.name)
def test_codes_are_those_of_column_elimination(naive: Any, scheme: WeightScheme, columns: int) -> None:
    weight, inputs = weight_of(6, columns), correlated(columns)
    inputs[:, [5, 40]] = 0.0
    gram = inputs.T @ inputs
    found = gptq(weight, find_grid(weight, scheme, "minmax", None, torch.bfloat16), factorize(gram, 0.01)).codes.numpy()
    codes, rounded, order = naive.gptq(
        weight.double().numpy(), naive_grid(naive, weight, scheme), gram.double().numpy(), 0.01
    )
    assert naive.differ_only_at_ties(found, codes, rounded, order)
    assert (found == codes).mean() > 0.99


def test_columns_go_by_falling_power_and_equal_ones_by_place() -> None:
    factor = factorize(torch.diag(torch.tensor([1.0, 4.0, 1.0, 9.0, 4.0])), 0.01)
    assert factor.order.tolist() == [3, 1, 4, 0, 2]


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight = weight_of(5, 96)
    grid = find_grid(weight, ASYMMETRIC, "minmax", None, torch.bfloat16)
    factor = factorize(torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(5)) + 0.1), 0.01)
    assert torch.equal(gptq(weight, grid, factor).codes, grid.quantize(weight).codes)


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, WHOLE_ROWS], ids=lambda scheme: scheme.name)
def test_the_output_error_is_lower_than_that_of_rounding(scheme: WeightScheme) -> None:
    weight, inputs = weight_of(32, 160), correlated(160)
    gram = inputs.T @ inputs
    grid = find_grid(weight, scheme, "minmax", None, torch.bfloat16)
    ours = output_error(weight - gptq(weight, grid, factorize(gram, 0.01)).dequantize(), gram)
    plain = output_error(weight - grid.quantize(weight).dequantize(), gram)
    assert ours < 0.7 * plain


def test_dead_channels_become_zero_and_take_no_part() -> None:
    weight, inputs = weight_of(4, 64), correlated(64)
    inputs[:, 10] = 0.0
    gram = inputs.T @ inputs
    factor = factorize(gram, 0.01)
    assert factor.dead.nonzero().flatten().tolist() == [10]
    grid = find_grid(weight, SYMMETRIC, "minmax", None, torch.bfloat16)
    other = weight.clone()
    other[:, 10] = 100.0
    assert not gptq(weight, grid, factor).dequantize()[:, 10].any()
    assert torch.equal(gptq(weight, grid, factor).codes, gptq(other, grid, factor).codes)


def test_a_singular_gram_matrix_is_damped_more_and_says_so() -> None:
    one = correlated(1, tokens=50) * 1e3
    gram = (one @ torch.ones(1, 64)).T @ (one @ torch.ones(1, 64))
    factor = factorize(gram, 1e-18)
    assert factor.damping > 1e-17
    assert bool(torch.isfinite(factor.upper).all())


def test_damping_that_is_enough_stays_as_asked() -> None:
    inputs = correlated(64)
    assert factorize(inputs.T @ inputs, 0.02).damping == 0.02


def test_a_gram_matrix_that_cannot_be_inverted_is_an_error() -> None:
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 50.0
    with pytest.raises(AssayError, match="more, or more varied, calibration text"):
        factorize(gram, 0.01)


def test_inputs_that_are_all_zero_make_all_weights_zero() -> None:
    weight = weight_of(3, 64)
    factor = factorize(torch.zeros(64, 64), 0.01)
    assert bool(factor.dead.all())
    assert factor.damping == 0.01
    grid = Grid(SYMMETRIC, torch.ones(3, 2), torch.full((3, 2), 8.0))
    assert not gptq(weight, grid, factor).dequantize().any()


@pytest.mark.parametrize("columns", [48, 256, 600])
def test_output_error_is_the_squared_difference_of_outputs(columns: int) -> None:
    inputs, difference = correlated(columns).double(), weight_of(5, columns).double()
    expected = float(((inputs @ difference.T) ** 2).sum())
    found = output_error(difference.float(), (inputs.T @ inputs).float())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
