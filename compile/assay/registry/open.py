"""From the address of a registry to the registry.  A backend is a row of the table, imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from assay.registry.base import Registry, Repository
from assay.registry.reference import Reference, parse_address, parse_reference, split_address

# Scheme → module:class.
_BACKENDS = {
    "": "assay.registry.layout:Layout",
    "oci": "assay.registry.remote:RemoteRegistry",
    "oci+http": "assay.registry.remote:RemoteRegistry",
    "s3": "assay.registry.s3:S3Registry",
    "hf": "assay.registry.hf:HubRegistry",
}


def open_registry(address: Path | str) -> Registry:
    """The registry at an address, to read; UsageError when there is none."""
    return _backend(address).open(address)


def create_registry(address: Path | str) -> Registry:
    """The registry at an address, to write."""
    return _backend(address).create(address)


def check_registry(address: Path | str) -> None:
    """Raise what publishing to an address would raise, as far as can be told without writing."""
    _backend(address).check(address)


def open_repository(registry: Path | str, reference: str, *, writing: bool = False) -> tuple[Repository, Reference]:
    """Where a reference leads: the repository, and what to ask of it.

    registry: used unless the reference is a whole address itself, as oci://HOST/PATH/NAME:TAG.  writing: to add to what is
    there already; nothing is made.
    """
    address, rest = split_address(reference)
    parsed = parse_reference(rest)
    opened = open_registry(address or registry)
    if writing:
        opened = create_registry(address or registry)
    # Without a name the reference is a digest.
    return (opened.holding(str(parsed)) if parsed.name is None else opened.repository(parsed.name)), parsed


def _backend(address: Path | str) -> type[Registry]:
    module, _, name = _BACKENDS[parse_address(address).scheme].partition(":")
    return getattr(import_module(module), name)
