from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.errors import UsageError
from assay.files import readable_json
from assay.registry.differences import diff

MakeRun = Callable[..., Path]
Publish = Callable[..., Any]


def gated(run: Path, helpers: Any, candidate: float) -> Path:
    """Give a run's verdict a figure."""
    row = {
        "metric": "kl_divergence",
        "verdict": "PASS",
        "reason": "",
        "candidate": candidate,
        "difference": candidate / 2,
    }
    helpers.write_verdict(run, gates=[row])
    return run


def test_what_changed(make_run: MakeRun, registry: Path, publish_signed: Publish, helpers: Any) -> None:
    layers = [{"name": "layers.0", "scheme": "W4A16"}, {"name": "layers.1", "scheme": "W4A16"}]
    one = make_run("one", files={"model.onnx": b"1", "old.json": b"{}"}, about={"layers": layers})
    changed = [{"name": "first", "scheme": "W4A16"}, layers[0], layers[1] | {"scheme": "W8A16"}]
    two = make_run(
        "two",
        files={"model.onnx": b"22", "new.json": b"[]"},
        about={"layers": changed, "scheme": "W8A16", "method": None},
    )
    for run, tag in ((gated(one, helpers, 0.1), "1"), (gated(two, helpers, 0.2), "2")):
        publish_signed(run, tags=(tag,))
    found = diff(registry, "small:1", "small:2")
    files = {file.name: (file.change, file.size_before, file.size_after) for file in found.files}
    assert files["model.onnx"] == ("changed", 1, 2)
    assert files["old.json"] == ("removed", 2, None) and files["new.json"] == ("added", None, 2)
    manifest = {change.path: (change.before, change.after) for change in found.manifest}
    assert manifest == {
        "scheme": ("W4A16", "W8A16"),
        "method": ("gptq", None),
        "layers.layers.1.scheme": ("W4A16", "W8A16"),
        "layers.first.name": (None, "first"),
        "layers.first.scheme": (None, "W4A16"),
    }
    (figure,) = found.figures
    assert (figure.metric, figure.before, figure.after) == ("kl_divergence", 0.1, 0.2)
    assert (figure.difference_before, figure.difference_after) == (0.05, 0.1)


def test_recipe_and_lock(make_run: MakeRun, registry: Path, publish_signed: Publish, helpers: Any) -> None:
    runs = [make_run(name) for name in ("one", "two")]
    recipe = {"digest": "sha256:" + "0" * 64, "content": {"quantize": {"scheme": "W4A16", "overrides": []}}}
    tools = {"torch": "2.13.0"}
    contents = [
        {"recipe": recipe, "tools": tools},
        {"recipe": recipe | {"content": {"quantize": {"scheme": "W8A16"}}}, "tools": tools | {"numpy": "2.4"}},
    ]
    for run, lock, tag in zip(runs, contents, "12", strict=True):
        (run / "artifact/assay.lock.json").write_bytes(readable_json(lock))
        helpers.write_evidence(run, recipe={"digest": recipe["digest"]})
        helpers.write_verdict(run, recipe=recipe["digest"])
        publish_signed(run, tags=(tag,))
    found = diff(registry, "small:1", "small:2")
    assert [(row.path, row.before, row.after) for row in found.recipe] == [
        ("content.quantize.scheme", "W4A16", "W8A16")
    ]
    assert [(row.path, row.before, row.after) for row in found.lock] == [("tools.numpy", None, "2.4")]


def test_nothing_changed(run: Path, registry: Path, publish_signed: Publish) -> None:
    publish_signed(run, tags=("1", "2"))
    found = diff(registry, "small:1", "small:2")
    assert found.digest_before == found.digest_after
    assert not (found.files or found.manifest or found.recipe or found.lock)


def test_what_is_not_there(run: Path, registry: Path, publish_signed: Publish) -> None:
    publish_signed(run)
    with pytest.raises(UsageError, match="there is no small:2"):
        diff(registry, "small", "small:2")
