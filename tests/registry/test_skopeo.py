"""An independent client reads what we write, and we read what it copies: nothing depends on our own reading of OCI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from oci_server import OciServer

from assay.artifact import directory_digest
from assay.errors import IntegrityError
from assay.files import sha256_bytes
from assay.registry.inspection import verify
from assay.registry.publish import publish
from assay.registry.pull import pull

pytestmark = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed (Debian: skopeo)")


def skopeo(*arguments: str) -> bytes:
    return subprocess.run(["skopeo", *arguments], check=True, capture_output=True).stdout


def test_skopeo_reads_the_very_bytes(make_run: Callable[..., Path], registry: Path) -> None:
    digests: dict[str, str] = {}
    for version in ("1.0", "1.1"):
        run = make_run(version, files={"model.onnx": version.encode(), "empty.data": b""})
        digests[version] = publish(run / "artifact", run, registry, "small", [version, "latest"]).digest
    digests["latest"] = digests["1.1"]
    for tag, digest in digests.items():
        raw = skopeo("inspect", "--raw", f"oci:{registry}:small:{tag}")
        assert sha256_bytes(raw) == digest
    config = json.loads(skopeo("inspect", "--raw", "--config", f"oci:{registry}:small:latest"))
    assert config["config"]["format"] == "onnx"


def test_a_copy_by_skopeo_has_the_same_digest_and_can_be_pulled(run: Path, registry: Path, tmp_path: Path) -> None:
    receipt = publish(run / "artifact", run, registry, "small", ["1.0"])
    skopeo("copy", "--preserve-digests", f"oci:{registry}:small:1.0", f"oci:{tmp_path / 'copy'}:small:1.0")
    pulled = pull(tmp_path / "copy", "small:1.0", tmp_path / "out")
    assert pulled.digest == receipt.digest
    assert directory_digest(tmp_path / "out") == receipt.bundle_digest
    # skopeo copies no referrers: what it copied is intact, but nothing there proves it.
    with pytest.raises(IntegrityError, match="has no evidence"):
        verify(tmp_path / "copy", "small:1.0")


def test_a_registry_stays_ours_after_skopeo_wrote_to_it(run: Path, registry: Path, tmp_path: Path) -> None:
    receipt = publish(run / "artifact", run, registry, "small", ["1.0"])
    skopeo("copy", "--preserve-digests", f"oci:{registry}:small:1.0", f"oci:{registry}:copied:2.0")
    assert verify(registry, "copied:2.0").digest == receipt.digest
    again = publish(run / "artifact", run, registry, "small", ["1.0"])
    assert (again.created, again.evidence_created, again.blobs_written) == (False, False, 0)
    assert pull(registry, "copied:2.0", tmp_path / "out").digest == receipt.digest


def test_skopeo_copies_between_servers_and_directories(
    run: Path, registry: Path, oci_server: OciServer, tmp_path: Path
) -> None:
    place = f"{oci_server.host}/skopeo/{os.urandom(6).hex()}"
    receipt = publish(run / "artifact", run, f"oci://{place}", "small", ["1.0"])
    down, up = f"docker://{place}/small:1.0", f"docker://{place}/again:1.0"
    skopeo("copy", "--preserve-digests", "--src-tls-verify=false", down, f"oci:{registry}:small:1.0")
    assert pull(registry, "small:1.0", tmp_path / "out").digest == receipt.digest
    skopeo("copy", "--preserve-digests", "--dest-tls-verify=false", f"oci:{registry}:small:1.0", up)
    pulled = pull(tmp_path, f"oci://{place}/again@{receipt.digest}", tmp_path / "again")
    assert (pulled.digest, directory_digest(tmp_path / "again")) == (receipt.digest, receipt.bundle_digest)
    # Publishing the run to the copy adds the evidence, and nothing else.
    again = publish(run / "artifact", run, f"oci://{place}", "again", ["1.0"])
    assert (again.created, again.tags_set, again.evidence_created) == (False, (), True)
    assert verify(f"oci://{place}", "again:1.0").digest == receipt.digest
