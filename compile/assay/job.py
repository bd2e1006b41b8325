"""A recipe resolved on this machine: where its model is, what its calibration tokens are, and the stages that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from assay.artifact import bundle_digest
from assay.calibration import calibration_tokens, framed_tokens, tokens_digest
from assay.errors import AssayError
from assay.files import canonical_json, sha256_bytes, sha256_file
from assay.host import code_digest, cores, cpu_facts, package_versions
from assay.models.checkpoint import Checkpoint
from assay.models.dequantized import write_dequantized
from assay.models.encoders import is_encoder, shape_of
from assay.models.gguf_convert import convert_gguf
from assay.models.sentence import POOLING_FILE
from assay.models.source import HUB_PATTERNS, Located, locate
from assay.recipe import Recipe
from assay.text import Document, load_documents, texts_digest
from assay.workspace import Stage, Workspace

LOCK_VERSION = 1
# What decides a baseline's bytes, by target.
_BUILDERS = {
    "": ("transformers", "onnxruntime-genai", "onnx-ir", "torch"),
    "onnxruntime": ("transformers", "onnxscript", "onnx-ir", "torch"),
}


@dataclass(frozen=True)
class Job:
    """Everything that the stages need, and the lock that names it."""

    recipe: Recipe
    base: Path
    located: Located
    checkpoint: Checkpoint
    tokens: Tensor
    lock: dict[str, Any]
    source_state: tuple[Any, ...]

    def check_source(self) -> None:
        """AssayError when the model's files were written to since they were hashed: what was read may be of two models."""
        if _state(self.checkpoint.directory) != self.source_state:
            raise AssayError(
                f"{self.checkpoint.directory}: the model's files changed while they were read. Run again when nobody writes to them."
            )

    @property
    def quantize_stage(self) -> Stage:
        lock = self.lock
        facts = {
            "code": code_digest("assay.quantize", "assay.models"),
            "model": lock["model"]["digest"],
            "calibration": lock["calibration"]["tokens_digest"],
            "settings": self.recipe.quantize.model_dump(mode="json"),
            "tools": _some(lock["tools"], "torch", "transformers"),
            "host": lock["host"],
        }
        return Stage("quantize", facts)

    @property
    def baseline_stage(self) -> Stage:
        facts = {
            "code": code_digest("assay.targets", "assay.models"),
            "model": self.lock["model"]["digest"],
            "format": self.recipe.target.format,
            "tools": _some(self.lock["tools"], *_BUILDERS.get(self.recipe.target.format, _BUILDERS[""])),
        }
        return Stage("baseline", facts)

    @property
    def candidate_stage(self) -> Stage:
        facts = {
            "code": code_digest("assay.build", "assay.targets", "assay.requirements"),
            "quantized": self.quantize_stage.key,
            "baseline": self.baseline_stage.key,
            "target": self.recipe.target.model_dump(mode="json"),
            "lock": sha256_bytes(canonical_json(self.lock)),
        }
        return Stage("candidate", facts)


def resolve(recipe: Recipe, base: Path, workspace: Workspace) -> Job:
    """Find or fetch the model, draw the calibration tokens, and write down what both are."""
    torch.set_num_threads(cores())
    located = locate(recipe.model, base)
    if located is None:
        raise AssayError(f"model.source {recipe.model.source}: not on this machine.")
    directory = _float_directory(located, workspace)
    source_state = _state(directory)
    checkpoint = Checkpoint(directory, shape_of)
    checkpoint.check()
    documents = load_documents(recipe.calibration, "calibration", base)
    tokenizer = load_tokenizer(directory)
    draw = framed_tokens if is_encoder(checkpoint.shape) else calibration_tokens
    tokens = draw(documents, tokenizer, recipe.calibration)
    lock = {
        "version": LOCK_VERSION,
        "recipe": {"name": recipe.name, "digest": recipe.digest(), "content": recipe.judged_content()},
        "model": {
            "source": recipe.model.source,
            "commit": located.commit,
            "digest": _directory_digest(directory),
            "architecture": checkpoint.shape.architecture.class_name,
        },
        "calibration": {
            "source": recipe.calibration.source,
            "documents": len(documents),
            "text_digest": texts_digest(documents),
            "tokens_digest": tokens_digest(tokens),
            "samples": recipe.calibration.samples,
            "length": recipe.calibration.length,
            "seed": recipe.calibration.seed,
        },
        "tools": package_versions(),
        "host": cpu_facts(),
    }
    return Job(recipe, base, located, checkpoint, tokens, lock, source_state)


def evaluation_documents(job: Job) -> list[Document]:
    """The documents that quality is measured on."""
    return load_documents(job.recipe.evaluate.text, "evaluation", job.base)


def load_tokenizer(directory: Path) -> Any:
    """The model's own tokenizer, without running any code of the model."""
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        # Any kind: the library behind it raises a bare Exception for what it cannot read.
        raise AssayError(f"{directory}: the tokenizer cannot be loaded ({type(error).__name__}: {error}).") from error


def _float_directory(located: Located, workspace: Workspace) -> Path:
    if located.is_float:
        return located.path
    convert = convert_gguf if located.is_gguf else write_dequantized
    return workspace.build(source_stage(located), lambda partial: convert(located.path, partial))


def source_stage(located: Located) -> Stage:
    """The stage that makes a GGUF file, or a quantized checkpoint, a float checkpoint."""
    tools = _some(package_versions(), "torch", "transformers", "gguf", "safetensors", "compressed-tensors")
    held = sha256_file(located.path) if located.is_gguf else _directory_digest(located.path)
    return Stage("source", {"code": code_digest("assay.models"), "model": held, "tools": tools})


def _directory_digest(directory: Path) -> str:
    """Digest of the files that make a model."""
    files = _model_files(directory)
    return bundle_digest({path.relative_to(directory).as_posix(): sha256_file(path) for path in files})


def _state(directory: Path) -> tuple[Any, ...]:
    """What changes when one of the model's files is written to."""
    stats = [(path.name, path.stat()) for path in _model_files(directory)]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _model_files(directory: Path) -> list[Path]:
    """The files that make a model; a README or a log beside them does not count."""
    pooling = directory / POOLING_FILE
    return sorted(
        path
        for path in (*directory.iterdir(), *([pooling] if pooling.is_file() else []))
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in HUB_PATTERNS)
    )


def _some(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: versions[name] for name in names if name in versions}
