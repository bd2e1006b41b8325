from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.errors import UsageError
from assay.registry.channels import promote
from assay.registry.inspection import list_artifacts, verify
from assay.registry.tags import set_tag, untag

MakeRun = Callable[..., Path]
Publish = Callable[..., Any]


def tags(registry: Path) -> dict[str | None, str]:
    return {listing.tag: listing.digest for listing in list_artifacts(registry)}


def test_a_tag_is_set_and_moved(make_run: MakeRun, registry: Path, publish_signed: Publish, helpers: Any) -> None:
    one = publish_signed(make_run("one"), tags=("1.0",))
    two = publish_signed(make_run("two", files={"model.onnx": b"two"}), tags=("2.0",))
    done = set_tag(registry, "small:1.0", "stable")
    assert (done.digest, done.previous, done.changed) == (one.digest, None, True)
    assert not set_tag(registry, "small:1.0", "stable").changed
    done = set_tag(registry, f"small@{two.digest}", "stable")
    assert (done.digest, done.previous, done.changed) == (two.digest, one.digest, True)
    assert tags(registry) == {"1.0": one.digest, "2.0": two.digest, "stable": two.digest}
    with pytest.raises(UsageError, match=r"small:1\.0 is .* versions do not move"):
        set_tag(registry, "small:2.0", "1.0")
    assert set_tag(registry, "small:2.0", "1.0", force=True).changed
    assert tags(registry)[None] == one.digest
    helpers.assert_sound(registry)


def test_a_tag_is_taken_away(run: Path, registry: Path, publish_signed: Publish) -> None:
    receipt = publish_signed(run, tags=("latest", "1.0"))
    done = untag(registry, "small:latest")
    assert (done.tag, done.digest, done.previous) == ("latest", None, receipt.digest)
    assert tags(registry) == {"1.0": receipt.digest}
    untag(registry, "small:1.0")
    assert tags(registry) == {None: receipt.digest}
    assert verify(registry, f"small@{receipt.digest}")
    with pytest.raises(UsageError, match="there is no small:latest"):
        untag(registry, "small:latest")


@pytest.mark.parametrize("reference", ["small", "small@sha256:" + "0" * 64, "sha256:" + "0" * 64])
def test_only_a_tag_that_is_written_out_is_taken_away(
    run: Path, registry: Path, publish_signed: Publish, reference: str
) -> None:
    publish_signed(run)
    with pytest.raises(UsageError):
        untag(registry, reference)
    assert "latest" in tags(registry)


def test_a_channel_moves_by_promotion_alone(
    make_run: MakeRun, registry: Path, publish_signed: Publish, helpers: Any
) -> None:
    one = publish_signed(make_run("one"), tags=("1.0",))
    other = make_run("two", files={"model.onnx": b"two"})
    publish_signed(other, tags=("2.0",))
    promote(registry, "small:1.0", "production")
    before = helpers.snapshot(registry)
    for move in (
        lambda: set_tag(registry, "small:2.0", "production", force=True),
        lambda: publish_signed(other, tags=("production",), force=True),
    ):
        with pytest.raises(UsageError, match="small:production is a channel, into which artifacts are promoted"):
            move()
    with pytest.raises(UsageError, match="small:production is a channel; without its tag"):
        untag(registry, "small:production")
    assert helpers.snapshot(registry) == before
    assert not set_tag(registry, "small:1.0", "production").changed
    assert untag(registry, "small:production", force=True).previous == one.digest


def test_bad_tags(run: Path, registry: Path, publish_signed: Publish) -> None:
    publish_signed(run)
    with pytest.raises(UsageError, match="cannot be a tag"):
        set_tag(registry, "small", "a b")
    with pytest.raises(UsageError, match="there is no small:other"):
        set_tag(registry, "small:other", "new")
