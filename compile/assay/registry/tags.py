"""Tags of published artifacts: set and taken away.  A tag that artifacts were promoted into is a channel (channels.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assay.errors import NotSupportedError, UsageError
from assay.registry.base import Repository
from assay.registry.layout import LayoutRepository
from assay.registry.modelpack import read_pack
from assay.registry.oci import IN_TOTO_TYPE, Descriptor
from assay.registry.open import open_repository
from assay.registry.reference import Reference, check_tag

# Annotations of an attestation, as its registry lists them: shown, and never trusted.
CHANNEL = "dev.assay.channel"
SIGNER = "dev.assay.signer"


@dataclass(frozen=True)
class Tagged:
    """What setting or taking away a tag did.  previous: the digest that had it before."""

    registry: str
    name: str
    tag: str
    digest: str | None
    previous: str | None
    changed: bool


def set_tag(registry: Path | str, reference: str, tag: str, *, force: bool = False) -> Tagged:
    """Give a published artifact one more tag.  UsageError for a channel, which moves by `promote` alone.

    force: move a version tag.
    """
    check_tag(tag)
    repository, parsed = open_repository(registry, reference, writing=True)
    model = repository.resolve(parsed)
    pack = read_pack(repository.read_manifest(model), f"{repository.location}: {parsed}")
    refuse_channels(repository, model.digest, (tag,))
    previous = tagged(repository, tag)
    change = repository.commit(pack.manifest, (), (tag,), force=force)
    before = previous.digest if previous else None
    return Tagged(repository.location, repository.name, tag, model.digest, before, bool(change.tags_set))


def untag(registry: Path | str, reference: str, *, force: bool = False) -> Tagged:
    """Take a tag away; the artifact can still be reached by its digest.

    force: take away a channel, too.  NotSupportedError for a registry that is no directory.
    """
    repository, parsed = open_repository(registry, reference, writing=True)
    if parsed.name is None or parsed.tag is None or ":" not in reference.rpartition("/")[2]:
        raise UsageError(f"{reference}: write NAME:TAG, the tag that is to go.")
    layout = layout_of(repository, "tags").layout
    model = repository.resolve(parsed)
    if is_channel(repository, model, parsed.tag) and not force:
        raise UsageError(
            f"{repository.location}: {parsed} is a channel; without its tag nothing tells what is in it, and `assay rollback` has "
            "nothing to start from. Use force to take it away all the same."
        )
    name, tag = parsed.name, parsed.tag
    layout.change(lambda index: index.untag(name, tag))
    return Tagged(repository.location, name, tag, None, model.digest, True)


def refuse_channels(repository: Repository, digest: str, tags: Sequence[str]) -> None:
    """UsageError when one of the tags is a channel that would move to this digest."""
    for tag in tags:
        now = tagged(repository, tag)
        if now and now.digest != digest and is_channel(repository, now, tag):
            raise UsageError(
                f"{repository.location}: {repository.name}:{tag} is a channel, into which artifacts are promoted. Choose another "
                f"tag, and then `assay promote {repository.name}@{digest} --to {tag}`."
            )


def is_channel(repository: Repository, model: Descriptor, tag: str) -> bool:
    """Whether the model that has a tag was promoted into it, as the registry lists it."""
    found = repository.referrers(model.digest, IN_TOTO_TYPE)
    return any(attestation.annotations.get(CHANNEL) == tag for attestation in found)


def tagged(repository: Repository, tag: str) -> Descriptor | None:
    """The model that has a tag, None when none has it."""
    try:
        return repository.resolve(Reference(repository.name, tag, None))
    except UsageError:
        return None


def layout_of(repository: Repository, what: str) -> LayoutRepository:
    """NotSupportedError unless the registry is a directory, where Assay itself removes things."""
    if not isinstance(repository, LayoutRepository):
        raise NotSupportedError(
            f"{repository.location}: Assay removes {what} in registry directories only. A server does it by its own interface and "
            "retention rules; in a bucket or on the Hub, use what these offer."
        )
    return repository
