"""Repositories of a registry that says in one index what it holds, wherever that index and its blobs lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import final

from assay.errors import UsageError
from assay.registry.base import Repository
from assay.registry.index import Index
from assay.registry.oci import MANIFEST_TYPE, Descriptor
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
