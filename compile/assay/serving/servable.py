"""Whether a stack can serve an artifact, by its manifest alone: asked before a byte of the model is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from assay.errors import IntegrityError, NotSupportedError
from assay.serving import STACKS, StackRow, stack_row
from assay.targets.refusals import misreadings


def check_servable(stack: str, manifest: Mapping[str, Any], where: str) -> None:
    """NotSupportedError with the reason, and with the stacks that can, when this one cannot; UsageError when there is no such stack."""
    target = str(manifest.get("target"))
    reason = _hindrance(stack_row(stack), manifest, where)
    if reason is None:
        return
    if target not in stack_row(stack).formats:
        reason = (
            f"it is compiled for {target}, and {stack} serves what is compiled for {_listed(stack_row(stack).formats)}."
        )
    others = [name for name, other in STACKS.items() if not _hindrance(other, manifest, where)]
    way_out = f"Stacks that can serve this artifact: {_listed(others)}." if others else "No stack here can serve it."
    raise NotSupportedError(f"{where}: {reason} {way_out}")


def _hindrance(row: StackRow, manifest: Mapping[str, Any], where: str) -> str | None:
    """Why a stack cannot serve this artifact: another format, or what its engine is known to misread; None when it can."""
    target = str(manifest.get("target"))
    if target not in row.formats:
        return "another format"
    if row.engine is None:
        return None
    found = misreadings(target, row.engine, _linears(manifest, where))
    return next((refusal.message for refusal in found), None)


def _linears(manifest: Mapping[str, Any], where: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, scheme and shape of every Linear that the manifest tells of."""
    rows = manifest.get("layers", [])
    try:
        return [(str(row["name"]), str(row["scheme"]), tuple(int(size) for size in row["shape"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{where}: the layers in its manifest.json are not of the form that Assay writes."
        ) from error


def _listed(words: tuple[str, ...] | list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
