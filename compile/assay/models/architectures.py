"""Decoder families as data: which Linears a layer has, and which of them see the same input.

A family is a row. Everything else that a decoder does (norms, rotary embedding, attention, masks) is transformers' own code, run
as it is. What is not a row here is refused, because quantizing a structure nobody checked yields broken checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.files import read_json

# Far above any real model; a damaged configuration must not cost hours or all memory.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 12


@dataclass(frozen=True)
class Architecture:
    """One family: its class name in config.json, and its layer's Linears in groups that share an input, in order of execution.

    key_value_heads, head_size: what transformers takes where config.json is silent; None: as many as query heads, and an even
    share of the hidden size.
    """

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
    key_value_heads: int | None = None
    head_size: int | None = None


ARCHITECTURES: Mapping[str, Architecture] = {
    row.class_name: row
    for row in (
        Architecture("LlamaForCausalLM", "llama"),
        Architecture("MistralForCausalLM", "mistral", key_value_heads=8),
        Architecture("Qwen2ForCausalLM", "qwen2", key_value_heads=32),
        Architecture("Qwen3ForCausalLM", "qwen3", key_value_heads=32, head_size=128),
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


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face model directory."""
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError(f"{directory}: no config.json; expected a Hugging Face model directory.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise IntegrityError(f"{path}: damaged: it holds no JSON object. Fetch the model again.")
    return config


def architecture_of(config: Mapping[str, Any], place: str) -> Architecture:
    """The row for a config.json; NotSupportedError for anything else."""
    if config.get("auto_map"):
        raise NotSupportedError(
            f"{place}: the model brings its own Python code (auto_map); Assay never runs a model's code."
        )
    named, model_type = config.get("architectures"), config.get("model_type")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for name in names:
        # transformers builds the class of model_type: it has to be the same family.
        if name in ARCHITECTURES and model_type in (None, ARCHITECTURES[name].model_type):
            return ARCHITECTURES[name]
    shown = ", ".join(names) or "a model that names no architecture"
    of_type = f" of model_type {model_type!r}" if model_type else ""
    raise NotSupportedError(
        f"{place}: {shown}{of_type} is not supported yet; supported: {', '.join(sorted(ARCHITECTURES))}."
    )


def decoder_shape(config: Mapping[str, Any], place: str) -> DecoderShape:
    """Every Linear of a decoder with its shape, from config.json's numbers; NotSupportedError where they make no decoder."""
    architecture = architecture_of(config, place)
    # Under the configuration, so that null still means what follows from the other numbers.
    config = {"num_key_value_heads": architecture.key_value_heads, "head_dim": architecture.head_size, **config}

    def size(key: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        value = default if config.get(key) is None else config[key]
        if type(value) is not int or not 0 < value <= most:
            shown = "is missing" if value is None else f"is {value!r}, not a whole number from 1 to {most}"
            raise NotSupportedError(f"{place}: config.json: {key} {shown}; this is not a complete decoder.")
        return value

    hidden, inner, vocabulary = size("hidden_size"), size("intermediate_size"), size("vocab_size")
    heads, layers = size("num_attention_heads"), size("num_hidden_layers", most=_MAX_LAYERS)
    head_size = size("head_dim", hidden // heads)
    key_value = size("num_key_value_heads", heads) * head_size
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
        context_length=size("max_position_embeddings") if config.get("max_position_embeddings") is not None else 0,
        vocabulary=vocabulary,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        linears=tuple(linears),
    )
