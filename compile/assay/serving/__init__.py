"""Serving stacks: what each needs beside an artifact, and the command that starts it. One file and one row each.

Files for a stack never go into the artifact's own directory: `assay verify` on that directory holds before and after.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from assay.errors import UsageError

if TYPE_CHECKING:
    from assay.recipe import Engine

CHECKPOINTS = ("compressed-tensors", "awq", "gptq", "modelopt")


@dataclass(frozen=True)
class Served:
    """What is to be served, and where.

    directory: of the artifact, absolute.  at: the same as the server sees it, which differs in a container.  output: where the files
    will lie.  name: what clients call the model.  digest: of its manifest.  manifest, config: manifest.json, and the config.json of a
    checkpoint.  storage, image: what was given, checked by the stacks that use it.
    """

    directory: Path
    at: str
    output: Path
    name: str
    digest: str
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    port: int
    storage: str | None = None
    image: str | None = None

    @property
    def pinned(self) -> str:
        """Name and digest: what clients can ask for when only these bytes will do."""
        return f"{self.name}@{self.digest}"

    @property
    def quantized_cache(self) -> bool:
        """Whether the checkpoint has scales for an FP8 key/value cache."""
        quantization = self.config.get("quantization_config")
        return isinstance(quantization, dict) and bool(cast("dict[str, Any]", quantization).get("kv_cache_scheme"))


@dataclass(frozen=True)
class ServingFiles:
    """What a stack gets.

    command: starts the server; may use files by their place in `Served.output`.  environment: it needs.  files: relative name → bytes.
    links: relative name → the directory that it points to.  local: whether the command runs a server on this machine.
    notes: sentences for whoever starts it.
    """

    command: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    local: bool = True
    notes: tuple[str, ...] = ()


class StackModule(Protocol):
    """What every stack's module offers."""

    def serving_files(self, served: Served) -> ServingFiles:
        """What to write for this stack, and the command; UsageError when something that it needs was not given."""
        ...


@dataclass(frozen=True)
class StackRow:
    """module: where it is implemented.  formats: the targets whose artifacts it can serve.  engine: what loads a checkpoint there, whose
    misreadings targets/refusals.py lists.  storage: forms of the address that it takes the artifact from; empty: from a directory.
    image: whether it starts a container, whose image can be chosen.
    """

    module: str
    formats: tuple[str, ...]
    engine: Engine | None = None
    storage: tuple[str, ...] = ()
    image: bool = False


STACKS = {
    "vllm": StackRow("assay.serving.vllm", CHECKPOINTS, "vllm"),
    "sglang": StackRow("assay.serving.sglang", CHECKPOINTS, "sglang"),
    "tensorrt-llm": StackRow("assay.serving.tensorrt_llm", CHECKPOINTS, "tensorrt-llm"),
    "onnxruntime-genai": StackRow("assay.serving.onnxruntime_genai", ("onnxruntime-genai",)),
    "triton": StackRow("assay.serving.triton", (*CHECKPOINTS, "onnxruntime", "tensorrt"), "vllm"),
    "kserve": StackRow(
        "assay.serving.kserve", CHECKPOINTS, "vllm", ("oci+native", "oci", "s3", "gs", "pvc", "hf", "https", "file")
    ),
    "truss": StackRow(
        "assay.serving.truss", CHECKPOINTS, "vllm", ("s3", "gs", "hf", "azure", "r2", "cw", "https"), image=True
    ),
    "bentoml": StackRow("assay.serving.bentoml", (*CHECKPOINTS, "onnxruntime-genai"), "vllm"),
    "compose": StackRow("assay.serving.compose", CHECKPOINTS, "vllm", image=True),
}


def stack_row(name: str) -> StackRow:
    """The row of a stack; UsageError lists them all."""
    if name not in STACKS:
        raise UsageError(f"there is no serving stack {name!r}; there are {', '.join(STACKS)}.")
    return STACKS[name]


def load_stack(name: str) -> StackModule:
    """Import a stack's module."""
    return cast(StackModule, importlib.import_module(stack_row(name).module))
