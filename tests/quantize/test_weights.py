from typing import Any

import numpy as np
import pytest
import torch

from assay.quantize.ranges import find_grid
from assay.quantize.schemes import WeightScheme
from assay.quantize.weights import QuantizedWeight

SCHEMES = [
    WeightScheme("W4A16", 4, True, 32),
    WeightScheme("W4A16_ASYM", 4, False, 32),
    WeightScheme("W8A16", 8, True, 0),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_rounding_is_that_of_plain_loops(naive: Any, scheme: WeightScheme) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).float()
    found = find_grid(weight, scheme, "mse", None, torch.bfloat16).quantize(weight)
    grid = naive.grid(weight.double().numpy(), scheme, "mse", None)
    codes = naive.round_to_nearest(weight.double().numpy(), grid)
    np.testing.assert_array_equal(found.codes.numpy(), codes)
    np.testing.assert_allclose(found.dequantize().numpy(), naive.values(codes, grid), rtol=1e-7)
    assert found.codes.dtype == torch.uint8
    assert (found.zero_points is None) == scheme.symmetric


def test_golden_values() -> None:
    codes = torch.tensor([[0, 7, 8, 15]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0]])
    symmetric = QuantizedWeight(WeightScheme("W4A16", 4, True, 2), codes, scales, None)
    assert symmetric.dequantize().tolist() == [[-4.0, -0.5, 0.0, 14.0]]
    points = torch.tensor([[1, 15]], dtype=torch.uint8)
    asymmetric = QuantizedWeight(WeightScheme("W4A16_ASYM", 4, False, 2), codes, scales, points)
    assert asymmetric.dequantize().tolist() == [[-0.5, 3.0, -14.0, 0.0]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_rows_of_a_weight_are_the_weight_of_those_rows(scheme: WeightScheme) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    whole = find_grid(weight, scheme, "minmax", None, torch.float32).quantize(weight)
    part = find_grid(weight[2:5], scheme, "minmax", None, torch.float32).quantize(weight[2:5])
    assert torch.equal(whole.rows(2, 5).dequantize(), part.dequantize())
    assert torch.equal(whole.dequantize()[2:5], part.dequantize())
