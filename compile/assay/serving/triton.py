"""NVIDIA Triton: a model repository with a config.pbtxt that leaves nothing to be completed, in which links lead to the artifact.

    repository/m/config.pbtxt
    repository/m/1/model.json                  backend vllm: the engine's arguments
    repository/m/1/model.onnx -> ../../../../m backend onnxruntime: a directory of this name, with model.onnx and its external data
    repository/m/1 -> ../../../m               backend tensorrt: a directory with model.plan

Source: Triton's `model_config.proto`, onnxruntime_backend `src/onnxruntime.cc` (a directory in place of model.onnx), vllm_backend
`src/model.py` (its inputs and outputs). Decoupled, because vLLM answers token by token; batches are vLLM's own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from assay.errors import IntegrityError, NotSupportedError
from assay.files import readable_json
from assay.serving import Served, ServingFiles
from assay.serving.pbtxt import Word, write_text
from assay.serving.vllm import OFFLINE

_REPOSITORY = "repository"
# What ONNX and numpy call a type → what Triton calls it.
_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
}
# Triton makes a batch of requests of one shape, up to so many rows.
_LARGEST_BATCH = 32
_TENSOR_NAME = re.compile(r"[\w./:-]{1,200}")


def serving_files(served: Served) -> ServingFiles:
    """A model repository of one model."""
    model = f"{_REPOSITORY}/{served.name}"
    target = str(served.manifest.get("target"))
    if target in ("onnxruntime", "tensorrt"):
        config = _tensor_config(served, target)
        link = f"{model}/1/model.onnx" if target == "onnxruntime" else f"{model}/1"
        files, links = {}, {link: _link(served, link)}
        environment: dict[str, str] = {}
    else:
        config, links, environment = _vllm_config(served), {}, OFFLINE
        files = {f"{model}/1/model.json": readable_json(_engine(served))}
    files[f"{model}/config.pbtxt"] = write_text(config).encode()
    command = ("tritonserver", "--model-repository", str(served.output / _REPOSITORY), "--http-port", str(served.port))
    command += ("--disable-auto-complete-config",)
    return ServingFiles(command, files, links, environment)


def _link(served: Served, name: str) -> str:
    """Where a link has to point: relative, unless the server sees the artifact somewhere else."""
    if served.at != str(served.directory):
        return served.at
    return os.path.relpath(served.directory, (served.output / name).parent)


def _engine(served: Served) -> dict[str, Any]:
    """vLLM's engine arguments; neither code nor pickles of the model are loaded."""
    cache = {"kv_cache_dtype": "fp8"} if served.quantized_cache else {}
    return {"model": served.at, "load_format": "safetensors", "trust_remote_code": False, **cache}


def _vllm_config(served: Served) -> dict[str, Any]:
    flags = ("exclude_input_in_output", "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
    optional = [
        ("stream", "TYPE_BOOL"),
        ("sampling_parameters", "TYPE_STRING"),
        *((flag, "TYPE_BOOL") for flag in flags),
    ]
    outputs = (
        ("text_output", "TYPE_STRING", -1),
        ("finish_reason", "TYPE_STRING", -1),
        ("num_input_tokens", "TYPE_UINT32", 1),
        ("num_output_tokens", "TYPE_UINT32", -1),
    )
    text = {"name": "text_input", "data_type": Word("TYPE_STRING"), "dims": [1]}
    return {
        **_head(served, "vllm"),
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        "input": [
            text,
            *({"name": name, "data_type": Word(kind), "dims": [1], "optional": True} for name, kind in optional),
        ],
        "output": [{"name": name, "data_type": Word(kind), "dims": [size]} for name, kind, size in outputs],
        "instance_group": [{"count": 1, "kind": Word("KIND_MODEL")}],
    }


def _tensor_config(served: Served, backend: str) -> dict[str, Any]:
    """A model of tensors: its own names, types and shapes, the batch in front where it is free in all of them."""
    inputs, outputs = (_tensors(served, key) for key in ("inputs", "outputs"))
    batched = all(dims and dims[0] == -1 for _, _, dims in (*inputs, *outputs))
    kind = "KIND_GPU" if backend == "tensorrt" or served.manifest.get("device") == "cuda" else "KIND_CPU"

    def described(tensors: list[tuple[str, str, list[int]]]) -> list[dict[str, Any]]:
        return [
            {"name": name, "data_type": Word(data_type), "dims": dims[1:] if batched else dims}
            for name, data_type, dims in tensors
        ]

    return {
        **_head(served, backend),
        "max_batch_size": _LARGEST_BATCH if batched else 0,
        "input": described(inputs),
        "output": described(outputs),
        **({"dynamic_batching": {"max_queue_delay_microseconds": 0}} if batched else {}),
        "instance_group": [{"count": 1, "kind": Word(kind)}],
    }


def _head(served: Served, backend: str) -> dict[str, Any]:
    parameters = {"key": "assay_digest", "value": {"string_value": served.digest}}
    return {"name": served.name, "backend": backend, "parameters": [parameters]}


def _tensors(served: Served, key: str) -> list[tuple[str, str, list[int]]]:
    """Name, Triton's type and dimensions (−1: any) of the manifest's inputs or outputs."""
    rows = served.manifest.get(key)
    if rows is None and served.manifest.get("target") == "onnxruntime":
        rows = _of_graph(served.directory / "model.onnx", key)
    if not isinstance(rows, list) or not rows:
        raise NotSupportedError(f"{served.directory}: its manifest.json names no {key}, which Triton has to be told.")
    tensors: list[tuple[str, str, list[int]]] = []
    for row in cast("list[Mapping[str, Any]]", rows):
        try:
            name, kind, shape = str(row["name"]), _TYPES[row["dtype"]], list(row["shape"])
        except (KeyError, TypeError) as error:
            raise IntegrityError(
                f"{served.directory}: manifest.json: {key} has a tensor that Triton cannot be told of: {row}."
            ) from error
        if not _TENSOR_NAME.fullmatch(name):
            raise IntegrityError(f"{served.directory}: manifest.json: {name!r} cannot name a tensor.")
        tensors.append((name, kind, [size if isinstance(size, int) and size > 0 else -1 for size in shape]))
    return tensors


def _of_graph(model: Path, key: str) -> list[dict[str, Any]]:
    """The same of a graph that its manifest does not tell of; its weights stay unread."""
    import onnx_ir as ir

    try:
        graph = ir.load(model).graph
    except Exception as error:
        raise IntegrityError(f"{model}: cannot be read as an ONNX model: {error}") from error
    return [
        {
            "name": value.name,
            "dtype": str(value.dtype.numpy()) if value.dtype is not None else None,
            "shape": None if value.shape is None else list(value.shape),
        }
        for value in (graph.inputs if key == "inputs" else graph.outputs)
    ]
