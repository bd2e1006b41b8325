"""Encoder families as data: the same rows as the decoders', for the same walk. Only their layers' Linears are ever quantized.

Heads (pooler, classifier, masked language model) stay as they are: they are small, and each task has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from assay.models.architectures import ARCHITECTURES, Architecture, DecoderShape, model_shape

_TASKS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
_TASK_WORDS = {
    "ForMaskedLM": "masked language model",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token classification",
}
_AFTER_PADDING = ("roberta", "xlm-roberta")


def _with_tasks(row: Architecture, body: str) -> list[Architecture]:
    """The bare model's row, `body` being what its names begin with in a model that has a head, and one for each such model."""
    bare = row.class_name.removesuffix("Model")
    return [
        row,
        *(
            replace(
                row,
                class_name=f"{bare}{task}",
                body=body,
                layers=f"{body}.{row.layers}",
                embedding=f"{body}.{row.embedding}",
                embedding_block=f"{body}.{row.embedding_block}",
                final_norm=f"{body}.{row.final_norm}" if row.final_norm else "",
            )
            for task in _TASKS
        ),
    ]


# LayerNorm comes after the sum with the residual: what reads it is not only Linears.
_BERT = Architecture(
    "BertModel",
    "bert",
    attention=(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
    ),
    feed_forward=(("intermediate.dense",), ("output.dense",)),
    attention_norm=None,
    feed_forward_norm=None,
    bidirectional=True,
    body="",
    layers="encoder.layer",
    embedding="embeddings.word_embeddings",
    embedding_block="embeddings",
    final_norm="",
    head="",
)
_DISTILBERT = replace(
    _BERT,
    class_name="DistilBertModel",
    model_type="distilbert",
    attention=(("attention.q_lin", "attention.k_lin", "attention.v_lin"), ("attention.out_lin",)),
    feed_forward=(("ffn.lin1",), ("ffn.lin2",)),
    layers="transformer.layer",
    config_keys={
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
)
_MODERNBERT = Architecture(
    "ModernBertModel",
    "modernbert",
    attention=(("attn.Wqkv",), ("attn.Wo",)),
    feed_forward=(("mlp.Wi",), ("mlp.Wo",)),
    attention_norm="attn_norm",
    feed_forward_norm="mlp_norm",
    first_attention_norm=1,
    bidirectional=True,
    body="",
    layers="layers",
    embedding="embeddings.tok_embeddings",
    embedding_block="embeddings",
    final_norm="final_norm",
    head="",
)

ENCODERS: Mapping[str, Architecture] = {
    row.class_name: row
    for row in (
        *_with_tasks(_BERT, "bert"),
        *_with_tasks(replace(_BERT, class_name="RobertaModel", model_type="roberta"), "roberta"),
        *_with_tasks(replace(_BERT, class_name="XLMRobertaModel", model_type="xlm-roberta"), "roberta"),
        *_with_tasks(_DISTILBERT, "distilbert"),
        *_with_tasks(_MODERNBERT, "model"),
    )
}


def encoder_shape(config: Mapping[str, Any], place: str) -> DecoderShape:
    """Every Linear of an encoder's layers with its shape, from config.json's numbers; NotSupportedError where they make none."""
    return model_shape(config, place, ENCODERS)


def shape_of(config: Mapping[str, Any], place: str) -> DecoderShape:
    """The shape of a decoder or an encoder, whichever config.json describes; NotSupportedError for anything else."""
    return model_shape(config, place, {**ARCHITECTURES, **ENCODERS})


def is_encoder(shape: DecoderShape) -> bool:
    """Whether a model reads whole texts at once, to embed or to classify them."""
    return shape.architecture.class_name in ENCODERS


def task_of(shape: DecoderShape) -> str:
    """What an encoder's outputs are for: the end of its class's name, `embedding` for the bare model."""
    name = shape.architecture.class_name
    return next((_TASK_WORDS[task] for task in _TASKS if name.endswith(task)), "embedding")


def longest_text(shape: DecoderShape, config: Mapping[str, Any]) -> int:
    """Tokens that an encoder has positions for; RoBERTa's begin after that of padding."""
    padding = config.get("pad_token_id")
    taken = int(padding) + 1 if shape.architecture.model_type in _AFTER_PADDING and isinstance(padding, int) else 0
    return shape.context_length - taken
