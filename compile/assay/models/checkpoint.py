"""A float checkpoint on disk: a Hugging Face directory, read tensor by tensor from memory-mapped safetensors.

Nothing is unpickled, no model code is run, and a tensor that holds NaN or infinity stops the job by its name.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from assay.errors import AssayError, IntegrityError, NotSupportedError, UsageError
from assay.files import read_json
from assay.models.architectures import DecoderShape, decoder_shape, read_config

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
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Checkpoint:
    """A directory with config.json, safetensors and tokenizer files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: dict[str, Any] = read_config(directory)
        if settings := self.config.get("quantization_config"):
            kind = (settings.get("quant_method") if isinstance(settings, dict) else None) or "an unknown method"
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
        single, index = self.directory / SINGLE, self.directory / INDEX
        if single.is_file():
            with self._open(single) as tensors:
                return dict.fromkeys(tensors.keys(), single)
        if not index.is_file():
            pickled = sorted(path.name for path in self.directory.glob("*.bin"))
            hint = f" {pickled[0]} is a pickle, which Assay never loads: convert it to safetensors." if pickled else ""
            raise UsageError(f"{self.directory}: no {SINGLE} and no {INDEX}.{hint}")
        files = {name: self.directory / file for name, file in _weight_map(index).items()}
        for missing in sorted({path for path in files.values() if not path.is_file()}):
            raise IntegrityError(f"{missing}: named by {INDEX} but not there; the download is not complete.")
        return files

    def check(self) -> None:
        """IntegrityError unless every file is whole and holds what the index says, and every matrix is there; reads headers only.

        Asked before any other tool sees the directory: they would load a pickle, or fail in their own words.
        """
        held: dict[Path, set[str]] = {}
        for path in sorted(set(self.files.values())):
            with self._open(path) as tensors:
                held[path] = set(tensors.keys())
        for name, path in self.files.items():
            if name not in held[path]:
                raise IntegrityError(f"{path}: lacks the tensor {name}, which {INDEX} places there.")
        modules = [self.shape.architecture.embedding, *(linear.name for linear in self.shape.linears)]
        if self.shape.tied_embeddings:
            modules.remove(self.shape.architecture.head)
        for module in modules:
            if f"{module}.weight" not in self.files:
                raise IntegrityError(f"{self.directory}: the tensor {module}.weight is missing from the checkpoint.")

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights as stored."""
        name = f"{self.shape.architecture.embedding}.weight"
        dtype = self._read(name).dtype
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    def weight(self, module: str) -> Tensor:
        """The weight of a Linear or of the embedding as float32 [out, in]; the head of tied embeddings is the embedding."""
        sizes = {linear.name: (linear.out_features, linear.in_features) for linear in self.shape.linears}
        sizes[self.shape.architecture.embedding] = (self.shape.vocabulary, self.shape.hidden_size)
        return self.tensor(f"{module}.weight", sizes[module])

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as float32, checked to be of this shape and finite."""
        head = f"{self.shape.architecture.head}.weight"
        if name == head and name not in self.files and self.shape.tied_embeddings:
            name = f"{self.shape.architecture.embedding}.weight"
        stored = self._read(name)
        if tuple(stored.shape) != shape:
            raise IntegrityError(
                f"{self.files[name]}: the tensor {name} has the shape {list(stored.shape)}, but config.json makes it "
                f"{list(shape)}; they do not belong together."
            )
        if stored.dtype not in _FLOATS:
            raise NotSupportedError(
                f"{self.files[name]}: the tensor {name} is stored as {str(stored.dtype).removeprefix('torch.')}, as in a "
                "quantized checkpoint; start from the original float weights."
            )
        values = stored.float()
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise AssayError(
                f"{self.files[name]}: the tensor {name} holds {bad} values that are NaN or infinite; the checkpoint is damaged."
            )
        return values

    def stored(self, name: str) -> Tensor:
        """One tensor in the dtype it is stored in."""
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        if name not in self.files:
            raise IntegrityError(f"{self.directory}: the tensor {name} is missing from the checkpoint.")
        with self._open(self.files[name]) as tensors:
            if name not in set(tensors.keys()):
                raise IntegrityError(f"{self.files[name]}: lacks the tensor {name}, which {INDEX} places there.")
            return tensors.get_tensor(name)

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise IntegrityError(
                f"{path}: not a complete safetensors file ({error}); fetch the model again."
            ) from error


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name of a sharded checkpoint."""
    content = read_json(index)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    names = list(placed.values()) if isinstance(placed, dict) else [None]
    if not all(isinstance(name, str) and name == PurePosixPath(name).name for name in names):
        raise IntegrityError(f"{index}: damaged: weight_map does not name a file beside it for each tensor.")
    return cast(dict[str, str], placed)
