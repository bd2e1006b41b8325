"""Pull an artifact: every byte verified before anything appears at the destination.

A reference is resolved to a digest once; from there on only digests count.  Checked in this order: the manifest's
bytes, its names, its bundle digest, the signatures that a policy asks for, the config, and each file as it lies on the
disk.  A pull that was killed, or that lost its server, goes on from the bytes it left; files that the destination has
already are not moved again.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.artifact import MANIFEST_NAME, checked_manifest, refuse_code
from assay.errors import IntegrityError, UnreachableError, UsageError
from assay.files import atomic_directory, list_files, remove, sha256_file
from assay.parallel import in_parallel
from assay.registry.base import Repository
from assay.registry.modelpack import Pack, check_config, read_pack
from assay.registry.oci import Descriptor, parse_json
from assay.registry.open import open_repository
from assay.registry.reference import Reference

if TYPE_CHECKING:
    from assay.registry.trust import Met


@dataclass(frozen=True)
class PulledFile:
    """One file of a pulled artifact."""

    name: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class PullReceipt:
    """What a pull did.  created: False when the destination held exactly these bytes already.

    moved_bytes: what came from the registry; less than size_bytes when an earlier pull, or what the destination held
    before, had some of it.
    """

    reference: str
    digest: str
    bundle_digest: str
    destination: Path
    files: tuple[PulledFile, ...]
    size_bytes: int
    moved_bytes: int
    created: bool
    trusted: tuple[Met, ...] | None


@dataclass(frozen=True)
class Resolved:
    """A reference turned into verified manifest and config bytes.  trusted: what of a policy it meets, None without one."""

    repository: Repository
    descriptor: Descriptor
    pack: Pack
    config: dict[str, Any]
    trusted: tuple[Met, ...] | None


# Called with an artifact's manifest.json and what messages call the artifact; raises to refuse it.
Accept = Callable[[Mapping[str, Any], str], None]


def pull(
    registry: Path | str,
    reference: str,
    destination: Path,
    *,
    force: bool = False,
    policy: Path | None = None,
    accept: Accept | None = None,
) -> PullReceipt:
    """Pull an artifact into a directory that is absent or empty, or that holds this artifact already.

    force: replace whatever the destination holds.  policy: a trust policy, which is met before any file is read.
    accept: may refuse the artifact before anything of it is copied.
    Raises UsageError when there is no such artifact or the destination holds other things, IntegrityError when any
    byte is not what was published, AssayError when the disk is full or cannot be written; the destination is then as
    it was.
    """
    resolved = resolve(registry, reference, policy)
    pack = resolved.pack
    if accept is not None:
        accept(read_model_manifest(resolved), str(reference))
    destination = Path(os.path.abspath(destination))  # noqa: PTH100  (resolve() would follow a link at the end)
    present = _present(destination, pack, force)
    created = present.keys() != pack.layers.keys() or list_files(destination) != sorted(pack.layers)
    moved = 0
    if created:
        _check_destination(destination, force)
        key = pack.bundle_digest.removeprefix("sha256:")[:16]
        with atomic_directory(destination, key, (UnreachableError, KeyboardInterrupt)) as directory:
            moved = _fill(directory, resolved, present)
    return PullReceipt(
        reference=reference,
        digest=resolved.descriptor.digest,
        bundle_digest=pack.bundle_digest,
        destination=destination,
        files=tuple(PulledFile(name, layer.digest, layer.size) for name, layer in pack.layers.items()),
        size_bytes=pack.size_bytes,
        moved_bytes=moved,
        created=created,
        trusted=resolved.trusted,
    )


def resolve(registry: Path | str, reference: str, policy: Path | None = None, channel: str | None = None) -> Resolved:
    """Find an artifact and check its manifest and config; raises UsageError when there is none, IntegrityError.

    registry: where to look, unless the reference is a whole address (oci://HOST/PATH/NAME:TAG).  policy: a trust policy;
    SignatureError when the artifact does not meet it, before any blob of it is read.  channel: of the policy, into which it must
    have been promoted; unless given, the reference's tag, when that is one.
    """
    repository, parsed = open_repository(registry, reference)
    descriptor = repository.resolve(parsed)
    where = f"{repository.location}: {parsed} ({descriptor.digest})"
    pack = read_pack(repository.read_manifest(descriptor), where)
    trusted = None if policy is None else _admit(repository, parsed, pack, policy, channel)
    config = check_config(repository.read_json_blob(pack.config), pack, f"{where}: config")
    return Resolved(repository, descriptor, pack, config, trusted)


def read_model_manifest(resolved: Resolved) -> dict[str, Any]:
    """An artifact's manifest.json, verified, without its other files; IntegrityError when it has none that this release reads."""
    where = f"{resolved.repository.location}: {resolved.descriptor.digest}: {MANIFEST_NAME}"
    layer = resolved.pack.layers.get(MANIFEST_NAME)
    manifest = parse_json(resolved.repository.read_json_blob(layer), where) if layer else {}
    return checked_manifest(manifest, where)


def _admit(
    repository: Repository, reference: Reference, pack: Pack, policy: Path, channel: str | None
) -> tuple[Met, ...]:
    # Imported here: most pulls have no policy, and cryptography takes a while.
    from assay.registry.attestations import admit
    from assay.registry.policy import load_policy

    return admit(repository, reference, pack, load_policy(policy), channel)


def _fill(directory: Path, resolved: Resolved, present: dict[str, Path]) -> int:
    """Make a directory hold exactly the files of an artifact; returns the bytes that came from the registry.

    directory: what an earlier pull of the same artifact left there is used.  present: intact copies of files.
    """
    repository, layers = resolved.repository, resolved.pack.layers
    _clear_strangers(directory, resolved.pack)
    for name in layers:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()

    def fetch(name: str) -> int:
        path = directory / name
        if name in present and not path.exists():
            shutil.copyfile(present[name], path)
        return repository.fetch(layers[name], path, stop)

    # Large files first: they decide when the last one is there.
    names = sorted(layers, key=lambda name: -layers[name].size)
    moved = sum(in_parallel(repository.streams, fetch, names, stop))
    if list_files(directory) != sorted(layers):
        raise IntegrityError(f"{directory}: somebody else writes to this directory. Pull again.")
    refuse_code(directory)
    return moved


def _clear_strangers(directory: Path, pack: Pack) -> None:
    """Empty a directory that holds anything but files of an artifact."""
    try:
        strange = not set(list_files(directory)) <= pack.layers.keys()
    except IntegrityError:
        strange = True
    if strange:
        for path in directory.iterdir():
            remove(path)


def _present(destination: Path, pack: Pack, force: bool) -> dict[str, Path]:
    """The files of an artifact that lie intact at the destination, by name.

    Without `force` only if all names are there: hashing a large directory that will be refused would take minutes.
    """
    if destination.is_symlink() or not destination.is_dir():
        return {}
    try:
        names = list_files(destination)
    except IntegrityError:
        return {}
    if not force and names != sorted(pack.layers):
        return {}
    candidates = {name: destination / name for name in names if name in pack.layers}
    return {
        name: path
        for name, path in candidates.items()
        if path.stat().st_size == pack.layers[name].size and sha256_file(path) == pack.layers[name].digest
    }


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
