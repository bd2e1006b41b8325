"""Encoder families as data: the same rows as the decoders', for the same walk. Only their layers' Linears are ever quantized.

Heads (pooler, classifier, masked language model) stay as they are: they are small, and each task has its own. No recipe reaches
these rows yet: evaluation and targets know decoders only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from assay.models.architectures import Architecture, DecoderShape, model_shape

_TASKS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


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
