"""An artifact: a directory of model files with its manifest and lock, named by the digest of all of its bytes.

    artifact/
      model.onnx, model.onnx.data, tokenizer.json, …   what the runtime loads
      manifest.json     what was done: scheme, precision realized per layer, fallbacks, bits per weight, how to run it
      assay.lock.json   what the recipe resolved to: source digests, calibration digest, seed, tool versions, host

Nothing in it depends on time: the same recipe on the same lock gives the same bytes. Evidence (measurements, verdict,
report) stands beside it and names it by its bundle digest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from assay.errors import IntegrityError
from assay.files import canonical_json, list_files, read_json, sha256_bytes, sha256_file

MANIFEST_NAME = "manifest.json"
LOCK_NAME = "assay.lock.json"
MANIFEST_VERSION = 1
# Keys that make a runtime load code: a native library from the model's directory (onnxruntime-genai), Python (transformers).
_CODE_KEYS = frozenset({"custom_ops_library", "auto_map"})
_CONFIGURATIONS = ("genai_config.json", "config.json")


def file_digests(directory: Path) -> dict[str, str]:
    """Name → sha256 of every file of an artifact directory, recomputed from the bytes."""
    return {name: sha256_file(directory / name) for name in list_files(directory)}


def bundle_digest(files: dict[str, str]) -> str:
    """The digest of an artifact: over its sorted names and the digests of their bytes."""
    return sha256_bytes(canonical_json(sorted(files.items())))


def directory_digest(directory: Path) -> str:
    """The bundle digest of a directory's bytes, recomputed."""
    return bundle_digest(file_digests(directory))


def size_bytes(directory: Path) -> int:
    """Bytes on disk of all files of an artifact."""
    return sum((directory / name).stat().st_size for name in list_files(directory))


def refuse_code(directory: Path) -> None:
    """IntegrityError when a configuration in an artifact directory asks its runtime to load code that lies beside it."""
    for path in (directory / name for name in _CONFIGURATIONS):
        if path.is_file() and (found := _CODE_KEYS & _keys(read_json(path))):
            raise IntegrityError(
                f"{path}: {min(found)} makes a runtime load code from the artifact, which is data only."
            )


def _keys(value: Any) -> set[str]:
    """Every key of nested JSON."""
    if isinstance(value, list):
        return {key for item in value for key in _keys(item)}
    if not isinstance(value, dict):
        return set()
    return set(value) | {key for item in value.values() for key in _keys(item)}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact directory; IntegrityError when there is none or it is of another version."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise IntegrityError(f"{directory}: no {MANIFEST_NAME}: this is not an artifact that Assay built.")
    return checked_manifest(read_json(path), str(path))


def checked_manifest(manifest: Any, where: str) -> dict[str, Any]:
    """A manifest's content as it was read; IntegrityError when it is of another version, or none."""
    if not isinstance(manifest, dict) or cast("dict[str, Any]", manifest).get("version") != MANIFEST_VERSION:
        raise IntegrityError(
            f"{where}: not a version {MANIFEST_VERSION} manifest; use the Assay release that wrote it."
        )
    return cast("dict[str, Any]", manifest)
