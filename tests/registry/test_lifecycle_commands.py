"""The commands on keys, tags, channels, differences and removal: what they say, their JSON and their exit codes."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRun = Callable[..., Path]
Publish = Callable[..., Any]
Keys = Callable[[str], Any]
Assay = Callable[..., Any]


@pytest.fixture
def store(make_run: MakeRun, registry: Path, publish_signed: Publish) -> Path:
    """Two artifacts, tagged 1 and 2."""
    for tag in "12":
        publish_signed(make_run(f"run{tag}", files={"model.onnx": tag.encode()}), tags=(tag,))
    return registry


def test_keygen(tmp_path: Path, assay: Assay, monkeypatch: pytest.MonkeyPatch) -> None:
    done = assay("keygen", "release", "--no-password", cwd=tmp_path)
    assert done.returncode == 0 and "NOT encrypted" in done.stdout, done.stderr
    assert stat.S_IMODE((tmp_path / "release").stat().st_mode) == 0o600
    again = assay("keygen", "release", "--no-password", cwd=tmp_path)
    assert again.returncode == 2 and "keys are not overwritten" in again.stderr
    monkeypatch.delenv("ASSAY_KEY_PASSWORD", raising=False)
    bare = assay("keygen", "other", cwd=tmp_path)
    assert bare.returncode == 2 and "a new key needs a password" in bare.stderr
    monkeypatch.setenv("MINE", "secret")
    made = assay("keygen", "other", "--password-env", "MINE", "--type", "ecdsa", "--json", cwd=tmp_path)
    value = json.loads(made.stdout)
    assert (made.returncode, value["encrypted"], value["public"]) == (0, True, "other.pub")
    assert "secret" not in made.stdout
    wrong = assay("keygen", "third", "--type", "rsa", "--no-password", cwd=tmp_path)
    assert wrong.returncode == 2 and "allowed: ed25519, ecdsa" in wrong.stderr
    both = assay("keygen", "third", "--no-password", "--password-env", "MINE", cwd=tmp_path)
    assert both.returncode == 2 and not (tmp_path / "third").exists()


def test_promotion_and_rollback(
    store: Path, assay: Assay, policy: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = ("--registry", store, "--policy", policy)
    by = ("--key", keys("release").private)
    first = assay("promote", "small:1", "--to", "production", *trust, *by)
    assert first.returncode == 0 and "promoted" in first.stdout and "record     1, signed" in first.stdout, first.stderr
    monkeypatch.setenv("SIGNING_KEY", keys("release").private.read_text())
    second = assay("promote", "small:2", "--to", "production", *trust, "--key", "env:SIGNING_KEY", "--json")
    assert json.loads(second.stdout)["sequence"] == 2
    refused = assay("promote", "small:1", "--to", "production", *trust, "--key", keys("ci").private)
    assert refused.returncode == 5 and "who may not sign a promotion into production" in refused.stderr
    back = assay("rollback", "small", "--channel", "production", *trust, *by)
    assert back.returncode == 0 and "back to" in back.stdout
    pulled = assay("pull", "small:production", store.parent / "out", *trust)
    assert pulled.returncode == 0 and "trusted    promotion into production: signed by release" in pulled.stdout
    for asked in (store.parent / "out", "small:1"):
        assert assay("verify", asked, *trust, "--channel", "production").returncode == 0
        other = assay("verify", asked, *trust, "--channel", "staging")
        assert other.returncode == 5 and "nobody may promote small into 'staging'" in other.stderr
    bare = assay("verify", "small:1", "--registry", store, "--channel", "production")
    assert bare.returncode == 2 and "add --policy" in bare.stderr
    shown = assay("show", "small:production", "--registry", store)
    assert "rollback 3 in channel production" in shown.stdout and keys("release").key_id in shown.stdout
    listed = json.loads(assay("list", "--registry", store, "--json").stdout)
    assert {row["tag"]: row["promoted"] for row in listed}["production"] == ["production"]
    moved = assay("tag", "small:2", "production", "--registry", store)
    assert moved.returncode == 2 and "is a channel" in moved.stderr


def test_verify_says_whether_signatures_were_checked(store: Path, assay: Assay, policy: Path, tmp_path: Path) -> None:
    plain = assay("verify", "small:1", "--registry", store)
    assert plain.returncode == 0 and "signatures not checked: no --policy was given" in plain.stdout
    checked = assay("verify", "small:1", "--registry", store, "--policy", policy)
    assert "trusted    test-result: signed by ci" in checked.stdout
    policy.write_text(policy.read_text().replace("test-result", "bom-result", 1))
    wrong = assay("verify", "small:1", "--registry", store, "--policy", policy)
    assert wrong.returncode == 2 and f"{policy}:" in wrong.stderr and "allowed: 'test-result'" in wrong.stderr
    absent = assay("pull", "small:1", tmp_path / "out", "--registry", store, "--policy", tmp_path / "none.yaml")
    assert absent.returncode == 2 and "cannot be read" in absent.stderr and not (tmp_path / "out").exists()


def test_tags_differences_and_removal(store: Path, assay: Assay) -> None:
    at = ("--registry", store)
    found = assay("diff", "small:1", "small:2", *at)
    assert found.returncode == 0 and "changed    model.onnx (1 B → 1 B)" in found.stdout
    assert json.loads(assay("diff", "small:1", "small:1", *at, "--json").stdout)["files"] == []
    assert "tagged" in assay("tag", "small:1", "stable", *at).stdout
    digest = json.loads(assay("untag", "small:1", *at, "--json").stdout)["previous"]
    tagged = assay("remove", f"small@{digest}", *at)
    assert tagged.returncode == 2 and "is tagged stable" in tagged.stderr
    assay("untag", "small:stable", *at)
    assert "stay until `assay gc`" in assay("remove", f"small@{digest}", *at).stdout
    young = assay("gc", *at)
    assert "left" in young.stdout and "younger than 24.0 h" in young.stdout, young.stdout
    planned = json.loads(assay("gc", *at, "--grace", "0s", "--dry-run", "--json").stdout)
    assert json.loads(assay("gc", *at, "--grace", "0s", "--json").stdout)["removed"] == planned["removed"] != []
    wrong = assay("gc", *at, "--grace", "soon")
    assert wrong.returncode == 2 and "is not a duration" in wrong.stderr
    assert assay("gc", "--registry", store / "none").returncode == 2
