"""A float checkpoint on disk: a Hugging Face directory, read tensor by tensor from memory-mapped safetensors.

Nothing is unpickled, no model code is run, and a tensor that holds NaN or infinity stops the job by its name.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from assay.errors import AssayError, IntegrityError, NotSupportedError, UsageError
from assay.files import read_json
from assay.models.architectures import DecoderShape, decoder_shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class Checkpoint:
    """A directory with config.json, safetensors and tokenizer files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / "config.json"
        if not path.is_file():
            raise UsageError(f"{directory}: no config.json; expected a Hugging Face model directory.")
        self.config: dict[str, Any] = read_json(path)
        if self.config.get("quantization_config"):
            kind = self.config["quantization_config"].get("quant_method", "an unknown method")
            raise NotSupportedError(
                f"{directory}: the checkpoint is already quantized ({kind}); quantizing it again would compound two errors. "
                "Start from the original weights."
            )
        self.shape: DecoderShape = decoder_shape(self.config, str(directory))
        if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer.model").is_file():
            raise UsageError(f"{directory}: no tokenizer.json or tokenizer.model; the tokenizer belongs to the model.")

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name → the safetensors file that holds it."""
        index = self.directory / INDEX
        if index.is_file():
            placed = read_json(index)["weight_map"]
            files = {name: self.directory / file for name, file in placed.items()}
        elif (self.directory / SINGLE).is_file():
            with self._open(self.directory / SINGLE) as tensors:
                files = dict.fromkeys(tensors.keys(), self.directory / SINGLE)
        else:
            pickled = sorted(path.name for path in self.directory.glob("*.bin"))
            hint = f" {pickled[0]} is a pickle, which Assay never loads: convert it to safetensors." if pickled else ""
            raise UsageError(f"{self.directory}: no {SINGLE} and no {INDEX}.{hint}")
        for missing in sorted({path for path in files.values() if not path.is_file()}):
            raise IntegrityError(f"{missing}: named by {INDEX} but not there; the download is not complete.")
        return files

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights as stored."""
        name = f"{self.shape.architecture.embedding}.weight"
        dtype = self._read(name).dtype
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    def weight(self, module: str) -> Tensor:
        """A module's weight as float32; the head of tied embeddings is the embedding."""
        return self.tensor(f"{module}.weight")

    def tensor(self, name: str) -> Tensor:
        """One tensor as float32, checked to be finite."""
        head = f"{self.shape.architecture.head}.weight"
        if name == head and name not in self.files and self.shape.tied_embeddings:
            name = f"{self.shape.architecture.embedding}.weight"
        values = self._read(name).float()
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise AssayError(
                f"{self.files[name]}: the tensor {name} holds {bad} values that are NaN or infinite; the checkpoint is damaged."
            )
        return values

    def names_below(self, prefix: str) -> list[str]:
        """Names of the tensors of one module and what is inside it."""
        return sorted(name for name in self.files if name.startswith(f"{prefix}."))

    def stored(self, name: str) -> Tensor:
        """One tensor in the dtype it is stored in."""
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        if name not in self.files:
            raise IntegrityError(f"{self.directory}: the tensor {name} is missing from the checkpoint.")
        with self._open(self.files[name]) as tensors:
            return tensors.get_tensor(name)

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise IntegrityError(
                f"{path}: not a complete safetensors file ({error}); fetch the model again."
            ) from error
