"""Targets: a file format and the runtime that an artifact is compiled for. One file and one row each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast, get_args

from assay.recipe import FixedScheme, GroupedScheme

if TYPE_CHECKING:
    from assay.models.architectures import DecoderShape
    from assay.models.checkpoint import Checkpoint
    from assay.quantize.store import QuantizedLayer
    from assay.recipe import Recipe
    from assay.targets.realized import Realization, StoredLinear


class TargetModule(Protocol):
    """What every target's module offers."""

    def build_baseline(self, checkpoint: Checkpoint, destination: Path) -> None:
        """Write the unquantized model for this target's runtime."""
        ...

    def build_candidate(
        self,
        checkpoint: Checkpoint,
        quantized: QuantizedLayer,
        recipe: Recipe,
        baseline: Path,
        destination: Path,
    ) -> Realization:
        """Write the quantized model, read it back, and tell what it really holds."""
        ...

    def read_back(self, directory: Path, shape: DecoderShape) -> Mapping[str, StoredLinear]:
        """Every quantized Linear that a compiled directory holds, by module name."""
        ...


@dataclass(frozen=True)
class TargetRow:
    """module: where it is implemented.  runtime: what runs its artifacts.  baseline_dtype: what its unquantized weights are.

    What its format can say: schemes: those it can hold.  one_scheme: all quantized Linears have the same.  every_linear: those of the
    layers are all quantized.  float_head: the head is not.  words: codes fill int32 words along these sides of a weight.
    no_kv_cache: why the key/value cache cannot be quantized; empty where it can.  families: the model types that can be compiled;
    empty: all.  encoders: whether it takes those instead of decoders.
    """

    module: str
    runtime: str
    baseline_dtype: str
    schemes: tuple[str, ...]
    one_scheme: bool = False
    every_linear: bool = False
    float_head: bool = False
    words: tuple[Literal["outputs", "inputs"], ...] = ()
    no_kv_cache: str = ""
    families: tuple[str, ...] = ()
    encoders: bool = False


_SOURCE = "as the source"
_NO_PLACE = "has no place for the scales of a key/value cache"

TARGETS = {
    "onnxruntime-genai": TargetRow(
        "assay.targets.onnxruntime_genai",
        "onnxruntime-genai",
        "float32",
        get_args(GroupedScheme),
        no_kv_cache="keeps its key/value cache in floats",
        families=("llama", "mistral", "qwen2", "qwen3"),
    ),
    "onnxruntime": TargetRow(
        "assay.targets.onnxruntime",
        "onnxruntime",
        "float32",
        (*get_args(GroupedScheme), "W8A8", "W8A8_STATIC"),
        no_kv_cache="runs encoders, which have no key/value cache",
        encoders=True,
    ),
    "compressed-tensors": TargetRow(
        "assay.targets.compressed_tensors",
        "transformers",
        _SOURCE,
        (*get_args(GroupedScheme), *get_args(FixedScheme)),
    ),
    "awq": TargetRow(
        "assay.targets.awq",
        "transformers",
        _SOURCE,
        ("W4A16", "W4A16_ASYM"),
        one_scheme=True,
        float_head=True,
        words=("outputs",),
        no_kv_cache=_NO_PLACE,
    ),
    "gptq": TargetRow(
        "assay.targets.gptq",
        "transformers",
        _SOURCE,
        get_args(GroupedScheme),
        one_scheme=True,
        every_linear=True,
        words=("outputs", "inputs"),
        no_kv_cache=_NO_PLACE,
    ),
    "modelopt": TargetRow(
        "assay.targets.modelopt",
        "transformers",
        _SOURCE,
        ("FP8", "NVFP4"),
        one_scheme=True,
        float_head=True,
    ),
}


def load_target(name: str) -> TargetModule:
    """Import a target's module."""
    return cast(TargetModule, importlib.import_module(TARGETS[name].module))
