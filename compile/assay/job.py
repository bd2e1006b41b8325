"""A recipe resolved on this machine: where its model is, what its calibration tokens are, and the stages that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from assay.calibration import calibration_tokens, tokens_digest
from assay.errors import AssayError
from assay.files import canonical_json, sha256_bytes, sha256_file
from assay.host import cores, cpu_facts, package_versions
from assay.models.checkpoint import Checkpoint
from assay.models.gguf_convert import convert_gguf
from assay.models.source import HUB_PATTERNS, Located, locate
from assay.recipe import Recipe
from assay.text import Document, load_documents, texts_digest
from assay.workspace import Stage, Workspace

LOCK_VERSION = 1
# A change of these numbers makes cached stages of older releases stale.
_REVISIONS = {"source": 1, "quantize": 1, "baseline": 1, "candidate": 1}


@dataclass(frozen=True)
class Job:
    """Everything that the stages need, and the lock that names it."""

    recipe: Recipe
    base: Path
    located: Located
    checkpoint: Checkpoint
    tokens: Tensor
    lock: dict[str, Any]

    @property
    def quantize_stage(self) -> Stage:
        lock = self.lock
        facts = {
            "revision": _REVISIONS["quantize"],
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
            "revision": _REVISIONS["baseline"],
            "model": self.lock["model"]["digest"],
            "format": self.recipe.target.format,
            "tools": _some(self.lock["tools"], "transformers", "onnxruntime-genai", "onnx-ir", "torch"),
        }
        return Stage("baseline", facts)

    @property
    def candidate_stage(self) -> Stage:
        facts = {
            "revision": _REVISIONS["candidate"],
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
    checkpoint = Checkpoint(directory)
    documents = load_documents(recipe.calibration, "calibration", base)
    tokens = calibration_tokens(documents, load_tokenizer(directory), recipe.calibration)
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
    return Job(recipe, base, located, checkpoint, tokens, lock)


def evaluation_documents(job: Job) -> list[Document]:
    """The documents that quality is measured on."""
    return load_documents(job.recipe.evaluate.text, "evaluation", job.base)


def load_tokenizer(directory: Path) -> Any:
    """The model's own tokenizer, without running any code of the model."""
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise AssayError(f"{directory}: the tokenizer cannot be loaded ({error}).") from error


def _float_directory(located: Located, workspace: Workspace) -> Path:
    if not located.is_gguf:
        return located.path
    return workspace.build(source_stage(located.path), lambda partial: convert_gguf(located.path, partial))


def source_stage(gguf: Path) -> Stage:
    """The stage that makes a GGUF file a float checkpoint."""
    tools = _some(package_versions(), "torch", "transformers", "gguf", "safetensors")
    return Stage("source", {"revision": _REVISIONS["source"], "gguf": sha256_file(gguf), "tools": tools})


def _directory_digest(directory: Path) -> str:
    """Digest of the files that make a model; a README or a log beside them does not count."""
    digests = {
        path.name: sha256_file(path)
        for path in directory.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in HUB_PATTERNS)
    }
    return sha256_bytes(canonical_json(sorted(digests.items())))


def _some(versions: dict[str, str], *names: str) -> dict[str, str]:
    return {name: versions[name] for name in names if name in versions}
