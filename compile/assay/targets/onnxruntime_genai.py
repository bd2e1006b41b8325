"""Compile a decoder for onnxruntime-genai.

Its own model builder, run as a subprocess, makes a float32 graph: that is the baseline. The candidate is the same graph with
every quantized MatMul replaced by a MatMulNBits that holds our numbers. Each replaced weight is first compared with the source
checkpoint, so a builder that renames, fuses or transforms weights is noticed and not trusted.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from assay.child import run_module
from assay.errors import AssayError, NotSupportedError
from assay.models.architectures import DecoderShape
from assay.models.checkpoint import TOKENIZER_FILES, Checkpoint
from assay.quantize.schemes import assign_schemes
from assay.quantize.store import QuantizedLayer
from assay.quantize.weights import QuantizedWeight
from assay.recipe import OnnxRuntimeGenai, Recipe
from assay.requirements import built_with
from assay.targets.onnx_graph import constant, initializer, matmul_nbits, put_in_place, replace_tensor, stored_nbits
from assay.targets.realized import Realization, StoredLinear, verify

MODEL = "model.onnx"
DATA = "model.onnx.data"
CONFIG = "genai_config.json"
_BUILDER = "onnxruntime-genai's model builder"
_BUILD_SECONDS = 3600
_WEIGHT = re.compile(
    r"^(?:model\.layers\.(?P<layer>\d+)\.(?P<block>attn|mlp)\.(?P<linear>\w+)|(?P<head>lm_head))\.MatMul\.weight$"
)
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_EMBEDDING = "model.embed_tokens.weight"


def build_baseline(checkpoint: Checkpoint, destination: Path) -> None:
    """Write the unquantized float32 model directory that onnxruntime-genai loads."""
    arguments = ["-i", str(checkpoint.directory), "-o", str(destination), "-p", "fp32", "-e", "cpu"]
    with tempfile.TemporaryDirectory() as cache:
        # It would keep its cache in the working directory.
        run_module(_BUILDER, "onnxruntime_genai.models.builder", *arguments, "-c", cache, seconds=_BUILD_SECONDS)
    if not (destination / CONFIG).is_file():
        raise AssayError(f"{_BUILDER} wrote no {CONFIG}; this release of it is not one that Assay knows.")
    _copy_tokenizer(checkpoint, destination)


def build_candidate(
    checkpoint: Checkpoint, quantized: QuantizedLayer, recipe: Recipe, baseline: Path, destination: Path
) -> Realization:
    """Write the quantized model directory and read it back; every number in it is one that the quantizer chose."""
    model = ir.load(baseline / MODEL)
    level = recipe.target.accuracy_level if isinstance(recipe.target, OnnxRuntimeGenai) else 0
    for node, names in list(_weight_nodes(model)):
        chosen = [quantized.modules[name].weight for name in names if name in quantized.modules]
        if not chosen:
            continue
        _check_source(node, names, checkpoint)
        _check_fused(names, chosen)
        product = matmul_nbits(model.graph, node, _base_name(node), chosen, level)
        put_in_place(model.graph, node, node.inputs[1], product)
    for name, value in quantized.tensors.items():
        replace_tensor(model.graph, name, value, checkpoint, "onnxruntime-genai's builder")
    _keep_embedding(model.graph, checkpoint)
    destination.mkdir(parents=True, exist_ok=True)
    ir.save(model, destination / MODEL, external_data=DATA)
    shutil.copyfile(baseline / CONFIG, destination / CONFIG)
    _copy_tokenizer(checkpoint, destination)
    assigned = assign_schemes(recipe.quantize, checkpoint.shape).schemes
    realized = verify(checkpoint.shape, assigned, quantized.modules, read_back(destination, checkpoint.shape))
    return replace(realized, requires=built_with("onnxruntime-genai"))


def read_back(directory: Path, shape: DecoderShape) -> dict[str, StoredLinear]:
    """Every quantized Linear that a compiled model directory holds, by module name, dequantized from the file's bytes."""
    stored: dict[str, StoredLinear] = {}
    model = ir.load(directory / MODEL)
    out_features = {linear.name: linear.out_features for linear in shape.linears}
    for node in model.graph:
        if node.op_type != "MatMulNBits":
            continue
        bits, weight = stored_nbits(node)
        start = 0
        for name in modules_of(f"{_base_name(node)}.weight"):
            stop = start + out_features[name]
            stored[name] = StoredLinear(bits, weight[start:stop])
            start = stop
    return stored


def modules_of(initializer: str) -> tuple[str, ...]:
    """The source modules whose weights a graph initializer holds, stacked along the output channels; () for any other."""
    match = _WEIGHT.match(initializer)
    if match is None:
        return ()
    if match["head"]:
        return ("lm_head",)
    block = "self_attn" if match["block"] == "attn" else "mlp"
    return tuple(
        f"model.layers.{match['layer']}.{block}.{part}" for part in _FUSED.get(match["linear"], (match["linear"],))
    )


def _weight_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, tuple[str, ...]]]:
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1] is not None and (names := modules_of(node.inputs[1].name or "")):
            yield node, names


def _check_source(node: ir.Node, names: tuple[str, ...], checkpoint: Checkpoint) -> None:
    """The builder's float weight must be the checkpoint's, or our numbers would stand for something else."""
    source = torch.cat([checkpoint.weight(name) for name in names])
    if not np.array_equal(constant(node.inputs[1]), source.T.numpy()):
        raise AssayError(
            f"onnxruntime-genai's builder changed the weights of {', '.join(names)}: its graph does not hold the checkpoint's "
            "numbers, so ours cannot be put in their place. Please report the versions of onnxruntime-genai and transformers."
        )


def _check_fused(names: tuple[str, ...], chosen: list[QuantizedWeight]) -> None:
    if len(chosen) != len(names) or len({weight.scheme for weight in chosen}) != 1:
        raise NotSupportedError(
            f"onnxruntime-genai computes {', '.join(names)} as one product: they need the same scheme and group size. "
            "Let one override match all of them."
        )


def _keep_embedding(graph: ir.Graph, checkpoint: Checkpoint) -> None:
    """Store a float32 embedding in the checkpoint's own dtype, which is exact and half the size.

    An embedding that is the transposed head stays so while the head is still a float MatMul.
    """
    gather = next(
        (node for node in graph if node.op_type == "Gather" and (node.name or "").endswith("embed_tokens/Gather")), None
    )
    table = gather.inputs[0] if gather is not None else None
    embedding = checkpoint.stored(f"{checkpoint.shape.architecture.embedding}.weight")
    if gather is None or table is None or embedding.dtype == torch.float32:
        return
    transpose = table.producer()
    head = transpose.inputs[0] if transpose is not None else None
    if head is not None and len(head.uses()) > 1:
        return
    output, shape = gather.outputs[0], gather.outputs[0].shape
    exact = ir.node(
        "Gather", [initializer(graph, f"{_EMBEDDING}_exact", embedding), gather.inputs[1]], name=f"{gather.name}Exact"
    )
    cast = ir.node("Cast", [exact.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{gather.name}Cast")
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = output.name, shape, output.type
    graph.insert_before(gather, [exact, cast])
    ir.convenience.replace_all_uses_with(output, cast.outputs[0])
    graph.remove(gather, safe=True)
    if transpose is not None:
        graph.remove(transpose, safe=True)
    unused = head if head is not None else table
    del graph.initializers[unused.name or ""]


def _base_name(node: ir.Node) -> str:
    """ "model.layers.0.attn.qkv_proj.MatMul" from a weight node's second input."""
    name = node.inputs[1].name if node.inputs[1] is not None else None
    return re.sub(r"\.weight(_Q\d)?$", "", name or "")


def _copy_tokenizer(checkpoint: Checkpoint, destination: Path) -> None:
    """The tokenizer served is the source's, byte for byte; the builder writes its own rendering of it."""
    for name in TOKENIZER_FILES:
        (destination / name).unlink(missing_ok=True)
        if (checkpoint.directory / name).is_file():
            shutil.copyfile(checkpoint.directory / name, destination / name)
