"""What every registry can do, whatever it is made of: a directory, a server, a bucket.

A registry holds repositories, one per NAME.  A repository holds blobs, named by their digest; manifests (of a model, or
of what is said about one); and tags, which name models.  `open.py` finds the registry of an address.

To say something about a model (evidence, a signature, a promotion), attach it.  Its manifest becomes a referrer of the
model: its `subject` is the model, its `artifactType` says what kind of statement it is, its layers hold the content.

    statement = Attachment(STATEMENT_TYPE, (part("statement.json", "application/json", data),), {"dev.assay.x": "y"})
    repository.commit(repository.read_manifest(model), [statement])        # and tags=("stable",) to name the model, too

To read what is said, ask for the kind.  A registry is not believed: whoever reads checks that the subject is the model.

    for found in repository.referrers(model.digest, STATEMENT_TYPE):       # descriptors, with the manifest's annotations
        manifest = read_attachment(repository, found, model)               # IntegrityError when it is about something else
        data = repository.read_json_blob(manifest.layers[0])
"""

from __future__ import annotations

import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Self, final

from assay.errors import IntegrityError
from assay.files import copy_bytes, sha256_file
from assay.registry.oci import (
    EMPTY_JSON,
    EMPTY_TYPE,
    MANIFEST_TYPE,
    MAX_JSON_BYTES,
    TITLE,
    Descriptor,
    Manifest,
    copy_verified,
    describe,
    parse_manifest,
)
from assay.registry.reference import Reference


@dataclass(frozen=True)
class Part:
    """A blob to store: what it is, and its bytes or the file that has them."""

    descriptor: Descriptor
    content: bytes | Path


def part(name: str, media_type: str, content: bytes | Path) -> Part:
    """A layer with a file name; hashes the content."""
    if isinstance(content, Path):
        digest, size = sha256_file(content), content.stat().st_size
    else:
        plain = describe(content, media_type)
        digest, size = plain.digest, plain.size
    return Part(Descriptor(media_type, digest, size, {TITLE: name}), content)


@dataclass(frozen=True)
class Attachment:
    """What is said about a model: the kind of statement, its content, and the facts that a listing shows."""

    artifact_type: str
    parts: tuple[Part, ...]
    annotations: dict[str, str] = field(default_factory=dict[str, str])

    def manifest(self, subject: Descriptor) -> bytes:
        """The manifest that refers to `subject`, a model."""
        layers = tuple(part.descriptor for part in self.parts)
        plain = Descriptor(subject.media_type, subject.digest, subject.size, {}, subject.artifact_type)
        return Manifest(
            self.artifact_type, describe(EMPTY_JSON, EMPTY_TYPE), layers, self.annotations, plain
        ).to_bytes()

    def descriptor(self, subject: Descriptor) -> Descriptor:
        """What a registry lists among the referrers of `subject`: with the manifest's type and annotations."""
        plain = describe(self.manifest(subject), MANIFEST_TYPE)
        return Descriptor(MANIFEST_TYPE, plain.digest, plain.size, self.annotations, self.artifact_type)


@dataclass(frozen=True)
class Change:
    """What a commit did.

    model_is_new: whether this name lacked this model before.  tags_set: those that were new or moved.  attached:
    digests of the attachments' manifests that were not there before.  written: blobs and manifests that were stored.
    """

    model_is_new: bool
    tags_set: tuple[str, ...]
    attached: tuple[str, ...]
    written: int


class Repository(ABC):
    """One NAME in a registry.

    location: the registry, as messages name it.  Every reading method raises IntegrityError for bytes that are not
    what their descriptor promises, UsageError for what is not there, AssayError when the registry cannot be reached.
    streams: how many blobs are read at once to advantage.
    """

    streams = 1

    def __init__(self, location: str, name: str) -> None:
        self.location = location
        self.name = name

    # Reading

    @abstractmethod
    def models(self) -> tuple[tuple[str | None, Descriptor], ...]:
        """(tag, manifest) of every model; the tag is None for one that its digest alone leads to, where those can be listed."""

    @abstractmethod
    def resolve(self, reference: Reference) -> Descriptor:
        """The manifest of a model by tag or digest; UsageError says what there is instead."""

    @abstractmethod
    def referrers(self, digest: str, artifact_type: str | None = None) -> tuple[Descriptor, ...]:
        """The manifests whose subject is this model, of one kind or of all, oldest first where the registry keeps the order.

        Each has the manifest's artifactType and annotations, which are what the registry says: see `read_attachment`.
        """

    @abstractmethod
    def read_manifest(self, descriptor: Descriptor) -> bytes:
        """A manifest's bytes, verified."""

    @abstractmethod
    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> BinaryIO:
        """A blob's bytes from an offset on, not verified: `copy_blob` does that."""

    @abstractmethod
    def where(self, descriptor: Descriptor) -> str:
        """What messages call a blob: its path or its address."""

    @abstractmethod
    def strangers(self, model: Descriptor) -> tuple[str, ...]:
        """Files that lie where a model's files lie and are not as it was published: added, changed or removed by others.

        A pull does not see them, and a loader that reads that place itself does.
        """

    @final
    def copy_blob(self, descriptor: Descriptor, sink: BinaryIO | None) -> None:
        """Copy a blob, verifying size and digest on the way; with no sink only verify.  Raises IntegrityError."""
        with self.open_blob(descriptor) as stream:
            copy_verified(stream, sink, descriptor, self.where(descriptor))

    @final
    def fetch(self, descriptor: Descriptor, path: Path, stop: threading.Event | None = None) -> int:
        """Copy a blob into a file, after what the file has of it, sync it, and verify what lies on the disk then.

        Returns the bytes that came from the registry.  A file that turns out to have begun with other bytes is begun
        anew once.  stop: when set, the copying ends, and what was copied stays.
        """
        moved = 0
        with _open_to_continue(path) as file:
            for last in (file.seek(0, io.SEEK_END) == 0, True):
                start = file.seek(0, io.SEEK_END)
                if start < descriptor.size or start == 0:
                    with self.open_blob(descriptor, start) as stream:
                        # One byte more than promised, if there is one: it shows.
                        moved += copy_bytes(stream, file, descriptor.size - start + 1, stop)
                if stop and stop.is_set():
                    return moved
                file.flush()
                # Synced here and not at the end of a pull: the disk writes while other files are on their way.
                os.fsync(file.fileno())
                file.seek(0)
                try:
                    copy_verified(file, None, descriptor, str(path))
                    return moved
                except IntegrityError as error:
                    damage = error
                if last:
                    break
                file.truncate(0)
        self.copy_blob(descriptor, None)
        raise IntegrityError(f"{damage} In the registry they are right ({self.where(descriptor)}). Check this disk.")

    @final
    def read_json_blob(self, descriptor: Descriptor) -> bytes:
        """A small blob's bytes, verified; IntegrityError when it is damaged or larger than MAX_JSON_BYTES."""
        check_json_size(descriptor)
        sink = io.BytesIO()
        self.copy_blob(descriptor, sink)
        return sink.getvalue()

    # Writing

    @abstractmethod
    def check_tags(self, digest: str, tags: Sequence[str], *, force: bool = False) -> None:
        """UsageError when a commit of this model could not set these tags: asked before gigabytes are stored."""

    @abstractmethod
    def put(self, part: Part) -> bool:
        """Store a blob; True when bytes were written, False when they were there already.

        Raises IntegrityError when the bytes are not what the descriptor promises.
        """

    @final
    def commit(
        self, model: bytes, attachments: Sequence[Attachment] = (), tags: Sequence[str] = (), *, force: bool = False
    ) -> Change:
        """Name a model whose blobs are all stored: its manifest, then what is said about it, and last its tags.

        Doing so again changes nothing.  A tag that reads as a version does not move without `force`: UsageError.
        Where a registry can, all of it happens in one step; elsewhere each step leaves the registry sound.
        """
        written = 0
        for attachment in attachments:
            blobs = (Part(describe(EMPTY_JSON, EMPTY_TYPE), EMPTY_JSON), *attachment.parts)
            written += sum(self.put(part) for part in blobs)
        change = self._name(model, attachments, tags, force)
        return Change(change.model_is_new, change.tags_set, change.attached, change.written + written)

    @abstractmethod
    def _name(self, model: bytes, attachments: Sequence[Attachment], tags: Sequence[str], force: bool) -> Change:
        """The part of `commit` after the attachments' blobs are stored."""


class Registry(ABC):
    """Repositories at one address.  location: the address, as messages name it."""

    location: str

    @classmethod
    @abstractmethod
    def open(cls, address: Path | str) -> Self:
        """The registry at an address, to read; UsageError when there is none."""

    @classmethod
    @abstractmethod
    def create(cls, address: Path | str) -> Self:
        """The registry at an address, to write; made where registries are made by writing to them."""

    @classmethod
    @abstractmethod
    def check(cls, address: Path | str) -> None:
        """Raise what `create` and writing would raise, as far as can be told without writing: asked before hours of work."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The NAMEs of all repositories, sorted; NotSupportedError where a registry does not tell."""

    @abstractmethod
    def repository(self, name: str) -> Repository:
        """One repository; it need not exist yet."""

    @abstractmethod
    def holding(self, digest: str) -> Repository:
        """A repository that has the model with this digest; NotSupportedError where that can only be asked by name."""


def _open_to_continue(path: Path) -> BinaryIO:
    """Open a file to read and write, never through a link; made when there is none."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")


def check_json_size(descriptor: Descriptor) -> None:
    """IntegrityError for JSON that is too long to be read into memory."""
    if descriptor.size > MAX_JSON_BYTES:
        raise IntegrityError(
            f"{descriptor.digest}: {descriptor.size} bytes of JSON; at most {MAX_JSON_BYTES} are read."
        )


def read_attachment(repository: Repository, found: Descriptor, model: Descriptor) -> Manifest:
    """The manifest of an attachment; IntegrityError unless it is about this model and of the kind it was listed as."""
    where = f"{repository.location}: {found.digest}"
    manifest = parse_manifest(repository.read_manifest(found), where)
    if manifest.subject is None or (manifest.subject.digest, manifest.subject.size) != (model.digest, model.size):
        raise IntegrityError(f"{where}: its subject is not {model.digest}.")
    if found.artifact_type not in (None, manifest.artifact_type):
        raise IntegrityError(f"{where}: listed as {found.artifact_type!r}, but is {manifest.artifact_type!r}.")
    if manifest.config.digest != describe(EMPTY_JSON, EMPTY_TYPE).digest:
        raise IntegrityError(f"{where}: not an attachment: its config is not empty.")
    return manifest
