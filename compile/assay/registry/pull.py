"""Pull an artifact: every byte verified before anything appears at the destination.

A reference is resolved to a digest once; from there on only digests count.  Checked in this order: the manifest's
bytes, its names, its bundle digest, the config, each file while it is copied, and last the bundle digest of what now
lies on the disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.artifact import directory_digest, refuse_code
from assay.errors import IntegrityError, UsageError
from assay.files import atomic_directory, list_files
from assay.registry.base import Repository
from assay.registry.modelpack import Pack, check_config, read_pack
from assay.registry.oci import Descriptor
from assay.registry.open import open_repository


@dataclass(frozen=True)
class PulledFile:
    """One file of a pulled artifact."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class PullReceipt:
    """What a pull did.  created: False when the destination held exactly these bytes already."""

    reference: str
    digest: str
    bundle_digest: str
    destination: Path
    files: tuple[PulledFile, ...]
    size_bytes: int
    created: bool


@dataclass(frozen=True)
class Resolved:
    """A reference turned into verified manifest and config bytes."""

    repository: Repository
    descriptor: Descriptor
    pack: Pack
    config: dict[str, Any]


def pull(registry: Path | str, reference: str, destination: Path, *, force: bool = False) -> PullReceipt:
    """Pull an artifact into a directory that is absent or empty, or that holds this artifact already.

    force: replace whatever the destination holds.
    Raises UsageError when there is no such artifact or the destination holds other things, IntegrityError when any
    byte is not what was published, AssayError when the disk is full or cannot be written; the destination is then as
    it was.
    """
    resolved = resolve(registry, reference)
    pack = resolved.pack
    destination = Path(os.path.abspath(destination))  # noqa: PTH100  (resolve() would follow a link at the end)
    created = not _holds(destination, pack)
    if created:
        _check_destination(destination, force)
        with atomic_directory(destination) as directory:
            _copy_files(resolved.repository, pack, directory)
    return PullReceipt(
        reference=reference,
        digest=resolved.descriptor.digest,
        bundle_digest=pack.bundle_digest,
        destination=destination,
        files=tuple(PulledFile(name, layer.digest, layer.size) for name, layer in pack.layers.items()),
        size_bytes=pack.size_bytes,
        created=created,
    )


def resolve(registry: Path | str, reference: str) -> Resolved:
    """Find an artifact and check its manifest and config; raises UsageError when there is none, IntegrityError.

    registry: where to look, unless the reference is a whole address (oci://HOST/PATH/NAME:TAG).
    """
    repository, parsed = open_repository(registry, reference)
    descriptor = repository.resolve(parsed)
    where = f"{repository.location}: {parsed} ({descriptor.digest})"
    pack = read_pack(repository.read_manifest(descriptor), where)
    config = check_config(repository.read_json_blob(pack.config), pack, f"{where}: config")
    return Resolved(repository, descriptor, pack, config)


def _copy_files(repository: Repository, pack: Pack, directory: Path) -> None:
    for name, layer in pack.layers.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # "x": the directory is ours and fresh, so that a name that exists is an attack or a defect.
        with path.open("xb") as sink:
            repository.copy_blob(layer, sink)
    refuse_code(directory)
    # Read back: the digests so far are of bytes that were read, this one is of bytes that were written.
    if (written := directory_digest(directory)) != pack.bundle_digest:
        raise IntegrityError(
            f"{directory}: written were the bytes of {written}, promised {pack.bundle_digest}. Check this disk."
        )


def _holds(destination: Path, pack: Pack) -> bool:
    """Whether the destination has exactly the files of this artifact."""
    if destination.is_symlink() or not destination.is_dir():
        return False
    try:
        # Names first: hashing a large directory that cannot be the same would take minutes.
        return list_files(destination) == list(pack.layers) and directory_digest(destination) == pack.bundle_digest
    except IntegrityError:
        return False


def _check_destination(destination: Path, force: bool) -> None:
    """UsageError unless a directory can be put there without losing anything that was not given up by `force`."""
    if destination.is_symlink():
        raise UsageError(f"{destination}: a link. Give the directory itself.")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UsageError(f"{destination}: not a directory. Give a directory that is absent or empty.")
    if os.path.ismount(destination):
        # A rename cannot replace a mount point, and without a rename a reader could see half an artifact.
        raise UsageError(f"{destination}: a mount point. Give a directory inside of it: {destination / 'model'}.")
    if not force and any(destination.iterdir()):
        raise UsageError(
            f"{destination}: holds other files. Choose an absent or empty directory, or use force to replace it."
        )
