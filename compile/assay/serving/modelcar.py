"""A modelcar: an artifact as a container image whose layers hold models/<file>, for platforms that mount images and not ModelPacks.

One uncompressed tar layer a file, so that versions share what they share. No times, owners or programs in it: the same artifact gives
the same image. An image that is mounted as a volume needs no more; KServe's older `oci://`, which runs the image as a side container,
needs a shell in it and does not work with this one.
Source: OCI image specification 1.1 (image-layout.md, layer.md, config.md); KServe 0.20 (`oci+native://`, subPath models).
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.errors import IntegrityError
from assay.files import CHUNK_BYTES, atomic_directory, canonical_json, list_files, sha256_bytes

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_MODELPACK = "dev.assay.modelpack.digest"
_ROOT = "models"


@dataclass(frozen=True)
class Modelcar:
    """An image in a layout directory: its digest, its tag there, and its size."""

    layout: Path
    tag: str
    digest: str
    size_bytes: int


def write_modelcar(artifact: Path, layout: Path, tag: str, modelpack: str) -> Modelcar:
    """Write an OCI image layout with one image. It needs as much room again as the artifact, whose bytes it holds in tar files.

    modelpack: the digest of the artifact's manifest, which the image is annotated with.  Raises AssayError when the disk is full.
    """
    with atomic_directory(layout) as directory:
        blobs = directory / "blobs/sha256"
        blobs.mkdir(parents=True)
        layers = [_put_layer(blobs, artifact, name) for name in list_files(artifact)]
        config = _put(blobs, _CONFIG, canonical_json(_image_config(layers)))
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": config,
            "layers": layers,
            "annotations": {_MODELPACK: modelpack},
        }
        described = _put(blobs, _MANIFEST, canonical_json(manifest))
        tagged = described | {"annotations": {"org.opencontainers.image.ref.name": tag}}
        index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [tagged]}
        (directory / "index.json").write_bytes(canonical_json(index))
        (directory / "oci-layout").write_bytes(canonical_json({"imageLayoutVersion": "1.0.0"}))
    size = sum(layer["size"] for layer in layers) + config["size"] + described["size"]
    return Modelcar(layout, tag, described["digest"], size)


def _image_config(layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    }


def _put(blobs: Path, media_type: str, data: bytes) -> dict[str, Any]:
    digest = sha256_bytes(data)
    (blobs / digest.removeprefix("sha256:")).write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _put_layer(blobs: Path, artifact: Path, name: str) -> dict[str, Any]:
    """A tar of one file below models/, written and hashed in one pass."""
    path = blobs / "layer.tmp"
    with path.open("wb") as sink:
        hashing = _Hashing(sink)
        with tarfile.open(fileobj=hashing, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK_BYTES) as tar:
            parents = Path(_ROOT, name).parents
            for parent in sorted(str(parent) for parent in parents if str(parent) != "."):
                tar.addfile(_entry(parent, tarfile.DIRTYPE, 0o755))
            entry = _entry(f"{_ROOT}/{name}", tarfile.REGTYPE, 0o644)
            source = artifact / name
            entry.size = source.stat().st_size
            with source.open("rb") as content:
                try:
                    tar.addfile(entry, content)
                except OSError as error:
                    if error.errno is None:
                        raise IntegrityError(f"{source}: changed while it was read.") from error
                    raise
    digest = "sha256:" + hashing.digest.hexdigest()
    path.rename(blobs / digest.removeprefix("sha256:"))
    return {"mediaType": _LAYER, "digest": digest, "size": hashing.size}


def _entry(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.mtime = kind, mode, 0
    return entry


class _Hashing(io.RawIOBase):
    """Writes through to a file and hashes what passes."""

    def __init__(self, sink: io.BufferedWriter) -> None:
        self.digest, self.size = hashlib.sha256(), 0
        self._sink = sink

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._sink.write(data)
