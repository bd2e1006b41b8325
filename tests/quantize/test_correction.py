import numpy as np
import pytest
import torch

from assay.errors import AssayError
from assay.quantize.correction import corrected

RIDGE = 0.3


def streams(tokens: int = 400, columns: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, a float model's inputs, and the same with the errors of earlier layers."""
    generator = torch.Generator().manual_seed(11)
    original = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    original = original @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    drifted = original + 0.2 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, columns, generator=generator, dtype=torch.float64)
    return weight, original, drifted @ torch.diag(1 + 0.1 * torch.rand(columns, generator=generator).double())


def moments(weight: torch.Tensor, original: torch.Tensor, quantized: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (quantized.T @ quantized).float(), (weight @ (original - quantized).T @ quantized).float()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_step_goes_towards_a_ridge_regression(share: float) -> None:
    weight, original, quantized = streams()
    gram, pull = moments(weight, original, quantized)
    columns = weight.shape[1]
    # Ridge towards the weight itself, by least squares on rows that ask for no change.
    penalty = np.sqrt(RIDGE * float(gram.double().diagonal().mean())) * np.eye(columns)
    inputs = np.vstack([quantized.numpy(), penalty])
    outputs = np.vstack([original.numpy() @ weight.numpy().T, penalty @ weight.numpy().T])
    regression = np.linalg.lstsq(inputs, outputs, rcond=None)[0].T
    expected = weight.numpy() + share * (regression - weight.numpy())
    found = corrected(weight.float(), gram.clone(), pull, share)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_whole_way_brings_the_outputs_closer() -> None:
    weight, original, quantized = streams()
    gram, pull = moments(weight, original, quantized)
    wanted = original @ weight.T

    def error(share: float) -> float:
        moved = corrected(weight.float(), gram.clone(), pull, share).double()
        return float(((quantized @ moved.T - wanted) ** 2).sum())

    assert error(1.0) < error(0.5) < error(0.25) < error(0.0)


def test_no_drift_or_no_share_changes_nothing() -> None:
    weight, original, quantized = streams()
    gram, pull = moments(weight, original, quantized)
    assert torch.equal(corrected(weight.float(), gram.clone(), torch.zeros_like(pull), 1.0), weight.float())
    assert torch.equal(corrected(weight.float(), gram, pull, 0.0), weight.float())


def test_the_weight_and_the_pull_stay_as_they_are() -> None:
    weight, original, quantized = streams()
    gram, pull = moments(weight, original, quantized)
    before = pull.clone(), weight.clone()
    corrected(weight.float(), gram.clone(), pull, 0.5)
    assert all(torch.equal(one, other) for one, other in zip(before, (pull, weight), strict=True))


def test_inputs_that_overflowed_are_an_error() -> None:
    weight, original, quantized = streams()
    gram, pull = moments(weight, original, quantized)
    gram[3, 2] = gram[2, 3] = torch.inf
    with pytest.raises(AssayError, match="infinities or NaNs"):
        corrected(weight.float(), gram.clone(), pull, 0.5)


def test_inputs_that_are_always_zero_leave_the_weight_alone() -> None:
    weight = torch.randn(4, 8)
    zeros = torch.zeros(8, 8)
    assert torch.equal(corrected(weight, zeros, torch.zeros(4, 8), 0.5), weight)
