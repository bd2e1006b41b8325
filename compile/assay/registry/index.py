"""What a registry directory names: the entries of index.json, and how a publish changes them.

Source: OCI image-layout.md.  A tag is an entry with `org.opencontainers.image.ref.name` = "NAME:TAG".  A model that
has no tag (any more) keeps an entry with `dev.assay.name`, so that its digest can still be pulled and rolled back to.
A layout has no referrers call: what is said about a model is an entry with `dev.assay.subject` = the model's digest.
Entries of other tools are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from assay.errors import IntegrityError, UsageError
from assay.files import readable_json
from assay.registry.oci import INDEX_TYPE, REF_NAME, Descriptor, parse_descriptor, parse_json
from assay.registry.reference import Reference, check_move, some_of, split_ref_name

# Some 100,000 publishes; a longer index is not written, and not read into memory.
MAX_INDEX_BYTES = 64 << 20
NAME = "dev.assay.name"
SUBJECT = "dev.assay.subject"


@dataclass(frozen=True)
class Entry:
    """One line of the index: `raw` is what is written, `descriptor` what it means."""

    raw: dict[str, Any]
    descriptor: Descriptor

    @property
    def named(self) -> tuple[str, str | None] | None:
        """The name and tag of a model; the tag is None for one that has none; None for what is not a model of ours."""
        annotations = self.descriptor.annotations
        if ref_name := annotations.get(REF_NAME):
            return split_ref_name(ref_name)
        return (annotations[NAME], None) if NAME in annotations else None

    @property
    def subject(self) -> str | None:
        """The digest of the model that this entry says something about."""
        return self.descriptor.annotations.get(SUBJECT)


@dataclass(frozen=True)
class Named:
    """A new index, and what is new in it; attached: digests."""

    index: Index
    model_is_new: bool
    tags_set: tuple[str, ...]
    attached: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """All entries, oldest first."""

    entries: tuple[Entry, ...] = ()

    def to_bytes(self) -> bytes:
        """The bytes of index.json."""
        return readable_json(
            {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry.raw for entry in self.entries]}
        )

    def models(self, name: str | None = None) -> tuple[tuple[str, str | None, Descriptor], ...]:
        """(name, tag, descriptor) of every model, or of those with one name."""
        named = [(entry.named, entry.descriptor) for entry in self.entries]
        return tuple((*key, descriptor) for key, descriptor in named if key and name in (None, key[0]))

    def referrers(self, digest: str) -> tuple[Descriptor, ...]:
        """The manifests that say something about a model, oldest first."""
        return tuple(entry.descriptor for entry in self.entries if entry.subject == digest)

    def resolve(self, reference: Reference, where: str) -> Descriptor:
        """The manifest that a reference names; UsageError says what there is instead."""
        found: dict[str, Descriptor] = {}
        for _, tag, descriptor in self.models(reference.name):
            if descriptor.digest == reference.digest or (tag is not None and tag == reference.tag):
                found[descriptor.digest] = descriptor
        if len(found) > 1:
            raise IntegrityError(f"{where}: {reference} names {len(found)} different artifacts: {', '.join(found)}.")
        if not found:
            raise UsageError(f"{where}: there is no {reference}. {self._there_is(reference)}")
        return next(iter(found.values()))

    def publish(
        self,
        name: str,
        tags: Sequence[str],
        model: Descriptor,
        attachments: Sequence[Descriptor] = (),
        *,
        force: bool,
        where: str,
    ) -> Named:
        """Name a model and what is said about it.  UsageError when a version tag would move and `force` is not set."""
        entries = list(self.entries)
        before = {(key, descriptor.digest) for key, _, descriptor in self.models()}
        tags_set: list[str] = []
        for tag in dict.fromkeys(tags):
            old = [entry for entry in entries if entry.named == (name, tag)]
            if [entry.descriptor.digest for entry in old] == [model.digest]:
                continue
            if old:
                check_move(f"{where}: {name}", tag, old[0].descriptor.digest, model.digest, force=force)
            entries = [entry for entry in entries if entry not in old]
            entries.append(_entry(model, {REF_NAME: f"{name}:{tag}"}))
            tags_set.append(tag)
            entries += [_entry(_bare(entry.descriptor), {NAME: name}) for entry in old]
        entries = _without_idle_names([*entries, _entry(model, {NAME: name})])
        known = {entry.digest for entry in self.referrers(model.digest)}
        added = {attachment.digest: attachment for attachment in attachments if attachment.digest not in known}
        entries += [_entry(attachment, {SUBJECT: model.digest}) for attachment in added.values()]
        return Named(Index(tuple(entries)), (name, model.digest) not in before, tuple(tags_set), tuple(added))

    def untag(self, name: str, tag: str) -> Index:
        """Without a tag; the model that had it can still be reached by its digest."""
        old = [entry for entry in self.entries if entry.named == (name, tag)]
        kept = [entry for entry in self.entries if entry not in old]
        return Index(
            tuple(_without_idle_names(kept + [_entry(_bare(entry.descriptor), {NAME: name}) for entry in old]))
        )

    def remove(self, name: str, digest: str, where: str) -> Index:
        """Without a model under a name, and without what is said of it when no other name has it; UsageError when it has tags."""
        tags = sorted(tag for _, tag, model in self.models(name) if tag and model.digest == digest)
        if tags:
            raise UsageError(
                f"{where}: {name}@{digest} is tagged {', '.join(tags)}. Take the tags away first: `assay untag {name}:{tags[0]}`."
            )
        kept = tuple(
            entry for entry in self.entries if (entry.named, entry.descriptor.digest) != ((name, None), digest)
        )
        if not any(model.digest == digest for _, _, model in Index(kept).models()):
            kept = tuple(entry for entry in kept if entry.subject != digest)
        return Index(kept)

    def _there_is(self, reference: Reference) -> str:
        models = self.models(reference.name)
        if reference.name and not models:
            names = sorted({name for name, _, _ in self.models()})
            return f"Names here: {some_of(names)}." if names else "Nothing is published here."
        if reference.tag:
            return f"Tags of {reference.name}: {some_of(sorted(tag for _, tag, _ in models if tag))}."
        return "List what is published to see the digests."


def parse_index(data: bytes, where: str) -> Index:
    """Check an index.json; IntegrityError says which entry is wrong."""
    value = parse_json(data, where, MAX_INDEX_BYTES)
    manifests = value.get("manifests")
    if value.get("schemaVersion") != 2 or not isinstance(manifests, list):
        raise IntegrityError(f"{where}: not an OCI image index (schemaVersion 2 with a list of manifests).")
    return Index(
        tuple(
            Entry(raw, parse_descriptor(raw, f"{where}: manifests[{number}]"))
            for number, raw in enumerate(cast("list[dict[str, Any]]", manifests))
        )
    )


def _entry(descriptor: Descriptor, annotations: dict[str, str]) -> Entry:
    full = Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size,
        {**descriptor.annotations, **annotations},
        descriptor.artifact_type,
    )
    return Entry(full.to_json(), full)


def _bare(descriptor: Descriptor) -> Descriptor:
    annotations = {key: text for key, text in descriptor.annotations.items() if key != REF_NAME}
    return Descriptor(descriptor.media_type, descriptor.digest, descriptor.size, annotations, descriptor.artifact_type)


def _without_idle_names(entries: list[Entry]) -> list[Entry]:
    """Drop tagless entries of models that have a tag under the same name, or a second tagless entry."""
    tagged = {(entry.named[0], entry.descriptor.digest) for entry in entries if entry.named and entry.named[1]}
    kept: list[Entry] = []
    for entry in entries:
        if entry.named and entry.named[1] is None:
            key = (entry.named[0], entry.descriptor.digest)
            if key in tagged:
                continue
            tagged.add(key)
        kept.append(entry)
    return kept
