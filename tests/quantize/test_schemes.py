import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from assay.models.architectures import DecoderShape, decoder_shape
from assay.quantize.schemes import WeightScheme, assign_schemes, weight_scheme
from assay.recipe import Quantize

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}


def settings(overrides: list[dict[str, Any]], **changes: Any) -> Quantize:
    values = {"method": "rtn", "scheme": "W4A16", "group_size": 64, "overrides": overrides} | changes
    return TypeAdapter(Quantize).validate_json(json.dumps(values))


@pytest.fixture
def shape() -> DecoderShape:
    return decoder_shape(CONFIG, "here")


def test_every_linear_of_every_layer_gets_the_scheme_and_the_head_none(shape: DecoderShape) -> None:
    assignment = assign_schemes(settings([]), shape)
    assert set(assignment.schemes) == {linear.name for linear in shape.linears if linear.name != "lm_head"}
    assert len(assignment.schemes) == 14
    assert set(assignment.schemes.values()) == {WeightScheme("W4A16", 4, True, 64)}
    assert assignment.unmatched == ()


def test_the_first_matching_override_wins(shape: DecoderShape) -> None:
    overrides = [
        {"match": "*.0.mlp.down_proj", "scheme": "W8A16", "group_size": 32},
        {"match": "*.down_proj", "scheme": "W4A16_ASYM", "group_size": "channel"},
    ]
    schemes = assign_schemes(settings(overrides), shape).schemes
    assert schemes["model.layers.0.mlp.down_proj"] == WeightScheme("W8A16", 8, True, 32)
    assert schemes["model.layers.1.mlp.down_proj"] == WeightScheme("W4A16_ASYM", 4, False, 0)
    assert schemes["model.layers.1.mlp.up_proj"] == WeightScheme("W4A16", 4, True, 64)


def test_an_override_without_a_group_size_keeps_the_recipes(shape: DecoderShape) -> None:
    schemes = assign_schemes(settings([{"match": "lm_head", "scheme": "W8A16"}], group_size=32), shape).schemes
    assert schemes["lm_head"] == WeightScheme("W8A16", 8, True, 32)


def test_none_leaves_modules_out_and_counts_as_a_match(shape: DecoderShape) -> None:
    assignment = assign_schemes(settings([{"match": "model.layers.0.*", "scheme": "none"}]), shape)
    assert all(name.startswith("model.layers.1.") for name in assignment.schemes)
    assert len(assignment.schemes) == 7
    assert assignment.unmatched == ()


def test_an_override_that_names_the_head_by_a_glob_quantizes_it(shape: DecoderShape) -> None:
    assert "lm_head" in assign_schemes(settings([{"match": "*", "scheme": "W8A16"}]), shape).schemes


def test_overrides_that_match_nothing_or_never_come_first_are_told_apart(shape: DecoderShape) -> None:
    overrides = [
        {"match": "*.down_proj", "scheme": "W8A16"},
        {"match": "*.mlp.down_proj", "scheme": "none"},
        {"match": "*.down", "scheme": "none"},
    ]
    assert assign_schemes(settings(overrides), shape).unmatched == (2,)


@pytest.mark.parametrize(
    ("name", "group_size", "in_features", "groups", "bits"),
    [
        ("W4A16", 64, 256, 4, 4 + 16 / 64),
        ("W4A16_ASYM", 32, 256, 8, 4 + 20 / 32),
        ("W8A16", "channel", 256, 1, 8 + 16 / 256),
    ],
)
def test_groups_and_storage_of_a_scheme(
    name: str, group_size: int | str, in_features: int, groups: int, bits: float
) -> None:
    scheme = weight_scheme(name, group_size)
    assert scheme.groups(in_features) == groups
    assert scheme.bits_per_weight(in_features) == bits
    assert scheme.levels == 2**scheme.bits - 1
    assert scheme.symmetric_zero_point == 2 ** (scheme.bits - 1)
