"""Decoder families as data: which Linears a layer has, and which of them see the same input.

A family is a row. Everything else that a decoder does (norms, rotary embedding, attention, masks) is transformers' own code, run
as it is. What is not a row here is refused, because quantizing a structure nobody checked yields broken checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from assay.errors import NotSupportedError


@dataclass(frozen=True)
class Architecture:
    """One family: its class name in config.json, and its layer's Linears in groups that share an input, in order of execution."""

    class_name: str
    model_type: str
    linears: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"


ARCHITECTURES: Mapping[str, Architecture] = {
    row.class_name: row
    for row in (
        Architecture("LlamaForCausalLM", "llama"),
        Architecture("MistralForCausalLM", "mistral"),
        Architecture("Qwen2ForCausalLM", "qwen2"),
        Architecture("Qwen3ForCausalLM", "qwen3"),
    )
}


@dataclass(frozen=True)
class LinearShape:
    """A Linear by its full module name, with its weight's shape [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class DecoderShape:
    """What can be told of a decoder from its configuration alone."""

    architecture: Architecture
    layers: int
    hidden_size: int
    context_length: int
    vocabulary: int
    tied_embeddings: bool
    linears: tuple[LinearShape, ...]

    @property
    def parameters(self) -> int:
        """Weights in Linears and the embedding (a tied head counts once)."""
        linear = sum(linear.out_features * linear.in_features for linear in self.linears)
        return linear + (0 if self.tied_embeddings else self.vocabulary * self.hidden_size)


def architecture_of(config: Mapping[str, Any], place: str) -> Architecture:
    """The row for a config.json; NotSupportedError for anything else."""
    names = config.get("architectures") or []
    if config.get("auto_map"):
        raise NotSupportedError(
            f"{place}: the model brings its own Python code (auto_map); Assay never runs a model's code."
        )
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    shown = ", ".join(names) or f"model_type {config.get('model_type')!r}"
    raise NotSupportedError(f"{place}: {shown} is not supported yet; supported: {', '.join(sorted(ARCHITECTURES))}.")


def decoder_shape(config: Mapping[str, Any], place: str) -> DecoderShape:
    """Every Linear of a decoder with its shape, from config.json's numbers."""
    architecture = architecture_of(config, place)
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
        vocabulary = int(config["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise NotSupportedError(
            f"{place}: config.json lacks a usable {error}; it is not a complete decoder configuration."
        ) from error
    head_size = int(config.get("head_dim") or hidden // heads)
    key_value = int(config.get("num_key_value_heads") or heads) * head_size
    sizes = {
        "self_attn.q_proj": (heads * head_size, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, heads * head_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    linears = [
        LinearShape(f"{architecture.layers}.{index}.{name}", *sizes[name])
        for index in range(layers)
        for group in architecture.linears
        for name in group
    ]
    linears.append(LinearShape(architecture.head, vocabulary, hidden))
    return DecoderShape(
        architecture=architecture,
        layers=layers,
        hidden_size=hidden,
        context_length=int(config.get("max_position_embeddings") or 0),
        vocabulary=vocabulary,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        linears=tuple(linears),
    )
