"""What changed from one published artifact to another: files, facts, recipe, tools, and the figures of the verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from assay.artifact import LOCK_NAME, MANIFEST_NAME
from assay.registry.inspection import show
from assay.registry.oci import parse_json
from assay.registry.pull import resolve

# What names the items of a list, so that one that was put in between does not shift all others.
_LABELS = ("name", "metric", "match")


@dataclass(frozen=True)
class FileChange:
    """A file that is not the same; sizes in bytes, None on the side that lacks it."""

    name: str
    change: Literal["added", "removed", "changed"]
    size_before: int | None
    size_after: int | None


@dataclass(frozen=True)
class ValueChange:
    """A value that is not the same, by its path; None where it is absent."""

    path: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Figure:
    """A metric of the two newest verdicts: the candidate's value and its difference from its own baseline."""

    metric: str
    before: float | None
    after: float | None
    difference_before: float | None
    difference_after: float | None


@dataclass(frozen=True)
class Difference:
    """Everything that changed.  manifest: of manifest.json.  lock: of assay.lock.json, but for the recipe."""

    before: str
    after: str
    digest_before: str
    digest_after: str
    size_before: int
    size_after: int
    files: tuple[FileChange, ...]
    manifest: tuple[ValueChange, ...]
    recipe: tuple[ValueChange, ...]
    lock: tuple[ValueChange, ...]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class _Side:
    digest: str
    size_bytes: int
    files: dict[str, tuple[str, int]]
    manifest: dict[str, Any]
    lock: dict[str, Any]
    verdict: dict[str, Any]


def diff(registry: Path | str, before: str, after: str) -> Difference:
    """Compare two artifacts, of one registry or by whole addresses.  Reads what describes them, not their weights."""
    one, two = _read(registry, before), _read(registry, after)
    return Difference(
        before=before,
        after=after,
        digest_before=one.digest,
        digest_after=two.digest,
        size_before=one.size_bytes,
        size_after=two.size_bytes,
        files=_files(one.files, two.files),
        manifest=_values(one.manifest, two.manifest),
        recipe=_values(_recipe(one.lock), _recipe(two.lock)),
        lock=_values(*({key: side.lock[key] for key in side.lock if key != "recipe"} for side in (one, two))),
        figures=_figures(one.verdict, two.verdict),
    )


def _read(registry: Path | str, reference: str) -> _Side:
    resolved = resolve(registry, reference)
    layers, read = resolved.pack.layers, resolved.repository.read_json_blob
    described = {
        name: parse_json(read(layers[name]), name) if name in layers else {} for name in (MANIFEST_NAME, LOCK_NAME)
    }
    evidence = show(registry, reference).evidence
    return _Side(
        digest=resolved.descriptor.digest,
        size_bytes=resolved.pack.size_bytes,
        files={name: (layer.digest, layer.size) for name, layer in layers.items()},
        manifest=described[MANIFEST_NAME],
        lock=described[LOCK_NAME],
        verdict=evidence[-1].verdict if evidence else {},
    )


def _files(one: dict[str, tuple[str, int]], two: dict[str, tuple[str, int]]) -> tuple[FileChange, ...]:
    changes: list[FileChange] = []
    for name in sorted({*one, *two}):
        before, after = one.get(name), two.get(name)
        if before == after:
            continue
        kind: Literal["added", "removed", "changed"] = (
            "changed" if before and after else "added" if after else "removed"
        )
        changes.append(FileChange(name, kind, before[1] if before else None, after[1] if after else None))
    return tuple(changes)


def _values(one: dict[str, Any], two: dict[str, Any]) -> tuple[ValueChange, ...]:
    before, after = _flat(one), _flat(two)
    paths = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    return tuple(ValueChange(path, before.get(path), after.get(path)) for path in paths)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Path → value of everything in nested JSON that is neither an object nor a list."""
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
    elif isinstance(value, list):
        items = [(_label(item, index), item) for index, item in enumerate(cast("list[Any]", value))]
    else:
        return {path: value}
    return {
        key: leaf for name, item in items for key, leaf in _flat(item, f"{path}.{name}" if path else str(name)).items()
    }


def _label(item: Any, index: int) -> str:
    labels = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
    return next((str(labels[key]) for key in _LABELS if isinstance(labels.get(key), str)), str(index))


def _recipe(lock: dict[str, Any]) -> dict[str, Any]:
    recipe = lock.get("recipe")
    return cast("dict[str, Any]", recipe) if isinstance(recipe, dict) else {}


def _figures(one: dict[str, Any], two: dict[str, Any]) -> tuple[Figure, ...]:
    before, after = _rows(one), _rows(two)
    return tuple(
        Figure(
            metric,
            *(side.get(metric, {}).get("candidate") for side in (before, after)),
            *(side.get(metric, {}).get("difference") for side in (before, after)),
        )
        for metric in dict.fromkeys((*before, *after))
    )


def _rows(verdict: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Metric → row, gated ones first."""
    rows = [row for key in ("gates", "reported") for row in cast("list[Any]", verdict.get(key) or [])]
    return {str(row.get("metric")): cast("dict[str, Any]", row) for row in rows if isinstance(row, dict)}
