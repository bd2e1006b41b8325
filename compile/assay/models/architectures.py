"""Decoder families as data: which Linears a layer has, which of them see the same input, and where its experts are.

A family is a row. Everything else that a decoder does (norms, rotary embedding, attention, masks, routing) is transformers' own
code, run as it is. What is not a row here is refused, because quantizing a structure nobody checked yields broken checkpoints.

Modules have two names. A checkpoint has the names of the Hub, which are used wherever Assay speaks of a module: in a recipe's
overrides, in what it writes, in what serving engines read. transformers may call the same module differently; a row translates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.files import read_json

Groups = tuple[tuple[str, ...], ...]

# Far above any real model; a damaged configuration must not cost hours or all memory.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 12
_MAX_EXPERTS = 1 << 16

_ATTENTION: Groups = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_GATED: Groups = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))

# What a Linear's outputs are, in the order in which a fused one stacks them, and what its inputs are.
_Dimension = Literal["hidden", "query", "key_value", "inner"]
_DIMENSIONS: Mapping[str, tuple[tuple[_Dimension, ...], _Dimension]] = {
    "self_attn.q_proj": (("query",), "hidden"),
    "self_attn.k_proj": (("key_value",), "hidden"),
    "self_attn.v_proj": (("key_value",), "hidden"),
    "self_attn.qkv_proj": (("query", "key_value", "key_value"), "hidden"),
    "self_attn.o_proj": (("hidden",), "query"),
    "mlp.gate_proj": (("inner",), "hidden"),
    "mlp.up_proj": (("inner",), "hidden"),
    "mlp.gate_up_proj": (("inner", "inner"), "hidden"),
    "mlp.down_proj": (("hidden",), "inner"),
    "attention.self.query": (("query",), "hidden"),
    "attention.self.key": (("key_value",), "hidden"),
    "attention.self.value": (("key_value",), "hidden"),
    "attention.output.dense": (("hidden",), "query"),
    "intermediate.dense": (("inner",), "hidden"),
    "output.dense": (("hidden",), "inner"),
    "attention.q_lin": (("query",), "hidden"),
    "attention.k_lin": (("key_value",), "hidden"),
    "attention.v_lin": (("key_value",), "hidden"),
    "attention.out_lin": (("hidden",), "query"),
    "ffn.lin1": (("inner",), "hidden"),
    "ffn.lin2": (("hidden",), "inner"),
    "attn.Wqkv": (("query", "key_value", "key_value"), "hidden"),
    "attn.Wo": (("hidden",), "query"),
    "mlp.Wi": (("inner", "inner"), "hidden"),
    "mlp.Wo": (("hidden",), "inner"),
}


@dataclass(frozen=True)
class Experts:
    """A family's mixture of experts: each expert is a feed-forward network, and a router picks some of them for each token.

    inner_size, every, dense: config.json's keys for the width of an expert, for the n of "every n-th layer has experts", and for
    a list of layers that have none all the same; None: every layer has experts.
    path, router: transformers' names within a layer.
    """

    inner_size: str
    every: str | None = None
    dense: str | None = None
    path: str = "mlp.experts"
    router: str = "mlp.gate"

    def linear(self, number: int, kind: str) -> str:
        """The path within a layer of one expert's Linear that would be called `kind` in a layer without experts."""
        return f"{self.path}.{number}.{kind.rpartition('.')[2]}"


@dataclass(frozen=True)
class Architecture:
    """One family: its class name in config.json, and its layer's Linears in groups that share an input, in order of execution.

    attention, feed_forward: transformers' names within a layer; each expert has the Linears of `feed_forward`.
    attention_norm, feed_forward_norm: the norms whose outputs only they (and a router) read; None where there is none.
    first_attention_norm: the first layer that has `attention_norm`.  norm_offset: what a norm adds to its weight before it
    multiplies.
    bidirectional: every token sees those after it, too, so that a text that is cut off is another one from its beginning.
    body: what the names of the modules without the head begin with.  embedding_block: the module around the embedding that gives
    the first layer its input; None: the embedding itself.  final_norm, head: empty where a model has none.
    config_keys: a family's own keys in config.json for numbers that the others call by the first name.
    renamed: parts of names (on the Hub, in transformers).
    defaults: what transformers takes where config.json is silent; without: as many key-value heads as query heads, an even share
    of the hidden size for a head, an untied head.
    """

    class_name: str
    model_type: str
    attention: Groups = _ATTENTION
    feed_forward: Groups = _GATED
    attention_norm: str | None = "input_layernorm"
    feed_forward_norm: str | None = "post_attention_layernorm"
    first_attention_norm: int = 0
    norm_offset: float = 0.0
    bidirectional: bool = False
    body: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    embedding_block: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    experts: Experts | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    config_keys: Mapping[str, str] = field(default_factory=dict[str, str])
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def linears(self) -> Groups:
        """The groups of a layer without experts."""
        return self.attention + self.feed_forward

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network multiplies an activated projection by one without activation."""
        return sum(len(_DIMENSIONS[kind][0]) for kind in self.feed_forward[0]) == 2

    def module_path(self, name: str) -> str:
        """transformers' name of what the Hub calls `name`: a module or a tensor, in full or within a layer."""
        return _replace_parts(name, dict(self.renamed))

    def hub_name(self, path: str) -> str:
        """The Hub's name of what transformers calls `path`."""
        return _replace_parts(path, {ours: hub for hub, ours in self.renamed})


_GEMMA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}

ARCHITECTURES: Mapping[str, Architecture] = {
    row.class_name: row
    for row in (
        Architecture("LlamaForCausalLM", "llama"),
        Architecture("MistralForCausalLM", "mistral", defaults={"num_key_value_heads": 8}),
        Architecture(
            "MixtralForCausalLM",
            "mixtral",
            experts=Experts(inner_size="intermediate_size"),
            renamed=(("block_sparse_moe", "mlp"), ("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")),
            defaults={"num_key_value_heads": 8, "num_experts": 8},
        ),
        Architecture("Qwen2ForCausalLM", "qwen2", defaults={"num_key_value_heads": 32}),
        Architecture("Qwen3ForCausalLM", "qwen3", defaults={"num_key_value_heads": 32, "head_dim": 128}),
        Architecture(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            experts=Experts("moe_intermediate_size", every="decoder_sparse_step", dense="mlp_only_layers"),
            defaults={"num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768},
        ),
        Architecture(
            "Gemma2ForCausalLM",
            "gemma2",
            feed_forward_norm="pre_feedforward_layernorm",
            norm_offset=1.0,
            defaults=_GEMMA,
        ),
        Architecture(
            "Gemma3ForCausalLM",
            "gemma3_text",
            feed_forward_norm="pre_feedforward_layernorm",
            norm_offset=1.0,
            defaults=_GEMMA,
        ),
        Architecture(
            "Phi3ForCausalLM",
            "phi3",
            attention=(("self_attn.qkv_proj",), ("self_attn.o_proj",)),
            feed_forward=(("mlp.gate_up_proj",), ("mlp.down_proj",)),
        ),
        Architecture("GraniteForCausalLM", "granite"),
        # Its norms come after attention and feed-forward, before the sum.
        Architecture("Olmo2ForCausalLM", "olmo2", attention_norm=None, feed_forward_norm=None),
        Architecture("SmolLM3ForCausalLM", "smollm3", defaults={"num_key_value_heads": 4, "tie_word_embeddings": True}),
    )
}


@dataclass(frozen=True)
class LinearShape:
    """A Linear by its full name in a checkpoint, with its weight's shape [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class DecoderShape:
    """What can be told of a decoder from its configuration alone.

    inner_size, expert_size: the width of a feed-forward network, and of one expert's.  experts: how many there are in each layer,
    0 in a dense one.
    """

    architecture: Architecture
    layers: int
    hidden_size: int
    context_length: int
    vocabulary: int
    tied_embeddings: bool
    heads: int
    key_value_heads: int
    head_size: int
    inner_size: int
    expert_size: int
    experts: tuple[int, ...]

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every Linear of the layers in order of execution, then the head. Routers are none: they are never quantized."""
        row, found = self.architecture, list[LinearShape]()
        for index in range(self.layers):
            width = self.expert_size if self.experts[index] else self.inner_size
            sizes: dict[_Dimension, int] = {
                "hidden": self.hidden_size,
                "query": self.heads * self.head_size,
                "key_value": self.key_value_heads * self.head_size,
                "inner": width,
            }
            for group in self._named_groups(index):
                for name, kind in group:
                    outputs, inputs = _DIMENSIONS[kind]
                    rows = sum(sizes[output] for output in outputs)
                    found.append(LinearShape(f"{row.layers}.{index}.{name}", rows, sizes[inputs]))
        if row.head:
            found.append(LinearShape(row.head, self.vocabulary, self.hidden_size))
        return tuple(found)

    @cached_property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """[rows, columns] of every Linear's weight, and of the embedding's, by full name."""
        matrices = {linear.name: (linear.out_features, linear.in_features) for linear in self.linears}
        return matrices | {self.architecture.embedding: (self.vocabulary, self.hidden_size)}

    @property
    def routers(self) -> tuple[str, ...]:
        """What picks the experts, by full name; a quantized checkpoint has to say that they are not quantized."""
        return tuple(
            f"{self.architecture.layers}.{index}.{router}"
            for index in range(self.layers)
            if (router := self.router(index)) is not None
        )

    @property
    def parameters(self) -> int:
        """Weights in Linears and the embedding (a tied head counts once)."""
        linear = sum(linear.out_features * linear.in_features for linear in self.linears)
        return linear + (0 if self.tied_embeddings else self.vocabulary * self.hidden_size)

    def groups(self, index: int) -> Groups:
        """A layer's Linears in groups that share an input, in order of execution; names as in a checkpoint, within the layer."""
        return tuple(tuple(name for name, _ in group) for group in self._named_groups(index))

    def router(self, index: int) -> str | None:
        """What picks a layer's experts, by its name within the layer; None in a layer without experts."""
        row = self.architecture
        return row.hub_name(row.experts.router) if row.experts and self.experts[index] else None

    @property
    def patterns(self) -> tuple[str, ...]:
        """What Linears there are within layers, with * for an expert's number."""
        names = [name for index in range(self.layers) for group in self.groups(index) for name in group]
        return tuple(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))

    def _named_groups(self, index: int) -> Iterator[list[tuple[str, str]]]:
        """A layer's groups as pairs: a Linear's name in a checkpoint, and the row's name for its kind."""
        row = self.architecture
        paths = [[(kind, kind) for kind in group] for group in row.attention]
        if row.experts and self.experts[index]:
            numbers, place = range(self.experts[index]), row.experts
            paths += [[(place.linear(n, kind), kind) for kind in group] for n in numbers for group in row.feed_forward]
        else:
            paths += [[(kind, kind) for kind in group] for group in row.feed_forward]
        for group in paths:
            yield [(row.hub_name(path), kind) for path, kind in group]


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face model directory."""
    path = directory / "config.json"
    if not path.is_file():
        raise UsageError(f"{directory}: no config.json; expected a Hugging Face model directory.")
    config = read_json(path)
    if not isinstance(config, dict):
        raise IntegrityError(f"{path}: damaged: it holds no JSON object. Fetch the model again.")
    return config


def quantized_by(config: Mapping[str, Any]) -> str | None:
    """What config.json says that the weights were quantized by, None for float ones."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    return str((settings.get("quant_method") if isinstance(settings, Mapping) else None) or "an unknown method")


def already_quantized(method: str) -> str:
    """The refusal of a quantized checkpoint."""
    return (
        f"the checkpoint is already quantized ({method}); quantizing it again would compound two errors. Start from the original "
        "weights; where they are not to be had, model.dequantize: true makes these float first, and the manifest says so."
    )


def architecture_of(config: Mapping[str, Any], place: str, rows: Mapping[str, Architecture]) -> Architecture:
    """The row for a config.json; NotSupportedError for anything else."""
    if config.get("auto_map"):
        raise NotSupportedError(
            f"{place}: the model brings its own Python code (auto_map); Assay never runs a model's code."
        )
    named, model_type = config.get("architectures"), config.get("model_type")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for name in names:
        # transformers builds the class of model_type: it has to be the same family.
        if name in rows and model_type in (None, rows[name].model_type):
            return rows[name]
    shown = ", ".join(names) or "a model that names no architecture"
    of_type = f" of model_type {model_type!r}" if model_type else ""
    raise NotSupportedError(f"{place}: {shown}{of_type} is not supported yet; supported: {', '.join(sorted(rows))}.")


def decoder_shape(config: Mapping[str, Any], place: str) -> DecoderShape:
    """Every Linear of a decoder with its shape, from config.json's numbers; NotSupportedError where they make no decoder."""
    return model_shape(config, place, ARCHITECTURES)


def model_shape(config: Mapping[str, Any], place: str, rows: Mapping[str, Architecture]) -> DecoderShape:
    """The shape of a model of one of these families; NotSupportedError for any other, and for numbers that make none."""
    row = architecture_of(config, place, rows)
    numbers = _Numbers(row, config, place)
    hidden, inner, vocabulary = (numbers.size(key) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, layers = numbers.size("num_attention_heads"), numbers.size("num_hidden_layers", most=_MAX_LAYERS)
    return DecoderShape(
        architecture=row,
        layers=layers,
        hidden_size=hidden,
        context_length=numbers.size("max_position_embeddings")
        if config.get("max_position_embeddings") is not None
        else 0,
        vocabulary=vocabulary,
        tied_embeddings=bool(row.head and numbers.config.get("tie_word_embeddings", False)),
        heads=heads,
        key_value_heads=numbers.size("num_key_value_heads", heads),
        head_size=numbers.size("head_dim", hidden // heads),
        inner_size=inner,
        expert_size=numbers.size(row.experts.inner_size) if row.experts else 0,
        experts=numbers.experts(layers),
    )


class _Numbers:
    """config.json's numbers, each checked when it is asked for."""

    def __init__(self, row: Architecture, config: Mapping[str, Any], place: str) -> None:
        self.row, self.given, self.place = row, config, place
        # Under the configuration, so that null still means what follows from the other numbers.
        self.config = {**row.defaults, **config}

    def size(self, key: str, default: int | None = None, most: int = _MAX_SIZE) -> int:
        key = self.row.config_keys.get(key, key)
        value = default if self.config.get(key) is None else self.config[key]
        if type(value) is not int or not 0 < value <= most:
            raise self.wrong(key, value, f"a whole number from 1 to {most}")
        return value

    def states(self, key: str) -> bool:
        return self.given.get(key) is not None

    def wrong(self, key: str, value: Any, wanted: str) -> NotSupportedError:
        shown = "is missing" if value is None else f"is {value!r}, not {wanted}"
        return NotSupportedError(f"{self.place}: config.json: {key} {shown}; this is not a complete model.")

    def experts(self, layers: int) -> tuple[int, ...]:
        """How many experts each layer has."""
        experts = self.row.experts
        if experts is None:
            return (0,) * layers
        # Either key means the same to transformers, whatever the family.
        first, second = "num_experts", "num_local_experts"
        key = second if self.states(second) else first
        if self.states(first) and self.given[first] != self.config[key]:
            raise self.wrong(first, self.given[first], f"{second}, {self.given[second]!r}")
        count = self.size(key, most=_MAX_EXPERTS // layers)
        step = self.size(experts.every, 1) if experts.every else 1
        dense = (self.config.get(experts.dense) or []) if experts.dense else []
        if not isinstance(dense, list) or not all(type(index) is int for index in dense):
            raise self.wrong(str(experts.dense), dense, "a list of layer numbers")
        return tuple(0 if index in dense or (index + 1) % step else count for index in range(layers))


def _replace_parts(name: str, parts: Mapping[str, str]) -> str:
    return ".".join(parts.get(part, part) for part in name.split("."))
