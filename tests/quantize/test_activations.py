import numpy as np
import pytest
import torch

from assay.quantize.activations import calibrate, quantize_inputs
from assay.quantize.schemes import ActivationScheme, weight_scheme

TOKEN_INT8 = ActivationScheme("int", 8)
GROUP_FP8 = ActivationScheme("float", 8, 4)


def inputs(tokens: int = 6, features: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(tokens, features, generator=generator) * torch.rand(features, generator=generator) * 10


def schemes() -> list[str]:
    return ["W8A8", "W8A8_STATIC", "FP8", "FP8_DYNAMIC", "MXFP4", "NVFP4"]


@pytest.mark.parametrize("name", schemes())
def test_values_become_what_compressed_tensors_makes_of_them(name: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    from assay.targets.compressed_tensors_formats import arguments_of

    scheme = weight_scheme(name)
    activations = scheme.activations
    assert activations is not None
    values = inputs()
    values[2] = 0.0
    calibrated = calibrate([values], activations, "minmax", torch.float32) if activations.calibrated else None
    arguments = QuantizationArgs.model_validate(arguments_of(scheme)["input_activations"])
    shared = calibrated if activations.scale == "e4m3" else None
    scale, zero_point = calibrated, None
    if arguments.dynamic:
        scale, zero_point = compute_dynamic_scales_and_zp(values[None], arguments, torch.nn.Identity(), shared)
    theirs = fake_quantize(values[None], scale, zero_point, arguments, shared)[0]
    np.testing.assert_allclose(quantize_inputs(values, activations, calibrated), theirs, rtol=1e-6, atol=0)


def test_every_token_has_its_own_scale() -> None:
    values = torch.tensor([[127.5, -64.0, 0.4], [1.275, 0.01, -1.0]])
    found = quantize_inputs(values, TOKEN_INT8, None)
    np.testing.assert_allclose(found, [[127, -64, 0], [1.27, 0.01, -1.0]], rtol=1e-6)


def test_groups_of_a_token_have_their_own_scales() -> None:
    values = torch.tensor([[448.0, 1, 2, 3, 0.448, 0.001, 0.002, 0.003]])
    found = quantize_inputs(values, GROUP_FP8, None)
    np.testing.assert_allclose(found, values, rtol=0.07)
    assert quantize_inputs(values, ActivationScheme("float", 8), None)[0, 5] == 2**-9, (
        "the smallest step where the whole token has one scale"
    )


def test_a_static_range_leaves_out_what_costs_more_than_it_is_worth() -> None:
    """One value of a thousand times the others' size, once in 60,000: not worth its range."""
    values = torch.randn(100, 600, generator=torch.Generator().manual_seed(1))
    values[0, 0] = 8.0
    wide = calibrate([values], ActivationScheme("int", 4, static=True), "minmax", torch.float32)
    narrow = calibrate([values], ActivationScheme("int", 4, static=True), "mse", torch.float32)
    assert float(wide) == pytest.approx(8.0 / 7.5)
    assert float(narrow) < 0.6 * float(wide)


def test_a_static_scale_is_one_that_the_checkpoint_can_hold() -> None:
    scale = calibrate([inputs()], ActivationScheme("float", 8, static=True), "minmax", torch.bfloat16)
    assert torch.equal(scale.to(torch.bfloat16).float(), scale)


def test_batches_without_tokens_are_no_reason_to_stop() -> None:
    empty = torch.zeros(0, 32)
    values = inputs()
    static = ActivationScheme("int", 8, static=True)
    assert torch.equal(
        calibrate([empty, values], static, "mse", torch.float32), calibrate([values], static, "mse", torch.float32)
    )
    assert float(calibrate([empty], static, "mse", torch.float32)) > 0
