"""Repositories of a registry that says in one index what it holds, wherever that index and its blobs lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import final

from assay.errors import UsageError
from assay.registry.base import Attachment, Change, Part, Registry, Repository
from assay.registry.index import Index, Named
from assay.registry.modelpack import describe_model
from assay.registry.oci import MANIFEST_TYPE, Descriptor, describe
from assay.registry.reference import Reference


class IndexedRepository(Repository):
    """One NAME of an index.  reserved_tags: those that mean something else where the index lies."""

    reserved_tags: frozenset[str] = frozenset()

    @abstractmethod
    def read_index(self) -> Index:
        """What is published, as of now."""

    @final
    def models(self) -> tuple[tuple[str | None, Descriptor], ...]:
        return tuple((tag, descriptor) for _, tag, descriptor in self.read_index().models(self.name))

    @final
    def resolve(self, reference: Reference) -> Descriptor:
        return self.read_index().resolve(reference, self.location)

    @final
    def referrers(self, digest: str, artifact_type: str | None = None) -> tuple[Descriptor, ...]:
        found = self.read_index().referrers(digest)
        return tuple(descriptor for descriptor in found if artifact_type in (None, descriptor.artifact_type))

    @final
    def check_tags(self, digest: str, tags: Sequence[str], *, force: bool = False) -> None:
        if reserved := self.reserved_tags.intersection(tags):
            raise UsageError(f"{self.location}: {', '.join(reserved)} cannot be a tag here. Choose another word.")
        model = Descriptor(MANIFEST_TYPE, digest, 0)
        self.read_index().publish(self.name, tags, model, force=force, where=self.location)


class IndexedRegistry(Registry):
    """All NAMEs in one index, which changes in one step; they share their blobs."""

    @abstractmethod
    def index(self) -> Index:
        """What is published, as of now."""

    @abstractmethod
    def change(self, decide: Callable[[Index], Index]) -> None:
        """Replace the index by what `decide` makes of it, in one step; what it raises leaves everything as it was."""

    @final
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({name for name, _, _ in self.index().models()}))

    @final
    def holding(self, digest: str) -> Repository:
        index = self.index()
        index.resolve(Reference(None, None, digest), self.location)
        return self.repository(next(name for name, _, descriptor in index.models() if descriptor.digest == digest))

    @final
    def publish(
        self, name: str, tags: Sequence[str], model: Descriptor, attachments: Sequence[Descriptor] = (), *, force: bool
    ) -> Named:
        """Name blobs that are all stored: in one step, or not at all.  UsageError when a version tag would move."""
        named: list[Named] = []

        def name_it(index: Index) -> Index:
            named.append(index.publish(name, tags, model, attachments, force=force, where=self.location))
            return named[-1].index

        self.change(name_it)
        return named[-1]


class SharedIndexRepository(IndexedRepository):
    """One NAME of an index that all NAMEs share."""

    def __init__(self, registry: IndexedRegistry, name: str) -> None:
        super().__init__(registry.location, name)
        self._shared = registry

    @final
    def read_index(self) -> Index:
        return self._shared.index()

    @final
    def read_manifest(self, descriptor: Descriptor) -> bytes:
        return self.read_json_blob(descriptor)

    @final
    def strangers(self, model: Descriptor) -> tuple[str, ...]:
        return ()

    @final
    def _name(self, model: bytes, attachments: Sequence[Attachment], tags: Sequence[str], force: bool) -> Change:
        descriptor = describe_model(model)
        manifests = (model, *(attachment.manifest(descriptor) for attachment in attachments))
        written = sum(self.put(Part(describe(manifest, MANIFEST_TYPE), manifest)) for manifest in manifests)
        attached = [attachment.descriptor(descriptor) for attachment in attachments]
        named = self._shared.publish(self.name, tags, descriptor, attached, force=force)
        return Change(named.model_is_new, named.tags_set, named.attached, written)
