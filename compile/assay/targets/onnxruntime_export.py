"""Export one encoder to ONNX, pooling included: run as `python -m assay.targets.onnxruntime_export MODEL DESTINATION`.

transformers' own exporter makes the graph of the hidden states or of a classifier's logits, with the batch and the sequence open; what
makes one embedding of them is added here. A process of its own, because the exporter patches PyTorch and prints as it goes.

Inputs are input_ids, attention_mask and, where a model has several token types, token_type_ids; outputs are sentence_embedding and
last_hidden_state, or logits: the names that sentence-transformers and optimum look for.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import transformers
from torch.export import Dim
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from assay.models.architectures import DecoderShape, read_config
from assay.models.encoders import encoder_shape, longest_text, task_of
from assay.models.sentence import SentenceSettings, read_sentence_settings

OPSET = 20
MODEL, DATA = "model.onnx", "model.onnx.data"
EMBEDDING, HIDDEN, LOGITS = "sentence_embedding", "last_hidden_state", "logits"
# As sentence-transformers divides.
_FEWEST_TOKENS, _SHORTEST = 1e-9, 1e-12


def export(directory: Path) -> ir.Model:
    """The float32 graph of an encoder."""
    config = read_config(directory)
    shape = encoder_shape(config, str(directory))
    model = _load(directory, shape)
    inputs: dict[str, Any] = {
        "input_ids": torch.full((2, 16), 2),
        "attention_mask": torch.ones(2, 16, dtype=torch.int64),
    }
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros(2, 16, dtype=torch.int64)
    # PyTorch takes sizes of 0 and 1 for constants; the graph takes 1 all the same.
    open_axes = {0: Dim("batch", min=2), 1: Dim("sequence", min=2, max=longest_text(shape, config))}
    settings = OnnxConfig(dynamic_shapes=dict.fromkeys(inputs, open_axes), opset_version=OPSET)
    with warnings.catch_warnings():
        # It warns of versions of PyTorch that it was not tested with; what it makes is verified here.
        warnings.simplefilter("ignore")
        exported: ir.Model = OnnxExporter().export(model, inputs, settings).program
    if task_of(shape) == "embedding":
        _pool(exported.graph, read_sentence_settings(directory))
    _name_axes(exported.graph)
    _forget(exported)
    return exported


def _name_axes(graph: ir.Graph) -> None:
    """Call the open axes batch and sequence, which PyTorch numbers."""
    shape = graph.inputs[0].shape
    assert shape is not None
    named = dict(zip((str(dim) for dim in shape), ("batch", "sequence"), strict=True))
    values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([named.get(str(dim), dim) for dim in value.shape])


def _forget(model: ir.Model) -> None:
    """Drop where in PyTorch's source each node is from: paths of the building machine, which would be part of the digest."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _load(directory: Path, shape: DecoderShape) -> Any:
    given: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False, "local_files_only": True}
    model = getattr(transformers, shape.architecture.class_name).from_pretrained(directory, **given).eval()
    if hasattr(model, "pooler"):
        # BERT's own, which embeddings do not use.
        model.pooler = None
    return model


def _pool(graph: ir.Graph, settings: SentenceSettings) -> None:
    """Add what makes one vector of the hidden states of a text, as float32 [batch, hidden]."""
    hidden, mask = graph.outputs[0], next(value for value in graph.inputs if value.name == "attention_mask")

    def add(operator: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"pooling.{operator}.{len(graph)}")
        graph.append(node)
        return node.outputs[0]

    def constant(name: str, value: torch.Tensor) -> ir.Value:
        tensor = ir.tensor(value.numpy(), name=f"pooling.{name}")
        made = ir.Value(
            name=tensor.name, shape=ir.Shape(tuple(value.shape)), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(made)
        return made

    tokens = constant("tokens", torch.tensor([1]))
    if settings.pooling == "cls":
        pooled = add("Gather", [hidden, constant("first", torch.tensor(0))], axis=1)
    else:
        weights = add(
            "Unsqueeze", [add("Cast", [mask], to=ir.DataType.FLOAT), constant("features", torch.tensor([-1]))]
        )
        total = add("ReduceSum", [add("Mul", [hidden, weights]), tokens], keepdims=0)
        count = add("ReduceSum", [weights, tokens], keepdims=0)
        pooled = add("Div", [total, add("Max", [count, constant("fewest", torch.tensor(_FEWEST_TOKENS))])])
    if settings.normalize:
        length = add("ReduceL2", [pooled, tokens], keepdims=1)
        pooled = add("Div", [pooled, add("Max", [length, constant("shortest", torch.tensor(_SHORTEST))])])
    assert hidden.shape is not None
    pooled.name, pooled.type = EMBEDDING, ir.TensorType(ir.DataType.FLOAT)
    pooled.shape = ir.Shape((hidden.shape[0], hidden.shape[2]))
    graph.outputs.insert(0, pooled)


def main() -> None:
    directory, destination = map(Path, sys.argv[1:])
    ir.save(export(directory), destination / MODEL, external_data=DATA)


if __name__ == "__main__":
    main()
