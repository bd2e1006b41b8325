"""How an artifact is asked for: NAME, NAME:TAG, NAME@sha256:… or sha256:…, after the address of a registry or without.

The address of a registry is a directory or SCHEME://PLACE.  `--registry oci://host/team` with NAME:TAG and the
reference oci://host/team/NAME:TAG mean the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from assay.errors import NotSupportedError, UsageError
from assay.registry.oci import DIGEST

DEFAULT_TAG = "latest"
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"v?\d+(\.\d+)*([._+-].*)?", re.ASCII)


# Scheme → how its addresses look.
SCHEMES: dict[str, str] = {
    "oci": "oci://HOST[:PORT]/PATH",
    "oci+http": "oci+http://HOST[:PORT]/PATH",
    "s3": "s3://BUCKET/PREFIX",
    "hf": "hf://ORG",
}
# One slash: a Path has lost the other.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://?")


@dataclass(frozen=True)
class Address:
    """Where a registry is.  scheme: "" for a directory.  place: its path, or what follows SCHEME://."""

    scheme: str
    place: str


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
    if not is_name(name):
        raise UsageError(
            f"{name!r} cannot name an artifact; allowed: up to 100 of a-z 0-9 . _ -, a letter or digit at both ends."
        )


def parse_address(text: Path | str) -> Address:
    """Read a registry's address; NotSupportedError lists the schemes, UsageError says what is missing."""
    text = str(text)
    found = _SCHEME.match(text)
    if not found:
        return Address("", text)
    scheme, place = found[1], text[found.end() :].rstrip("/")
    if scheme not in SCHEMES:
        raise NotSupportedError(f"{text}: no registry has such an address. Allowed: a directory{_allowed()}.")
    if not place or place.startswith("/"):
        raise UsageError(f"{text}: names no place. Write {SCHEMES[scheme]}.")
    return Address(scheme, place)


def split_address(text: str) -> tuple[str | None, str]:
    """The registry's address in front of a reference, or None, and the rest: NAME, NAME:TAG or NAME@sha256:…"""
    if not _SCHEME.match(text):
        return None, text
    address, _, rest = text.rpartition("/")
    if not rest or address.endswith((":", ":/")):
        raise UsageError(f"{text!r} is not a reference: it has a registry but no name. Write SCHEME://PLACE/NAME:TAG.")
    parse_address(address)
    return address, rest


def check_tag(tag: str) -> None:
    """UsageError unless this can be a tag."""
    if not is_tag(tag):
        raise UsageError(f"{tag!r} cannot be a tag; allowed: up to 128 of A-Z a-z 0-9 . _ -, not starting with . or -.")


def is_name(text: str) -> bool:
    """Whether this can name an artifact."""
    return _NAME.fullmatch(text) is not None


def is_tag(text: str) -> bool:
    """Whether this can be a tag."""
    return _TAG.fullmatch(text) is not None


def is_version(tag: str) -> bool:
    """Whether a tag reads as a version (1, v1.2, 1.2.0-rc1): such a tag, once given, stays where it is."""
    return _VERSION.fullmatch(tag) is not None


def check_move(name: str, tag: str, old: str, new: str, *, force: bool) -> None:
    """UsageError when a version tag would move from one digest to another and `force` is not set."""
    if old != new and is_version(tag) and not force:
        raise UsageError(
            f"{name}:{tag} is {old} and versions do not move; this artifact is {new}. Publish it under a new version, "
            "or use force to move the tag."
        )


def some_of(words: Sequence[str], limit: int = 10) -> str:
    """The first words of a list, for a message."""
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return (", ".join(words[:limit]) + more) or "none"


def _allowed() -> str:
    return "".join(f", {form}" for form in SCHEMES.values())
