"""Make the two artifacts that are compared: the unquantized baseline, and the candidate with its manifest and lock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from assay.artifact import LOCK_NAME, MANIFEST_NAME, MANIFEST_VERSION
from assay.files import readable_json
from assay.job import Job
from assay.models.architectures import quantized_by, read_config
from assay.quantize.model import quantize_model, walked_samples
from assay.quantize.schemes import assign_schemes, weight_scheme
from assay.quantize.store import LayerStore, QuantizedLayer
from assay.targets import TARGETS, load_target
from assay.targets.realized import Realization
from assay.workspace import Workspace


def build_baseline(job: Job, workspace: Workspace) -> Path:
    """The unquantized model for the target's runtime."""
    target = load_target(job.recipe.target.format)

    def make(directory: Path) -> None:
        with workspace.progress.stage("build baseline", 1) as advance:
            target.build_baseline(job.checkpoint, directory)
            job.check_source()
            advance()

    return workspace.build(job.baseline_stage, make)


def build_candidate(job: Job, workspace: Workspace) -> Path:
    """The quantized, compiled artifact with its manifest and lock."""
    target = load_target(job.recipe.target.format)

    def make(directory: Path) -> None:
        quantized, baseline = quantize(job, workspace), build_baseline(job, workspace)
        with workspace.progress.stage("compile", 1) as advance:
            realization = target.build_candidate(job.checkpoint, quantized, job.recipe, baseline, directory)
            (directory / MANIFEST_NAME).write_bytes(readable_json(artifact_manifest(job, quantized, realization)))
            (directory / LOCK_NAME).write_bytes(readable_json(job.lock))
            for path in directory.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            job.check_source()
            advance()

    return workspace.build(job.candidate_stage, make)


def quantize(job: Job, workspace: Workspace) -> QuantizedLayer:
    """Every quantized module, from the cache or computed, layer by layer."""

    def make(directory: Path) -> None:
        quantize_model(job.checkpoint, job.tokens, job.recipe.quantize, LayerStore(directory), workspace.progress)
        job.check_source()

    store = LayerStore(workspace.build(job.quantize_stage, make, resumable=True))
    return store.read_all(job.checkpoint.shape.layers + 1)


def artifact_manifest(job: Job, quantized: QuantizedLayer, realization: Realization) -> dict[str, Any]:
    """What was done and what came of it, for people and for whatever serves the artifact."""
    recipe, shape = job.recipe, job.checkpoint.shape
    rows = [row for row in realization.layers if row["bits_per_weight"] is not None]
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    bits = sum(row["bits_per_weight"] * row["shape"][0] * row["shape"][1] for row in rows)
    scheme = weight_scheme(recipe.quantize.scheme, recipe.quantize.group_size)
    in_layers = sum(linear.out_features * linear.in_features for linear in shape.linears)
    return {
        "version": MANIFEST_VERSION,
        "name": recipe.name,
        "target": recipe.target.format,
        "runtime": TARGETS[recipe.target.format].runtime,
        "device": recipe.target.device,
        "requires": dict(realization.requires),
        "scheme": recipe.quantize.scheme,
        "group_size": scheme.group_size or "channel",
        "method": recipe.quantize.method,
        "range": recipe.quantize.range,
        "architecture": shape.architecture.class_name,
        "source": job.lock["model"]["source"],
        "precision": str(job.checkpoint.weight_dtype).removeprefix("torch."),
        "parameters": shape.parameters,
        "bits_per_weight": round(bits / weights, 4),
        "coverage": round(weights / in_layers, 6),
        **realization.facts,
        "layers": list(realization.layers),
        "fallbacks": [*_notes(job, realization), *quantized.notes, *realization.fallbacks],
    }


def _notes(job: Job, realization: Realization) -> list[str]:
    """Everything that is not as the plain reading of the recipe: skipped layers, changed parameters."""
    notes: list[str] = []
    if job.located.dequantize:
        made = str(job.checkpoint.weight_dtype).removeprefix("torch.")
        notes.append(
            f"the source was quantized ({quantized_by(read_config(job.located.path))}) and was made {made} first: the baseline is that "
            "model, not the one it was made of."
        )
    schemes = assign_schemes(job.recipe.quantize, job.checkpoint.shape).schemes
    skipped = [linear.name for linear in job.checkpoint.shape.linears if linear.name not in schemes]
    if skipped:
        shown = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        notes.append(f"not quantized: {shown}.")
    samples = len(job.tokens)
    if (walked := walked_samples(job.recipe.quantize, job.checkpoint.shape, *job.tokens.shape)) < samples:
        notes.append(f"of {samples} calibration texts the first {walked} were used: rounding to nearest needs no more.")
    asked = getattr(job.recipe.quantize, "damping", None)
    notes += [
        f"{row['name']}: GPTQ's damping was raised from {asked:g} to {row['damping']:g} to invert the Gram matrix."
        for row in realization.layers
        if asked is not None and row.get("damping") is not None and row["damping"] > asked
    ]
    return notes
