"""How an artifact is asked for: NAME, NAME:TAG, NAME@sha256:… or sha256:…"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from assay.errors import NotSupportedError, UsageError
from assay.registry.oci import DIGEST

DEFAULT_TAG = "latest"
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"v?\d+(\.\d+)*([._+-].*)?", re.ASCII)


@dataclass(frozen=True)
class Reference:
    """A parsed reference: exactly one of `tag` and `digest` is set; `name` is None for a bare digest."""

    name: str | None
    tag: str | None
    digest: str | None

    def __str__(self) -> str:
        if self.digest:
            return f"{self.name}@{self.digest}" if self.name else self.digest
        return f"{self.name}:{self.tag}"


def parse_reference(text: str) -> Reference:
    """Read a reference; UsageError lists the forms."""
    if DIGEST.fullmatch(text):
        return Reference(None, None, text)
    name, at, digest = text.partition("@")
    if at and _NAME.fullmatch(name) and DIGEST.fullmatch(digest):
        return Reference(name, None, digest)
    name, _, tag = text.partition(":")
    tag = tag if ":" in text else DEFAULT_TAG
    if _NAME.fullmatch(name) and _TAG.fullmatch(tag):
        return Reference(name, tag, None)
    raise UsageError(
        f"{text!r} is not a reference. Allowed: NAME, NAME:TAG, NAME@sha256:DIGEST or sha256:DIGEST; "
        "NAME has a-z 0-9 . _ - and DIGEST 64 hexadecimal digits."
    )


def split_ref_name(text: str) -> tuple[str, str] | None:
    """NAME and TAG of a tag written in an index, or None when another tool wrote it for its own use."""
    name, colon, tag = text.rpartition(":")
    return (name, tag) if colon and _NAME.fullmatch(name) and _TAG.fullmatch(tag) else None


def check_name(name: str) -> None:
    """UsageError unless this can name an artifact in a registry."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name an artifact; allowed: up to 100 of a-z 0-9 . _ -, a letter or digit at both ends."
        )


def local_directory(location: Path | str) -> Path:
    """The directory that a registry's address names; NotSupportedError for the address of a server."""
    # One slash: a Path has lost the other.
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(location)):
        raise NotSupportedError(
            f"{location}: this version publishes to a directory only, an OCI image layout. Give its path."
        )
    return Path(location)


def check_tag(tag: str) -> None:
    """UsageError unless this can be a tag."""
    if not _TAG.fullmatch(tag):
        raise UsageError(f"{tag!r} cannot be a tag; allowed: up to 128 of A-Z a-z 0-9 . _ -, not starting with . or -.")


def is_version(tag: str) -> bool:
    """Whether a tag reads as a version (1, v1.2, 1.2.0-rc1): such a tag, once given, stays where it is."""
    return _VERSION.fullmatch(tag) is not None
