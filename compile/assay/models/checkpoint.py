"""A float checkpoint on disk: a Hugging Face directory, read tensor by tensor from memory-mapped safetensors.

Tensors have the names of the Hub. A checkpoint that transformers saved in its own layout, with all experts of a layer fused into one
tensor, is read as if it had them: each part when it is asked for.

Nothing is unpickled, no model code is run, and a tensor that holds NaN or infinity stops the job by its name.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from assay.errors import AssayError, IntegrityError, NotSupportedError, UsageError
from assay.files import read_json
from assay.models.architectures import DecoderShape, already_quantized, decoder_shape, quantized_by, read_config

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
_VALUES_AT_ONCE = 1 << 24
# transformers' tensors of all experts of a layer, and the Linears that are stacked in each.
_FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: the file, its name there, and which part of a fused tensor of the shape `whole` it is, if it is one."""

    file: Path
    name: str
    part: tuple[int | slice, ...] = ()
    whole: tuple[int, ...] = ()


class Checkpoint:
    """A directory with config.json, safetensors and tokenizer files."""

    def __init__(
        self, directory: Path, shape_of: Callable[[Mapping[str, Any], str], DecoderShape] = decoder_shape
    ) -> None:
        self.directory = directory
        self.config: dict[str, Any] = read_config(directory)
        if method := quantized_by(self.config):
            raise NotSupportedError(f"{directory}: {already_quantized(method)}")
        self.shape: DecoderShape = shape_of(self.config, str(directory))
        if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer.model").is_file():
            raise UsageError(f"{directory}: no tokenizer.json or tokenizer.model; the tokenizer belongs to the model.")

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name → the safetensors file that holds it."""
        return {name: place.file for name, place in self._places.items()}

    def check(self) -> None:
        """IntegrityError unless every file is whole and holds what the index says, and every matrix is there; reads headers only.

        Asked before any other tool sees the directory: they would load a pickle, or fail in their own words.
        """
        held: dict[Path, set[str]] = {}
        for path in sorted(set(self.files.values())):
            with open_tensors(path) as tensors:
                held[path] = set(tensors.keys())
        for name, path in self.files.items():
            if (stored := self._places[name].name) not in held[path]:
                raise IntegrityError(f"{path}: lacks the tensor {stored}, which {INDEX} places there.")
        modules = [
            self.shape.architecture.embedding,
            *(linear.name for linear in self.shape.linears),
            *self.shape.routers,
        ]
        if self.shape.tied_embeddings:
            modules.remove(self.shape.architecture.head)
        for module in modules:
            if f"{module}.weight" not in self.files:
                raise IntegrityError(f"{self.directory}: the tensor {module}.weight is missing from the checkpoint.")

    @cached_property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weights as stored."""
        name = f"{self.shape.architecture.embedding}.weight"
        dtype = self._read(name).dtype
        return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32

    def weight(self, module: str) -> Tensor:
        """The weight of a Linear or of the embedding as float32 [out, in]; the head of tied embeddings is the embedding."""
        return self.tensor(f"{module}.weight", self.shape.sizes[module])

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as float32, checked to be of this shape and finite."""
        head = f"{self.shape.architecture.head}.weight"
        if name == head and name not in self.files and self.shape.tied_embeddings:
            name = f"{self.shape.architecture.embedding}.weight"
        stored = self._read(name)
        if tuple(stored.shape) != shape:
            raise _misshapen(self.files[name], name, stored.shape, shape)
        if stored.dtype not in FLOATS:
            raise NotSupportedError(
                f"{self.files[name]}: the tensor {name} is stored as {str(stored.dtype).removeprefix('torch.')}, as in a "
                "quantized checkpoint; start from the original float weights."
            )
        values = stored.float()
        # In pieces: of a large embedding, what PyTorch makes on the way would be most of a job's memory.
        if bad := sum(int((~torch.isfinite(piece)).sum()) for piece in values.flatten().split(_VALUES_AT_ONCE)):
            raise AssayError(
                f"{self.files[name]}: the tensor {name} holds {bad} values that are NaN or infinite; the checkpoint is damaged."
            )
        return values

    def stored(self, name: str) -> Tensor:
        """One tensor in the dtype it is stored in."""
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        if name not in self._places:
            raise IntegrityError(f"{self.directory}: the tensor {name} is missing from the checkpoint.")
        place = self._places[name]
        with open_tensors(place.file) as tensors:
            if place.name not in set(tensors.keys()):
                raise IntegrityError(f"{place.file}: lacks the tensor {place.name}, which {INDEX} places there.")
            if not place.part:
                return tensors.get_tensor(place.name)
            fused = tensors.get_slice(place.name)
            if tuple(fused.get_shape()) != place.whole:
                raise _misshapen(place.file, place.name, fused.get_shape(), place.whole)
            return fused[place.part]

    @cached_property
    def _places(self) -> dict[str, _Place]:
        """Where each tensor is, by its name on the Hub."""
        return {
            name: place
            for stored, file in stored_files(self.directory).items()
            for name, place in self._held(stored, file)
        }

    def _held(self, stored: str, file: Path) -> Iterator[tuple[str, _Place]]:
        """The tensors that a stored tensor stands for: itself, or a part of it for each expert of a layer."""
        row, sizes = self.shape.architecture, self.shape.sizes
        path, _, fused = row.module_path(stored).rpartition(".")
        if row.experts is None or not path.endswith(f".{row.experts.path}") or fused not in _FUSED:
            yield row.hub_name(_modern(stored)), _Place(file, stored)
            return
        layer, matrices, count = path.removesuffix(row.experts.path), _FUSED[fused], max(self.shape.experts)
        for expert, (position, matrix) in product(range(count), enumerate(matrices)):
            module = row.hub_name(layer + row.experts.linear(expert, matrix))
            if module in sizes:
                rows, columns = sizes[module]
                part = (expert, slice(position * rows, (position + 1) * rows))
                yield f"{module}.weight", _Place(file, stored, part, (count, len(matrices) * rows, columns))


def stored_files(directory: Path) -> dict[str, Path]:
    """Tensor name as stored → the safetensors file that holds it."""
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        with open_tensors(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if not index.is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        hint = f" {pickled[0]} is a pickle, which Assay never loads: convert it to safetensors." if pickled else ""
        raise UsageError(f"{directory}: no {SINGLE} and no {INDEX}.{hint}")
    files = {name: directory / file for name, file in _weight_map(index).items()}
    for missing in sorted({path for path in files.values() if not path.is_file()}):
        raise IntegrityError(f"{missing}: named by {INDEX} but not there; the download is not complete.")
    return files


def open_tensors(path: Path) -> Any:
    """A safetensors file, memory-mapped; IntegrityError when it is not whole."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path}: not a complete safetensors file ({error}); fetch the model again.") from error


def copy_tokenizer(directory: Path, destination: Path) -> None:
    """Begin a model's directory with the tokenizer's files of another, byte for byte."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, destination / name)


def _modern(name: str) -> str:
    """BERT checkpoints of 2018 call a LayerNorm's parameters gamma and beta."""
    return re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda match: {"gamma": "weight", "beta": "bias"}[match[1]], name)


def _misshapen(file: Path, name: str, found: Iterable[int], wanted: Iterable[int]) -> IntegrityError:
    return IntegrityError(
        f"{file}: the tensor {name} has the shape {list(found)}, but config.json makes it {list(wanted)}; they do not belong "
        "together."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name of a sharded checkpoint."""
    content = read_json(index)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    names = list(placed.values()) if isinstance(placed, dict) else [None]
    if not all(isinstance(name, str) and name == PurePosixPath(name).name for name in names):
        raise IntegrityError(f"{index}: damaged: weight_map does not name a file beside it for each tensor.")
    return cast(dict[str, str], placed)
