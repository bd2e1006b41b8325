"""Python files that are written beside an artifact, as they are: what differs is in the JSON beside them that they read."""

from __future__ import annotations

from importlib import resources


def template(name: str) -> bytes:
    """The bytes of one of them, from templates/."""
    return resources.files("assay.serving").joinpath("templates", name).read_bytes()
