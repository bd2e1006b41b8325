"""A decoder's shape, told from config.json alone, is that of the modules that transformers builds from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.models.architectures import ARCHITECTURES, decoder_shape, read_config

FAMILIES = [(name, row.model_type) for name, row in ARCHITECTURES.items()]
BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 5, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | BASE


@pytest.mark.parametrize(("name", "family"), FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": None},
        {"head_dim": None},
        {"num_key_value_heads": None, "num_attention_heads": 8, "hidden_size": 128},
        {"max_position_embeddings": None},
    ],
    ids=str,
)
def test_shape_is_that_of_the_real_modules(name: str, family: str, changes: dict[str, Any]) -> None:
    """None: the key is absent, and the family's own default holds."""
    values = {key: value for key, value in (BASE | EXPERTS | changes).items() if value is not None}
    model, config = on_meta(family, values)
    assert type(model).__name__ == name
    shape = decoder_shape({"architectures": [name], "model_type": family} | values, "here")
    assert {one.name: (one.out_features, one.in_features) for one in shape.linears} == linears(model)
    assert shape.tied_embeddings is config.tie_word_embeddings
    assert (shape.layers, shape.hidden_size, shape.vocabulary) == (3, config.hidden_size, 96)
    if "max_position_embeddings" in values:
        assert shape.context_length == 128
    others = [value for path, value in model.named_parameters() if value.dim() == 1 or path.endswith("mlp.gate.weight")]
    total = sum(parameter.numel() for parameter in model.parameters())
    assert shape.parameters == total - sum(parameter.numel() for parameter in others)


def on_meta(family: str, values: dict[str, Any]) -> tuple[Any, Any]:
    config = AutoConfig.for_model(family, **values, pad_token_id=0)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config


def linears(model: Any) -> dict[str, tuple[int, int]]:
    """[out, in] of every Linear by its name in a checkpoint; of those of fused experts too."""
    found: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[path] = tuple(module.weight.shape)
        elif path.endswith(".experts"):
            count, hidden, inner = module.down_proj.shape
            for expert in range(count):
                place, names = f"{path}.{expert}", ("gate_proj", "up_proj", "down_proj")
                if model.config.model_type == "mixtral":
                    place, names = place.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
                sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
                found |= {f"{place}.{name}": size for name, size in zip(names, sizes, strict=True)}
    return found


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_the_parts_that_a_row_names_are_there(name: str, family: str) -> None:
    model, row = on_meta(family, BASE | EXPERTS)[0], ARCHITECTURES[name]
    assert isinstance(model.get_submodule(row.embedding), torch.nn.Embedding)
    assert model.get_submodule(row.head).weight.shape == (96, 64)
    layer = model.get_submodule(row.layers)[0]
    norms = [
        row.final_norm,
        *(f"{row.layers}.0.{norm}" for norm in (row.attention_norm, row.feed_forward_norm) if norm),
    ]
    assert all(type(model.get_submodule(norm)).__name__.endswith("RMSNorm") for norm in norms)
    if row.experts:
        assert layer.get_submodule(row.experts.router).weight.shape == (5, 64)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_are_the_linears_of_a_layer(name: str) -> None:
    row = ARCHITECTURES[name]
    shape = decoder_shape({"architectures": [name], "model_type": row.model_type} | BASE | EXPERTS, "here")
    in_groups = [
        f"{row.layers}.{index}.{linear}"
        for index in range(shape.layers)
        for group in shape.groups(index)
        for linear in group
    ]
    assert [linear.name for linear in shape.linears] == [*in_groups, row.head]
    for index in range(shape.layers):
        for group in shape.groups(index):
            assert len({shape.sizes[f"{row.layers}.{index}.{linear}"][1] for linear in group}) == 1
    assert all(row.hub_name(row.module_path(linear)) == linear for linear in in_groups)
    assert all(any(fnmatch(linear, f"*.{pattern}") for pattern in shape.patterns) for linear in in_groups)


def test_experts_come_one_after_the_other_under_their_names_on_the_hub() -> None:
    mixtral = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2}
    shape = decoder_shape(BASE | mixtral, "here")
    place = "block_sparse_moe.experts"
    assert shape.groups(1)[2:] == (
        (f"{place}.0.w1", f"{place}.0.w3"),
        (f"{place}.0.w2",),
        (f"{place}.1.w1", f"{place}.1.w3"),
        (f"{place}.1.w2",),
    )
    assert shape.routers[1] == "model.layers.1.block_sparse_moe.gate"
    assert shape.patterns[4:] == (f"{place}.*.w1", f"{place}.*.w3", f"{place}.*.w2")
    assert shape.architecture.module_path(f"model.layers.1.{place}.1.w3") == "model.layers.1.mlp.experts.1.up_proj"


@pytest.mark.parametrize(
    ("changes", "experts"),
    [
        ({}, (128, 128, 128)),
        ({"num_local_experts": 6}, (6, 6, 6)),
        ({"num_experts": 6, "num_local_experts": 6}, (6, 6, 6)),
        ({"num_experts": 6, "mlp_only_layers": [0, 2, 7]}, (0, 6, 0)),
        ({"num_experts": 6, "mlp_only_layers": None, "decoder_sparse_step": 2}, (0, 6, 0)),
        ({"num_experts": 6, "mlp_only_layers": [1], "decoder_sparse_step": 2}, (0, 0, 0)),
    ],
    ids=str,
)
def test_which_layers_have_experts(changes: dict[str, Any], experts: tuple[int, ...]) -> None:
    config = BASE | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | changes
    assert decoder_shape(config, "here").experts == experts
    routers = tuple(f"model.layers.{index}.mlp.gate" for index, count in enumerate(experts) if count)
    assert decoder_shape(config, "here").routers == routers
    layers = on_meta("qwen3_moe", BASE | changes)[0].model.layers
    assert tuple(len(getattr(getattr(layer.mlp, "experts", None), "down_proj", ())) for layer in layers) == experts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 0}, "num_experts is 0, not a whole number from 1 to 21845"),
        ({"num_experts": 1 << 20}, "num_experts is 1048576, not a whole number from 1 to"),
        ({"num_experts": 4, "num_local_experts": 8}, "num_experts is 4, not num_local_experts, 8"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers is 'all', not a list of layer numbers"),
        ({"mlp_only_layers": [0.5]}, r"mlp_only_layers is \[0.5\], not a list of layer numbers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, not a whole number"),
        ({"moe_intermediate_size": "wide"}, "moe_intermediate_size is 'wide', not a whole number"),
    ],
)
def test_experts_that_cannot_be_are_named(changes: dict[str, Any], words: str) -> None:
    config = BASE | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | changes
    with pytest.raises(NotSupportedError, match=f"here: config.json: {words}"):
        decoder_shape(config, "here")


def test_null_means_what_follows_from_the_other_numbers() -> None:
    shape = decoder_shape(LLAMA | {"head_dim": None, "num_key_value_heads": None}, "here")
    assert [(one.out_features, one.in_features) for one in shape.linears[:4]] == [(64, 64)] * 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "here: GPT2LMHeadModel of model_type 'gpt2' is"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "BertModel of model_type 'bert' is"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"},
            "LlamaForSequenceClassification",
        ),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "gpt2"}, "LlamaForCausalLM of model_type 'gpt2' is"),
        ({"model_type": "llama"}, "a model that names no architecture of model_type 'llama' is"),
        ({"architectures": "LlamaForCausalLM"}, "a model that names no architecture is"),
        ({}, "a model that names no architecture is"),
    ],
)
def test_any_other_architecture_is_refused(config: dict[str, Any], words: str) -> None:
    supported = rf"not supported yet; supported: {', '.join(sorted(ARCHITECTURES))}\."
    with pytest.raises(NotSupportedError, match=f"{words}.*{supported}"):
        decoder_shape(BASE | config, "here")


def test_a_model_with_code_of_its_own_is_refused() -> None:
    with pytest.raises(NotSupportedError, match=r"here: the model brings its own Python code \(auto_map\)"):
        decoder_shape(LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}, "here")


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
)
def test_a_missing_number_is_named(key: str) -> None:
    with pytest.raises(NotSupportedError, match=f"config.json: {key} is missing"):
        decoder_shape({name: value for name, value in LLAMA.items() if name != key}, "here")


@pytest.mark.parametrize("value", [0, -1, 1 << 40, 64.0, "64", True, [64], {"x": 1}], ids=repr)
@pytest.mark.parametrize("key", list(BASE))
def test_a_number_that_cannot_be_is_named(key: str, value: Any) -> None:
    with pytest.raises(NotSupportedError, match=f"config.json: {key} is .*, not a whole number from 1 to"):
        decoder_shape(LLAMA | {key: value}, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


QWEN3_MOE = BASE | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
OTHER_KEYS = ("auto_map", "tie_word_embeddings", "num_local_experts", "decoder_sparse_step")


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=["dense", "experts"])
@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*QWEN3_MOE, *OTHER_KEYS]), JSON, max_size=3))
def test_no_configuration_raises_anything_else(config: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        shape = decoder_shape(config | changes, "here")
    except UsageError as error:
        assert str(error).startswith("here: ")
    else:
        assert len(shape.linears) == 1 + sum(4 + 3 * (count or 1) for count in shape.experts)


def test_reads_a_configuration(tiny_model: Callable[[str], Path]) -> None:
    config = read_config(tiny_model("qwen2"))
    assert decoder_shape(config, "here").architecture is ARCHITECTURES["Qwen2ForCausalLM"]


def test_a_directory_without_configuration_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json; expected a Hugging Face model directory"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1}}', b"\xff\xfe{}", b"\x80", json.dumps([LLAMA]).encode(), b"null", b"7"]
)
def test_a_damaged_configuration_is_an_integrity_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"config\.json: (not valid JSON|damaged)"):
        read_config(tmp_path)
