"""Where a cluster finds an artifact: an address that is given, checked, and pinned as far as its kind allows."""

from __future__ import annotations

import re

from assay.errors import UsageError
from assay.registry.oci import DIGEST
from assay.serving import Served, stack_row

_ADDRESS = re.compile(r"([a-z][a-z0-9+]*)://[A-Za-z0-9][\w.:@%+/=-]*")


def checked_storage(stack: str, served: Served) -> tuple[str, tuple[str, ...]]:
    """The address that was given, and what to know about it; UsageError when it is missing, of another kind, or movable."""
    kinds = ", ".join(f"{kind}://" for kind in stack_row(stack).storage)
    if served.storage is None:
        raise UsageError(
            f"{stack} takes the model from a storage that the cluster reaches: give its address, "
            f"assay serving {served.directory} --for {stack} --storage ADDRESS. It takes {kinds}"
        )
    match = _ADDRESS.fullmatch(served.storage)
    if match is None or match[1] not in stack_row(stack).storage:
        raise UsageError(f"{served.storage!r} is no address that {stack} takes; it takes {kinds}")
    if match[1].startswith("oci"):
        _, at, digest = served.storage.partition("@")
        if not at or not DIGEST.fullmatch(digest):
            raise UsageError(f"{served.storage}: a tag can move; give the digest: {match[1]}://REGISTRY/NAME@sha256:…")
        return served.storage, ()
    if served.digest.removeprefix("sha256:")[:12] in served.storage:
        return served.storage, ()
    return served.storage, (
        f"{stack} does not verify what it loads from {served.storage}: put exactly these bytes there, under a path that has the digest "
        f"in it (…/sha256-{served.digest.removeprefix('sha256:')}), and never write to it again.",
    )
