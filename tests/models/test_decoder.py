"""A decoder walked layer by layer computes what transformers computes in one forward pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from assay.errors import AssayError, IntegrityError
from assay.models.architectures import ARCHITECTURES
from assay.models.checkpoint import SINGLE, Checkpoint
from assay.models.decoder import _TOKENS_AT_ONCE, Decoder

LENGTH = 48
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": ("llama", {}),
    "llama, scaled rotary embedding": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama, no grouped queries": ("llama", {"num_key_value_heads": 4}),
    "mistral, window shorter than the text": ("mistral", {"sliding_window": 7}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, biases on q, k, v": ("qwen2", {}),
    "qwen2, window from the second layer on": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3, norms on q and k, wide heads": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe, biases, one dense layer": ("qwen3_moe", {"mlp_only_layers": [1], "attention_bias": True}),
    "qwen3_moe, a dense layer before one with experts": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "qwen3_moe, shares that do not sum to one": ("qwen3_moe", {"norm_topk_prob": False}),
    "mixtral": ("mixtral", {}),
    "mixtral, window shorter than the text": ("mixtral", {"sliding_window": 7}),
    "gemma2, soft caps, every other layer with a window": ("gemma2", {}),
    "gemma2, head of its own": ("gemma2", {"tie_word_embeddings": False}),
    "gemma3, windows with a rotary embedding of their own": ("gemma3_text", {}),
    "gemma3, biases": ("gemma3_text", {"attention_bias": True, "layer_types": None}),
    "phi3, fused projections": ("phi3", {}),
    "phi3, window shorter than the text": ("phi3", {"sliding_window": 7}),
    "granite, multipliers": ("granite", {}),
    "granite, biases everywhere": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "olmo2, norms after the Linears": ("olmo2", {}),
    "olmo2, biases": ("olmo2", {"attention_bias": True}),
    "smollm3, one layer without positions": ("smollm3", {}),
    "smollm3, that layer with a window": ("smollm3", {"use_sliding_window": True, "sliding_window": 7}),
}


@pytest.fixture
def models(varied_model: Callable[[str, dict[str, Any]], Path]) -> Callable[[str], Path]:
    return lambda name: varied_model(*MODELS[name])


def layer_by_layer(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    hidden = decoder.embed(tokens)
    calls = decoder.layer_arguments(*tokens.shape)
    for index in range(decoder.layer_count):
        result = decoder.layer(index)(hidden, **calls[index])
        hidden = result[0] if isinstance(result, tuple) else result
    return decoder.final_norm()(hidden) @ decoder.checkpoint.weight(decoder.architecture.head).T


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The head's products: Granite then divides them by a constant, Gemma 2 caps them."""
    kept: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    model(tokens, use_cache=False)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("name", MODELS)
def test_layer_by_layer_is_the_whole_forward(models: Callable[[str], Path], name: str) -> None:
    directory = models(name)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    decoder = Decoder(Checkpoint(directory))
    assert decoder.layer_count == 2
    for shape in ((3, LENGTH), (1, 19)):
        tokens = torch.randint(512, shape, generator=torch.Generator().manual_seed(shape[0]))
        with torch.no_grad():
            expected, found = logits(whole, tokens), layer_by_layer(decoder, tokens)
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", [row.model_type for row in ARCHITECTURES.values()])
def test_the_first_layer_reads_exactly_what_it_reads_in_transformers(
    varied_model: Callable[[str, dict[str, Any]], Path], family: str
) -> None:
    directory = varied_model(family, {})
    whole, read = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), list[torch.Tensor]()
    whole.model.layers[0].register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    tokens = torch.randint(512, (11, 190), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(Checkpoint(directory))
    before = [type(module) for module in decoder._skeleton.modules()]
    with torch.no_grad():
        whole(tokens, use_cache=False)
        found = decoder.embed(tokens)
    assert tokens.numel() > _TOKENS_AT_ONCE, "one piece would not have told whether the pieces fit"
    assert torch.equal(found, read[0])
    assert [type(module) for module in decoder._skeleton.modules()] == before
    assert all(parameter.device.type == "meta" for parameter in decoder._skeleton.parameters())


@pytest.mark.parametrize("name", [name for name, (_, changes) in MODELS.items() if changes.get("sliding_window")])
def test_the_windows_of_these_models_matter(models: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """Without this the comparison above could pass with no window on either side."""
    directory = shutil.copytree(models(name), tmp_path / "wide")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"sliding_window": 4 * LENGTH}))
    tokens = torch.arange(LENGTH)[None]
    with torch.no_grad():
        narrow, wide = (layer_by_layer(Decoder(Checkpoint(path)), tokens) for path in (models(name), directory))
    assert torch.allclose(narrow[:, :7], wide[:, :7], atol=1e-4)
    assert not torch.allclose(narrow[:, 8:], wide[:, 8:], atol=1e-2)


def test_a_bfloat16_checkpoint_is_computed_in_float32(tiny_model: Callable[[str], Path]) -> None:
    decoder = Decoder(Checkpoint(tiny_model("qwen2")))
    assert {parameter.dtype for parameter in decoder.layer(1).parameters()} == {torch.float32}
    assert decoder.embed(torch.zeros(1, 8, dtype=torch.int64)).dtype is torch.float32


@pytest.mark.parametrize("family", [row.model_type for row in ARCHITECTURES.values()])
def test_no_weights_are_held_between_layers(tiny_model: Callable[[str], Path], family: str) -> None:
    decoder = Decoder(Checkpoint(tiny_model(family)))
    first = decoder.layer(0)
    assert all(parameter.device.type == "cpu" for parameter in first.parameters())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert all(parameter.device.type == "meta" for parameter in decoder._skeleton.parameters())
    assert any(bool(parameter.any()) for parameter in decoder.layer(0).parameters())
    assert decoder.layer_name(1) == "model.layers.1"


def test_asking_for_arguments_leaves_the_skeleton_as_it_was(tiny_model: Callable[[str], Path]) -> None:
    decoder = Decoder(Checkpoint(tiny_model("llama")))
    before = [type(module) for module in decoder._skeleton.modules()]
    decoder.layer_arguments(2, 16)
    assert [type(module) for module in decoder._skeleton.modules()] == before


@pytest.fixture
def copied(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("qwen3"), tmp_path / "copy")


def change_tensor(directory: Path, name: str, value: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(directory / SINGLE) | {name: value}
    save_file({key: one for key, one in tensors.items() if one is not None}, directory / SINGLE)


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_norm", "mlp.up_proj"])
def test_a_layer_with_a_missing_weight_is_refused(copied: Path, name: str) -> None:
    change_tensor(copied, f"model.layers.1.{name}.weight", None)
    decoder = Decoder(Checkpoint(copied))
    decoder.layer(0)
    with pytest.raises(IntegrityError, match=rf"model\.layers\.1\.{name}\.weight is missing"):
        decoder.layer(1)


def test_a_norm_of_another_size_is_refused(copied: Path) -> None:
    change_tensor(copied, "model.norm.weight", torch.ones(1))
    with pytest.raises(
        IntegrityError, match=r"model\.norm\.weight has the shape \[1\], but config\.json makes it \[64\]"
    ):
        Decoder(Checkpoint(copied)).final_norm()


def test_stored_rotary_frequencies_are_passed_over(copied: Path) -> None:
    """Old Llama checkpoints hold them; transformers computes its own."""
    change_tensor(copied, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.full((8,), float("nan")))
    Decoder(Checkpoint(copied)).layer(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "nonsense"},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"rms_norm_eps": "small"},
        {"pad_token_id": 99999},
        {"dtype": "float99"},
        {"layer_types": ["nonsense"]},
    ],
    ids=str,
)
def test_a_configuration_that_transformers_refuses_is_one_clear_error(copied: Path, changes: dict[str, Any]) -> None:
    path = copied / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AssayError, match=r"transformers cannot build the model that config\.json describes"):
        Decoder(Checkpoint(copied))
