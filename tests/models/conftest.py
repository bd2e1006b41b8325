"""Tiny models whose norms and biases matter, and tiny GGUF files, written the way llama.cpp's converter does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """A tensor's name in a GGUF file."""
    module, _, kind = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, inner = module.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def save_gguf(
    source: Path, path: Path, kind: str = "F32", leave_out: tuple[str, ...] = (), extra: dict[str, Any] | None = None
) -> Path:
    """Write a directory's model as GGUF, its matrices as F32 or Q8_0.

    leave_out: tensors by their GGUF names.  extra: more metadata (texts, whole numbers) and tensors (arrays) by name.
    """
    import gguf
    import numpy as np
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    family, heads, kv_heads = config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(vocabulary) - 1))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_chat_template((source / "chat_template.jinja").read_text())
    for name, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_tensor(name, value)
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        for projection, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if family == "llama" and projection in name:
                # llama.cpp rotates neighbouring pairs, transformers the two halves of a head.
                values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if gguf_name(name) in leave_out:
            continue
        if kind != "F32" and values.ndim == 2:
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(
                gguf_name(name), gguf.quantize(np.ascontiguousarray(values), quantization), raw_dtype=quantization
            )
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def randomize_vectors(directory: Path) -> None:
    """Give norms and biases values of their own: fresh ones are all ones or zeros, which hides a wrong one."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(1)
    tensors = load_file(directory / "model.safetensors")
    for name, value in tensors.items():
        if value.dim() == 1:
            tensors[name] = value + 0.3 * torch.randn(value.shape, generator=generator).to(value.dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def varied_model(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, dict[str, Any]], Path]:
    """Directory of a tiny float32 model by family and changes to its configuration; made once, never to be written to."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, changes: dict[str, Any]) -> Path:
        key = (family, json.dumps(changes))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp("varied"), family, dtype="float32", **changes)
            randomize_vectors(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_gguf() -> Callable[..., Path]:
    """`save_gguf`: a tiny Hugging Face directory as a GGUF file."""
    return save_gguf
