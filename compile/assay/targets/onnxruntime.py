"""Compile an encoder for ONNX Runtime: one graph that makes embeddings or classes of token ids.

transformers' exporter makes the float32 graph (onnxruntime_export.py): that is the baseline. The candidate is the same graph with every
quantized product replaced by one that holds our numbers; a product is known by its weight, which has to be the checkpoint's to the bit.
What ONNX Runtime fuses when it loads a graph (norms, activations, biases) it fuses in both.

- Weight-only schemes: MatMulNBits.
- W8A8: inputs are quantized token by token as the scheme says, largest magnitude / 127.5, in standard operators; the product of the codes
  is MatMulIntegerToFloat. What a text becomes does not depend on the others of its batch, as it does with DynamicQuantizeLinear.
- W8A8_STATIC: QuantizeLinear and DequantizeLinear with the calibrated scale, which ONNX Runtime makes an integer product when it loads.

Codes of weights are stored as int8 where the building processor multiplies bytes without saturating (VNNI and its like), as uint8
elsewhere: there ONNX Runtime's kernel for two unsigned factors computes in 16 bits, where the one for unsigned and signed may saturate.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from assay.child import run_module
from assay.errors import AssayError, UsageError
from assay.files import readable_json
from assay.host import cpu_facts
from assay.models.architectures import DecoderShape
from assay.models.checkpoint import Checkpoint, copy_tokenizer
from assay.models.encoders import longest_text, task_of
from assay.models.sentence import read_sentence_settings
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import QuantizedLayer, QuantizedModule
from assay.quantize.weights import QuantizedWeight
from assay.recipe import OnnxRuntime, Recipe
from assay.requirements import built_with
from assay.targets.onnx_graph import (
    CONTRIB,
    constant,
    initializer,
    matmul_nbits,
    put_in_place,
    replace_tensor,
    stored_nbits,
    tensors,
)
from assay.targets.onnxruntime_export import DATA, MODEL, OPSET
from assay.targets.realized import Realization, StoredLinear, verify

SETTINGS, CONFIG = "encoder.json", "config.json"
_EXPORTER = "transformers' ONNX exporter"
_EXPORT_SECONDS = 3600
_HALF = 128
# No input is so small; a token of zeros must not divide by zero.
_SMALLEST = 1e-30
_UNSATURATED = {"avx_vnni", "avx512_vnni", "amx_int8", "asimd"}


def build_baseline(checkpoint: Checkpoint, destination: Path) -> None:
    """Write the unquantized float32 graph with the tokenizer and what a runtime has to know of both."""
    if not (checkpoint.directory / "tokenizer.json").is_file():
        raise UsageError(
            f"{checkpoint.directory}: no tokenizer.json, which an encoder is served with; take all of the model."
        )
    settings = encoder_settings(checkpoint)
    destination.mkdir(parents=True, exist_ok=True)
    arguments = [str(checkpoint.directory), str(destination)]
    run_module(_EXPORTER, "assay.targets.onnxruntime_export", *arguments, seconds=_EXPORT_SECONDS)
    if not (destination / MODEL).is_file():
        raise AssayError(f"{_EXPORTER} wrote no {MODEL}.")
    copy_tokenizer(checkpoint.directory, destination)
    shutil.copyfile(checkpoint.directory / CONFIG, destination / CONFIG)
    (destination / SETTINGS).write_bytes(readable_json(settings))


def encoder_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What whoever runs the graph has to know beside it."""
    config, shape, sentence = checkpoint.config, checkpoint.shape, read_sentence_settings(checkpoint.directory)
    longest, task = longest_text(shape, config), task_of(shape)
    settings: dict[str, Any] = {
        "version": 1,
        "task": task,
        "max_tokens": min(longest, sentence.max_tokens or longest),
        "pad_token_id": config.get("pad_token_id") or 0,
    }
    if task == "embedding":
        return settings | {"pooling": sentence.pooling, "normalized": sentence.normalize}
    return settings | {"labels": _labels(config)}


def _labels(config: Mapping[str, Any]) -> list[str]:
    """The names of a classifier's classes in order; numbers where it has none."""
    named = config.get("id2label")
    count = len(named) if isinstance(named, dict) else int(config.get("num_labels") or 2)
    return [str(named.get(str(index), index)) if isinstance(named, dict) else str(index) for index in range(count)]


def build_candidate(
    checkpoint: Checkpoint, quantized: QuantizedLayer, recipe: Recipe, baseline: Path, destination: Path
) -> Realization:
    """Write the quantized model directory and read it back; every number in it is one that the quantizer chose."""
    model = ir.load(baseline / MODEL)
    assigned = assign_schemes(recipe.quantize, checkpoint.shape).schemes
    level = recipe.target.accuracy_level if isinstance(recipe.target, OnnxRuntime) else 0
    products = _products(model, checkpoint)
    shared: _Shared = {}
    unsaturated = bool(_UNSATURATED & set(cpu_facts()["instruction_sets"]))
    for name, module in quantized.modules.items():
        node = products[name]
        node.name = name
        scheme = module.weight.scheme
        if scheme.activations is None:
            output = matmul_nbits(model.graph, node, name, [module.weight], level)
        elif scheme.activations.static:
            output = _static(model.graph, node, module, shared, signed=unsaturated)
        else:
            output = _dynamic(model.graph, node, module.weight, shared, signed=unsaturated)
        put_in_place(model.graph, node, node.inputs[1], output)
    for name, value in quantized.tensors.items():
        replace_tensor(model.graph, name, value, checkpoint, _EXPORTER)
    model.graph.opset_imports[CONTRIB] = 1
    # Products that share an input may stand in another order than their modules.
    model.graph.sort()
    destination.mkdir(parents=True, exist_ok=True)
    ir.save(model, destination / MODEL, external_data=DATA)
    for path in baseline.iterdir():
        if path.name not in (MODEL, DATA):
            shutil.copyfile(path, destination / path.name)
    found = verify(checkpoint.shape, assigned, quantized.modules, read_back(destination, checkpoint.shape))
    facts = _facts(checkpoint, assigned, unsaturated)
    facts |= {"inputs": tensors(model.graph.inputs), "outputs": tensors(model.graph.outputs)}
    requires = built_with("onnxruntime")
    if unsaturated and _integer_products(assigned):
        # What was measured here is not what saturating products compute.
        requires["instruction_sets"] = ["|".join(sorted(_UNSATURATED))]
    return replace(found, requires=requires, facts=facts)


def _integer_products(assigned: Mapping[str, WeightScheme]) -> bool:
    """Whether any product is one of integers."""
    return any(scheme.activations is not None for scheme in assigned.values())


def _facts(checkpoint: Checkpoint, assigned: Mapping[str, WeightScheme], unsaturated: bool) -> dict[str, Any]:
    """What the manifest tells of the graph."""
    facts: dict[str, Any] = {
        "opset": OPSET,
        "runtime_version": metadata.version("onnxruntime"),
        "encoder": encoder_settings(checkpoint),
    }
    if _integer_products(assigned):
        rule = (
            "int8: built on a processor whose products of bytes do not saturate; one that has none (x86 with neither VNNI nor AMX) may "
            "lose quality with it: build there."
            if unsaturated
            else "uint8: built on a processor whose products of unsigned and signed bytes may saturate; slower where they do not."
        )
        facts["weight_codes"] = rule
    return facts


def read_back(directory: Path, shape: DecoderShape) -> dict[str, StoredLinear]:
    """Every quantized Linear that a compiled model directory holds, by module name, dequantized from the file's bytes."""
    stored: dict[str, StoredLinear] = {}
    names = {linear.name for linear in shape.linears}
    for node in ir.load(directory / MODEL).graph:
        name = (node.name or "").removesuffix("Nbits")
        if name not in names:
            continue
        if node.op_type == "MatMulNBits":
            stored[name] = StoredLinear(*stored_nbits(node))
        else:
            stored[name] = StoredLinear(8, _stored_bytes(node))
    return stored


def _stored_bytes(node: ir.Node) -> Tensor:
    """The weight of an integer product, float32 [out, in]: of MatMulIntegerToFloat, or of a MatMul of a DequantizeLinear."""
    place, dequantize = (1, node) if node.op_type == "MatMulIntegerToFloat" else (0, _producer(node.inputs[1]))
    codes = constant(dequantize.inputs[place])
    scales = constant(dequantize.inputs[3 if place else 1])
    offset = 0 if codes.dtype == np.int8 else _HALF
    return torch.from_numpy((codes.astype(np.float32) - offset) * scales).T.contiguous()


def _producer(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None:
        raise AssayError("a quantized product in the compiled graph has no constant weight.")
    return node


def _products(model: ir.Model, checkpoint: Checkpoint) -> dict[str, ir.Node]:
    """The MatMul of every Linear of the layers, found by its weight; AssayError unless each is there exactly once."""
    found: dict[str, list[ir.Node]] = {}
    by_shape: dict[tuple[int, ...], list[ir.Node]] = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.const_value is not None:
            by_shape.setdefault(tuple(weight.const_value.shape.numpy()), []).append(node)
    for linear in checkpoint.shape.linears:
        source = checkpoint.weight(linear.name).T.numpy()
        candidates = by_shape.get((linear.in_features, linear.out_features), [])
        found[linear.name] = [node for node in candidates if np.array_equal(constant(node.inputs[1]), source)]
    if unclear := [name for name, nodes in found.items() if len(nodes) != 1]:
        raise AssayError(
            f"{_EXPORTER} made {len(found[unclear[0]])} products with the weight of {unclear[0]}, not one: our numbers cannot be put in "
            "its place. Please report the versions of torch, transformers and onnxscript."
        )
    return {name: nodes[0] for name, nodes in found.items()}


@dataclass(frozen=True)
class _Levels:
    """Inputs as a quantized product takes them: codes with the scale of each token, or numbers on the calibrated scale's grid."""

    values: ir.Value
    scales: ir.Value
    half: ir.Value


# By the inputs that were quantized, and their calibrated scale.
_Shared = dict[tuple[ir.Value, float | None], _Levels]


def _dynamic(graph: ir.Graph, node: ir.Node, weight: QuantizedWeight, shared: _Shared, *, signed: bool) -> ir.Value:
    """The product with inputs that are quantized token by token."""
    given, name, add = node.inputs[0], node.name or "", _Adding(graph, node)
    assert given is not None and weight.scheme.activations is not None
    one = add.constant("one", torch.tensor(1.0))
    if (given, None) not in shared:
        largest = add("ReduceMax", [add("Abs", [given]), add.constant("features", torch.tensor([-1]))], keepdims=1)
        scales = add("Div", [largest, add.constant("largest", torch.tensor(weight.scheme.activations.largest))])
        scales = add("Max", [scales, add.constant("smallest", torch.tensor(_SMALLEST))])
        half = add.constant("half", torch.tensor(_HALF, dtype=torch.uint8))
        shared[given, None] = _Levels(add("QuantizeLinear", [add("Div", [given, scales]), one, half]), scales, half)
    levels = shared[given, None]
    codes, scales, zero_points = _weight(graph, name, weight, signed=signed)
    arguments = [levels.values, codes, one, scales, levels.half, zero_points]
    product = ir.node("MatMulIntegerToFloat", arguments, domain=CONTRIB, name=name)
    graph.insert_before(node, product)
    return add("Mul", [product.outputs[0], levels.scales])


def _static(graph: ir.Graph, node: ir.Node, module: QuantizedModule, shared: _Shared, *, signed: bool) -> ir.Value:
    """The product with inputs that are quantized to one calibrated scale, as QuantizeLinear and DequantizeLinear around a MatMul."""
    given, name, add = node.inputs[0], node.name or "", _Adding(graph, node)
    assert given is not None and module.input_scale is not None
    key = (given, float(module.input_scale))
    if key not in shared:
        scale = add.constant("input_scale", module.input_scale.reshape(()))
        half = add.constant("half", torch.tensor(_HALF, dtype=torch.uint8))
        codes = add("QuantizeLinear", [given, scale, half])
        shared[key] = _Levels(add("DequantizeLinear", [codes, scale, half]), scale, half)
    codes, scales, zero_points = _weight(graph, name, module.weight, signed=signed)
    weight = add("DequantizeLinear", [codes, scales, *([] if zero_points is None else [zero_points])], axis=1)
    product = ir.node("MatMul", [shared[key].values, weight], name=name)
    graph.insert_before(node, product)
    return product.outputs[0]


def _weight(
    graph: ir.Graph, name: str, weight: QuantizedWeight, *, signed: bool
) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes [in, out], scales [out] and, of unsigned codes, zero points [out]."""
    codes = weight.codes.T.contiguous()
    if signed:
        codes = (codes.to(torch.int16) - _HALF).to(torch.int8)
    points = None
    if not signed:
        points = initializer(
            graph, f"{name}.weight_zero_points", torch.full((codes.shape[1],), _HALF, dtype=torch.uint8)
        )
    scales = initializer(graph, f"{name}.weight_scales", weight.scales.reshape(-1))
    return initializer(graph, f"{name}.weight_Q8", codes), scales, points


class _Adding:
    """Nodes and constants before a product, named after it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._made = graph, node, 0

    def __call__(self, operator: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
        self._made += 1
        node = ir.node(operator, inputs, attributes, name=f"{self._node.name}.{operator}.{self._made}")
        self._graph.insert_before(self._node, node)
        return node.outputs[0]

    def constant(self, name: str, value: Tensor) -> ir.Value:
        return initializer(self._graph, f"{self._node.name}.{name}", value)
