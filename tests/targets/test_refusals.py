from collections import Counter
from typing import get_args

import pytest

from assay.errors import NotSupportedError
from assay.models.architectures import DecoderShape, decoder_shape
from assay.quantize.schemes import weight_scheme
from assay.recipe import Engine, FixedScheme, GroupedScheme
from assay.targets import TARGETS
from assay.targets.refusals import ENGINES, check_format, engine_refusals, format_refusals, split_product

SCHEMES = (*get_args(GroupedScheme), *get_args(FixedScheme))


@pytest.fixture
def shape() -> DecoderShape:
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 384,
        "moe_intermediate_size": 128,
        "num_experts": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "mlp_only_layers": [1],
    }
    return decoder_shape(config, "here")


def every(shape: DecoderShape, scheme: str) -> dict[str, object]:
    """All Linears of the layers in one scheme."""
    return {linear.name: weight_scheme(scheme) for linear in shape.linears if linear.name != "lm_head"}


def test_rows_name_what_there_is() -> None:
    for row in TARGETS.values():
        assert set(row.schemes) <= set(SCHEMES)
    for row in ENGINES:
        assert row.engine in get_args(Engine)
        assert set(row.schemes) <= set(TARGETS[row.format].schemes)
    told = Counter((row.engine, row.format, scheme) for row in ENGINES for scheme in row.schemes)
    assert set(told.values()) == {1}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_format_takes_its_schemes_and_no_other(shape: DecoderShape, target: str, scheme: str) -> None:
    messages = [refusal.message for refusal in format_refusals(target, shape, every(shape, scheme))]
    if scheme in TARGETS[target].schemes:
        assert messages == []
        return
    works = ", ".join(TARGETS[target].schemes)
    elsewhere = "" if TARGETS[target].encoders else f" compressed-tensors takes {scheme}."
    assert messages == [f"{target} cannot hold {scheme}; schemes that work: {works}.{elsewhere}"]


@pytest.mark.parametrize("row", ENGINES, ids=lambda row: f"{row.engine}-{row.format}-{row.schemes[0]}")
def test_every_row_refuses_with_its_reason(shape: DecoderShape, row: object) -> None:
    for scheme in row.schemes:
        found = list(engine_refusals(row.format, row.engine, shape, every(shape, scheme)))
        assert [refusal.message.partition(": ")[2] for refusal in found] == [f"{row.reason}."]
        others = set(get_args(Engine)) - {other.engine for other in ENGINES if scheme in other.schemes}
        assert not any(list(engine_refusals(row.format, engine, shape, every(shape, scheme))) for engine in others)


def test_a_heads_words_count_only_where_it_is_quantized(shape: DecoderShape) -> None:
    assigned = every(shape, "W4A16")
    assert list(format_refusals("gptq", shape, assigned)) == []
    (refusal,) = format_refusals("gptq", shape, assigned | {"lm_head": weight_scheme("W4A16")})
    assert (refusal.module, "100 outputs of lm_head" in refusal.message) == ("lm_head", True)


def test_products_are_those_of_each_layer(shape: DecoderShape) -> None:
    """An expert's two Linears with the same input in one layer, the dense ones in the other."""
    assigned = every(shape, "W4A16")
    assert split_product(shape, assigned) == ()
    for name, other in (
        ("model.layers.0.mlp.experts.1.up_proj", "model.layers.0.mlp.experts.1.gate_proj"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"),
    ):
        apart = {key: scheme for key, scheme in assigned.items() if key != name}
        assert split_product(shape, apart) == (other, name)
        with pytest.raises(NotSupportedError, match=f"compute {other}, {name} as one product"):
            check_format("compressed-tensors", shape, apart)
    first, last = "model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.1.down_proj"
    differing = assigned | {last: weight_scheme("W8A16", 32)}
    assert split_product(shape, differing) == (first, last), "one kernel computes all experts"


def test_the_first_thing_that_a_format_cannot_say_is_an_error(shape: DecoderShape) -> None:
    with pytest.raises(NotSupportedError, match="modelopt cannot hold W4A16; schemes that work: FP8, NVFP4"):
        check_format("modelopt", shape, every(shape, "W4A16"))
