"""The OCI words: descriptors and manifests, parsed strictly from bytes that nobody vouches for.

Source: OCI image-spec 1.1 (descriptor.md, manifest.md, image-layout.md).  Left out on purpose: platforms, digest
algorithms other than sha256, `urls` and inline `data` (bytes come from blobs only).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from assay.errors import IntegrityError
from assay.files import CHUNK_BYTES, canonical_json, sha256_bytes

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY_JSON = b"{}"
IN_TOTO_TYPE = "application/vnd.in-toto+json"
REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"

# What registries accept as a manifest; also our cap for every other JSON blob, read into memory before it is trusted.
MAX_JSON_BYTES = 4 << 20
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_BLOB_BYTES = 1 << 50


@dataclass(frozen=True)
class Descriptor:
    """What a blob is, how long it is, and the digest that names it."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = field(default_factory=dict[str, str])
    artifact_type: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The descriptor as OCI writes it; empty parts are left out."""
        value: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        if self.annotations:
            value["annotations"] = dict(self.annotations)
        return value


@dataclass(frozen=True)
class Manifest:
    """An OCI image manifest."""

    artifact_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str]
    subject: Descriptor | None = None

    def to_bytes(self) -> bytes:
        """The one spelling of this manifest, whose digest names it."""
        value: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": self.artifact_type,
            "config": self.config.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "annotations": self.annotations,
        }
        if self.subject:
            value["subject"] = self.subject.to_json()
        return canonical_json(value)


def describe(data: bytes, media_type: str) -> Descriptor:
    """The descriptor of bytes at hand."""
    return Descriptor(media_type, sha256_bytes(data), len(data))


def read_small(path: Path) -> bytes:
    """A file's bytes up to one more than `parse_json` accepts."""
    with path.open("rb") as stream:
        return stream.read(MAX_JSON_BYTES + 1)


def parse_json(data: bytes, where: str, limit_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse a JSON object; IntegrityError for anything else, for repeated keys, for NaN and when it is too long."""
    if len(data) > limit_bytes:
        raise IntegrityError(f"{where}: {len(data)} bytes of JSON; at most {limit_bytes} are read.")
    try:
        value = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: not the JSON that was expected ({error}).") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{where}: not a JSON object.")
    return cast("dict[str, Any]", value)


def parse_descriptor(value: Any, where: str) -> Descriptor:
    """Check a descriptor from outside; IntegrityError says which part is wrong."""
    if not isinstance(value, dict):
        raise IntegrityError(f"{where}: a descriptor must be an object.")
    parts = cast("dict[str, Any]", value)
    media_type, digest, size = parts.get("mediaType"), parts.get("digest"), parts.get("size")
    artifact_type = parts.get("artifactType")
    if not isinstance(media_type, str) or not media_type:
        raise IntegrityError(f"{where}: mediaType is {media_type!r}; a text is needed.")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise IntegrityError(f"{where}: digest is {digest!r}; allowed: sha256: and 64 hexadecimal digits.")
    if type(size) is not int or not 0 <= size <= _MAX_BLOB_BYTES:
        raise IntegrityError(f"{where}: size is {size!r}; allowed: 0 to {_MAX_BLOB_BYTES} bytes.")
    if artifact_type is not None and not isinstance(artifact_type, str):
        raise IntegrityError(f"{where}: artifactType is {artifact_type!r}; a text is needed.")
    return Descriptor(media_type, digest, size, _annotations(parts, where), artifact_type)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Check a manifest from outside; IntegrityError says which part is wrong."""
    value = parse_json(data, where)
    if value.get("schemaVersion") != 2 or value.get("mediaType") != MANIFEST_TYPE:
        raise IntegrityError(f"{where}: not an OCI image manifest ({MANIFEST_TYPE}, schemaVersion 2).")
    artifact_type, layers, subject = value.get("artifactType"), value.get("layers"), value.get("subject")
    if not isinstance(artifact_type, str):
        raise IntegrityError(f"{where}: artifactType is {artifact_type!r}; a text is needed.")
    if not isinstance(layers, list):
        raise IntegrityError(f"{where}: layers is not a list.")
    return Manifest(
        artifact_type,
        parse_descriptor(value.get("config"), f"{where}: config"),
        tuple(
            parse_descriptor(layer, f"{where}: layers[{index}]")
            for index, layer in enumerate(cast("list[Any]", layers))
        ),
        _annotations(value, where),
        None if subject is None else parse_descriptor(subject, f"{where}: subject"),
    )


def copy_verified(source: BinaryIO, sink: BinaryIO | None, descriptor: Descriptor, where: str) -> None:
    """Copy bytes, hashing them on the way; IntegrityError unless they are exactly what the descriptor promises.

    Reads at most one byte more than promised.  With no sink the bytes are only checked.
    """
    digest = hashlib.sha256()
    left = descriptor.size
    while chunk := source.read(min(CHUNK_BYTES, left + 1)):
        left -= len(chunk)
        if left < 0:
            raise IntegrityError(f"{where}: longer than the {descriptor.size} bytes that {descriptor.digest} promises.")
        digest.update(chunk)
        if sink is not None:
            sink.write(chunk)
    if left:
        raise IntegrityError(
            f"{where}: ends {left} bytes short of the {descriptor.size} that {descriptor.digest} promises."
        )
    if (found := f"sha256:{digest.hexdigest()}") != descriptor.digest:
        raise IntegrityError(f"{where}: its bytes have the digest {found}, promised was {descriptor.digest}.")


def _annotations(value: dict[str, Any], where: str) -> dict[str, str]:
    annotations = value.get("annotations")
    if annotations is None:
        return {}
    if not isinstance(annotations, dict):
        raise IntegrityError(f"{where}: annotations is not an object.")
    for key, text in cast("dict[str, Any]", annotations).items():
        if not isinstance(text, str):
            raise IntegrityError(f"{where}: the annotation {key!r} is {text!r}; a text is needed.")
    return cast("dict[str, str]", annotations)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        # Readers disagree on which of two equal keys counts: one could check the first and load the second.
        raise ValueError("a key is repeated")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
