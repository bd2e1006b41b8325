import dataclasses

import pytest
import torch

from assay.errors import AssayError
from assay.models.architectures import DecoderShape, decoder_shape
from assay.quantize.schemes import WeightScheme
from assay.quantize.store import QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.targets.realized import StoredLinear, verify

SCHEME = WeightScheme("W4A16", 4, True, 32)
NAMES = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]


@pytest.fixture
def shape() -> DecoderShape:
    config = {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 1,
        "vocab_size": 512,
    }
    return decoder_shape(config, "here")


@pytest.fixture
def modules(shape: DecoderShape) -> dict[str, QuantizedModule]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, QuantizedModule] = {}
    for linear in shape.linears:
        if linear.name in NAMES:
            size = (linear.out_features, linear.in_features)
            codes = torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)
            scales = torch.rand(linear.out_features, linear.in_features // 32, generator=generator) + 0.5
            made[linear.name] = QuantizedModule(QuantizedWeight(SCHEME, codes, scales, None), 0.25, 0.01)
    return made


def stored_as(modules: dict[str, QuantizedModule]) -> dict[str, StoredLinear]:
    return {name: StoredLinear(4, module.weight.dequantize()) for name, module in modules.items()}


def test_the_same_numbers_become_a_row_for_every_linear(
    shape: DecoderShape, modules: dict[str, QuantizedModule]
) -> None:
    realization = verify(shape, dict.fromkeys(NAMES, SCHEME), modules, stored_as(modules), ("a note.",))
    assert realization.fallbacks == ("a note.",)
    assert [row["name"] for row in realization.layers] == [linear.name for linear in shape.linears]
    rows = {row["name"]: row for row in realization.layers}
    assert rows["model.layers.0.mlp.down_proj"] == {
        "name": "model.layers.0.mlp.down_proj",
        "shape": [64, 128],
        "scheme": "W4A16",
        "group_size": 32,
        "bits_per_weight": 4.5,
        "relative_error": 0.25,
        "damping": 0.01,
    }
    assert rows["lm_head"]["scheme"] == "none"
    assert rows["lm_head"]["bits_per_weight"] is None


def test_one_number_in_its_last_bit_is_an_error(shape: DecoderShape, modules: dict[str, QuantizedModule]) -> None:
    stored = stored_as(modules)
    weight = stored[NAMES[0]].weight
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    with pytest.raises(AssayError, match=f"{NAMES[0]}: the compiled model's numbers are not the ones"):
        verify(shape, dict.fromkeys(NAMES, SCHEME), modules, stored)


def test_other_bits_are_an_error(shape: DecoderShape, modules: dict[str, QuantizedModule]) -> None:
    stored = stored_as(modules)
    stored[NAMES[1]] = dataclasses.replace(stored[NAMES[1]], bits=8)
    with pytest.raises(AssayError, match=f"{NAMES[1]} was to be W4A16, but .* holds 8-bit weights"):
        verify(shape, dict.fromkeys(NAMES, SCHEME), modules, stored)


def test_a_layer_left_float_is_an_error(shape: DecoderShape, modules: dict[str, QuantizedModule]) -> None:
    stored = stored_as(modules)
    del stored[NAMES[1]]
    with pytest.raises(AssayError, match=f"{NAMES[1]} was to be W4A16, but .* holds float weights"):
        verify(shape, dict.fromkeys(NAMES, SCHEME), modules, stored)


def test_a_layer_that_was_to_stay_float_is_an_error(shape: DecoderShape, modules: dict[str, QuantizedModule]) -> None:
    with pytest.raises(AssayError, match=f"{NAMES[1]} was to stay unquantized, but .* holds 4-bit weights"):
        verify(shape, {NAMES[0]: SCHEME}, modules, stored_as(modules))
