"""What is removed from a registry: an artifact by name and digest, and then the blobs that nothing leads to.

A blob is kept as long as an entry of the index leads to it: a tag, a model without a tag, what is said about a model, and
whatever other tools named.  So nothing is collected that nobody took away by `assay remove`, but for what interrupted
publishes left.  Left out on purpose: removing and collecting elsewhere than in directories; servers do it themselves, in buckets
and on the Hub blobs stay.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from assay.errors import NotSupportedError, UsageError
from assay.registry.channels import promotions
from assay.registry.layout import Collected, Layout
from assay.registry.open import open_registry, open_repository
from assay.registry.tags import layout_of

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,9})([smhd])")


@dataclass(frozen=True)
class Removed:
    """An artifact that a name no longer has; its blobs stay until they are collected."""

    registry: str
    name: str
    digest: str


def remove(registry: Path | str, reference: str, *, force: bool = False) -> Removed:
    """Take an untagged artifact away from a name, with what is said about it when no other name has it.

    force: one that was promoted, too; a rollback can then no longer go back to it, nor past it.
    Raises UsageError for one that has tags, NotSupportedError for a registry that is no directory.
    """
    repository, parsed = open_repository(registry, reference, writing=True)
    if parsed.name is None or parsed.digest is None:
        raise UsageError(f"{reference}: write NAME@sha256:DIGEST, so that nothing else is removed than is meant.")
    layout = layout_of(repository, "artifacts").layout
    model = repository.resolve(parsed)
    channels = sorted({record.promotion.channel for record in promotions(repository, model)})
    if channels and not force:
        raise UsageError(
            f"{repository.location}: {parsed} was promoted into {', '.join(channels)}, and a rollback may go back to it. Use force to "
            "remove it all the same."
        )
    name, digest = parsed.name, parsed.digest
    layout.change(lambda index: index.remove(name, digest, layout.location))
    return Removed(repository.location, name, digest)


def collect(registry: Path | str, grace_seconds: float, *, dry_run: bool = False) -> Collected:
    """Remove the blobs that nothing leads to; NotSupportedError for a registry that is no directory."""
    opened = open_registry(registry)
    if not isinstance(opened, Layout):
        raise NotSupportedError(
            f"{opened.location}: Assay collects in registry directories only. A server collects its own garbage (`registry "
            "garbage-collect` of Distribution, retention rules elsewhere); in a bucket or on the Hub blobs stay."
        )
    return opened.collect(grace_seconds, dry_run=dry_run)


def seconds_of(duration: str) -> float:
    """Seconds of a duration such as 30m, 24h or 7d; UsageError."""
    found = _DURATION.fullmatch(duration)
    if not found:
        raise UsageError(f"{duration!r} is not a duration; write a number and s, m, h or d: 90s, 30m, 24h, 7d.")
    return int(found[1]) * _UNITS[found[2]]
