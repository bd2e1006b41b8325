"""A decoder's shape, told from config.json alone, is that of the modules that transformers builds from it."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    values = {key: value for key, value in (BASE | changes).items() if value is not None}
    config = AutoConfig.for_model(family, **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == name
    shape = decoder_shape({"architectures": [name], "model_type": family} | values, "here")
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert [(one.name, one.out_features, one.in_features) for one in shape.linears] == [
        (path, *module.weight.shape) for path, module in linears.items()
    ]
    assert shape.tied_embeddings is config.tie_word_embeddings
    assert (shape.layers, shape.hidden_size, shape.vocabulary) == (3, config.hidden_size, 96)
    if "max_position_embeddings" in values:
        assert shape.context_length == 128
    norms_and_biases = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 1)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters()) - norms_and_biases


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_a_layer_has_exactly_the_rows_linears(name: str, family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **BASE))
    row = ARCHITECTURES[name]
    layer = model.get_submodule(row.layers)[0]
    found = [path for path, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
    assert [linear for group in row.linears for linear in group] == found
    assert isinstance(model.get_submodule(row.embedding), torch.nn.Embedding)
    assert model.get_submodule(row.head).weight.shape == (96, 64)
    assert type(model.get_submodule(row.final_norm)).__name__.endswith("RMSNorm")


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
    supported = (
        r"not supported yet; supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM\."
    )
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


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*LLAMA, "auto_map", "tie_word_embeddings"]), JSON, max_size=3))
def test_no_configuration_raises_anything_else(changes: dict[str, Any]) -> None:
    try:
        shape = decoder_shape(LLAMA | changes, "here")
    except UsageError as error:
        assert str(error).startswith("here: ")
    else:
        assert len(shape.linears) == 7 * shape.layers + 1


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
