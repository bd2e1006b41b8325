"""Against tables of every value that a format has, and plain loops over them."""

import itertools

import numpy as np
import pytest
import torch

from assay.quantize.numbers import decode, encode, nearest_, power_of_two_scale
from assay.quantize.schemes import weight_scheme

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def e4m3() -> list[float]:
    """Sign, 4 bits of exponent with bias 7, 3 bits of mantissa; the last code of each sign is NaN."""
    values: list[float] = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return values


TABLES = {"FP8": e4m3(), "MXFP4": [float(value) for value in E2M1]}


@pytest.mark.parametrize("name", TABLES)
def test_codes_are_the_bit_patterns_of_the_format(name: str) -> None:
    scheme, positive = weight_scheme(name), TABLES[name]
    half = 128 if name == "FP8" else 8
    codes = torch.tensor([*range(len(positive)), *range(half + 1, half + len(positive))], dtype=torch.uint8)
    levels = torch.tensor([*positive, *(-value for value in positive[1:])])
    assert torch.equal(decode(codes, scheme, 0), levels)
    assert torch.equal(encode(levels, scheme, 0), codes)


@pytest.mark.parametrize("name", TABLES)
def test_every_value_goes_to_the_nearest_level_and_halves_to_the_even_code(name: str) -> None:
    scheme, positive = weight_scheme(name), TABLES[name]
    largest = positive[-1]
    rng = np.random.default_rng(1)
    halves = [(one + other) / 2 for one, other in itertools.pairwise(positive)]
    values = [*positive, *halves, *rng.uniform(0, 1.2 * largest, 500), *(largest * rng.uniform(0, 1, 500) ** 6), 1e6]
    values = np.float32([*values, *(-value for value in values)]).tolist()

    def nearest(value: float) -> float:
        distances = [abs(abs(value) - level) for level in positive]
        closest = [place for place, distance in enumerate(distances) if distance == min(distances)]
        return float(np.copysign(positive[next((place for place in closest if place % 2 == 0), closest[0])], value))

    found = nearest_(torch.tensor(values), scheme.kind, scheme.bits, 0).tolist()
    assert found == [nearest(value) for value in values]


def test_integers_are_shifted_by_their_zero_point() -> None:
    scaled = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 20.0], [-9.0, -0.5, 0.5, 1.5, 20.0]])
    points = torch.tensor([[8.0], [3.0]])
    levels = nearest_(scaled, "int", 4, points)
    assert levels.tolist() == [[-8, 0, 0, 2, 7], [-3, 0, 0, 2, 12]]
    scheme = weight_scheme("W4A16_ASYM")
    codes = encode(levels, scheme, points)
    assert codes.tolist() == [[0, 8, 8, 10, 15], [0, 3, 3, 5, 15]]
    assert torch.equal(decode(codes, scheme, points), levels)


@pytest.mark.parametrize(
    ("absmax", "scale"),
    [(6.0, 1.0), (4.0, 1.0), (6.9, 1.0), (7.0, 2.0), (7.1, 2.0), (3.5, 1.0), (3.4, 0.5), (0.4, 0.0625), (448.0, 128.0)],
)
def test_powers_of_two_clip_no_more_than_a_seventh(absmax: float, scale: float) -> None:
    assert float(power_of_two_scale(torch.tensor(absmax))) == scale


def test_powers_of_two_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8")
    absmax = torch.cat([torch.rand(1000), torch.rand(1000) * 100, torch.tensor([1.75, 3.5, 7.0, 6.0, 4.0])])
    theirs, _ = calculate_qparams(-absmax, absmax, arguments)
    assert torch.equal(power_of_two_scale(absmax), theirs)
