"""Small artifacts of every target: what serving reads of one is its manifest and its configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.files import readable_json

MakeArtifact = Callable[..., Path]
_TENSORS = {
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]},
        {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "sequence"]},
    ],
    "outputs": [{"name": "last_hidden_state", "dtype": "float32", "shape": ["batch", "sequence", 384]}],
}
_FILES: dict[str, dict[str, bytes]] = {
    "onnxruntime-genai": {"model.onnx": b"graph", "model.onnx.data": b"weights", "genai_config.json": b'{"model":{}}'},
    "onnxruntime": {"model.onnx": b"graph", "model.onnx.data": b"weights"},
    "tensorrt": {"model.plan": b"engine", "model.onnx": b"graph"},
}


@pytest.fixture
def make_artifact(tmp_path: Path) -> MakeArtifact:
    """make_artifact("name", target="awq", scheme="W4A16", cache=True, **keys of its manifest)."""

    def make(
        name: str = "m",
        *,
        target: str = "compressed-tensors",
        scheme: str = "FP8_DYNAMIC",
        cache: bool = False,
        shape: tuple[int, int] = (128, 128),
        **about: Any,
    ) -> Path:
        manifest = {
            "version": 1,
            "name": name,
            "target": target,
            "device": "cpu",
            "scheme": scheme,
            "precision": "bfloat16",
            "architecture": "LlamaForCausalLM",
            "layers": [{"name": "model.layers.0.mlp.up_proj", "shape": list(shape), "scheme": scheme}],
        }
        if target in ("onnxruntime", "tensorrt"):
            manifest |= _TENSORS
        quantization = {"quant_method": target, "kv_cache_scheme": {"num_bits": 8} if cache else None}
        files = _FILES.get(target, {"model.safetensors": b"weights"}) | {
            "config.json": readable_json({"model_type": "llama", "quantization_config": quantization}),
            "tokenizer.json": b"{}",
            "manifest.json": readable_json(manifest | about),
            "assay.lock.json": readable_json({"version": 1}),
        }
        directory = tmp_path / name
        directory.mkdir()
        for file, data in files.items():
            (directory / file).write_bytes(data)
        return directory

    return make
