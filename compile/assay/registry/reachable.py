"""What a manifest or an index leads to, whoever wrote it: what a collection keeps, and what must be there to be named."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from assay.errors import IntegrityError
from assay.registry.oci import INDEX_TYPE, MANIFEST_TYPE, Descriptor, parse_descriptor, parse_json

_LISTS = ("layers", "manifests", "blobs")


def reached(
    roots: Iterable[Descriptor], read: Callable[[Descriptor], bytes], is_there: Callable[[str], bool]
) -> set[str]:
    """Digests of everything that the roots lead to: manifests, their configs and layers, their subjects.

    read: a manifest's verified bytes.  is_there: whether a digest is in this store: a subject may be in another.
    Raises IntegrityError for a manifest that cannot be read.
    """
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        descriptor = waiting.pop()
        if descriptor.digest in found:
            continue
        found.add(descriptor.digest)
        if is_listing(descriptor):
            named = named_in(read(descriptor), descriptor.digest)
            waiting += [other for other in named if not is_listing(other) or is_there(other.digest)]
    return found


def is_listing(descriptor: Descriptor) -> bool:
    """Whether it names others: a manifest or an index."""
    return descriptor.media_type in (MANIFEST_TYPE, INDEX_TYPE)


def named_in(data: bytes, where: str) -> list[Descriptor]:
    """The descriptors in a manifest or an index; IntegrityError when they are none."""
    value = parse_json(data, where)
    found: list[Any] = [value[key] for key in ("config", "subject") if value.get(key) is not None]
    for key in _LISTS:
        items = value.get(key, [])
        if not isinstance(items, list):
            raise IntegrityError(f"{where}: {key} is not a list.")
        found += cast("list[Any]", items)
    return [parse_descriptor(item, where) for item in found]
