"""An artifact is named by the digest of all of its bytes and names, and of nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from assay.artifact import (
    MANIFEST_NAME,
    bundle_digest,
    directory_digest,
    file_digests,
    read_manifest,
    refuse_code,
    size_bytes,
)
from assay.errors import IntegrityError
from assay.files import readable_json, sha256_bytes


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "artifact"
    (directory / "onnx").mkdir(parents=True)
    (directory / "onnx/model.onnx").write_bytes(b"graph")
    (directory / "config.json").write_bytes(b"{}")
    (directory / MANIFEST_NAME).write_bytes(readable_json({"version": 1, "name": "x"}))
    return directory


def test_the_digest_is_of_sorted_names_and_digests(artifact: Path) -> None:
    files = file_digests(artifact)
    assert list(files) == ["config.json", MANIFEST_NAME, "onnx/model.onnx"]
    assert files["config.json"] == sha256_bytes(b"{}")
    spelled = ",".join(f'["{name}","{digest}"]' for name, digest in files.items())
    assert directory_digest(artifact) == bundle_digest(files) == sha256_bytes(f"[{spelled}]".encode())
    assert bundle_digest(dict(reversed(files.items()))) == bundle_digest(files)


def test_place_time_and_mode_do_not_count(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "another place")
    os.utime(copy / "config.json", (0, 0))
    (copy / "config.json").chmod(0o600)
    assert directory_digest(copy) == directory_digest(artifact)


def test_every_byte_and_every_name_counts(artifact: Path) -> None:
    digests = {directory_digest(artifact)}
    (artifact / "onnx/model.onnx").write_bytes(b"grapH")
    digests.add(directory_digest(artifact))
    (artifact / "onnx/model.onnx").rename(artifact / "onnx/Model.onnx")
    digests.add(directory_digest(artifact))
    (artifact / "empty").touch()
    digests.add(directory_digest(artifact))
    (artifact / "empty").unlink()
    (artifact / "config.json").unlink()
    digests.add(directory_digest(artifact))
    assert len(digests) == 5


def test_the_size_is_that_of_all_files(artifact: Path) -> None:
    assert size_bytes(artifact) == len(b"graph{}") + (artifact / MANIFEST_NAME).stat().st_size


def test_the_manifest_is_read_and_its_version_checked(artifact: Path) -> None:
    assert read_manifest(artifact)["name"] == "x"
    for data, words in (
        (b'{"version": 2}', "not a version 1 manifest"),
        (b"[1]", "not a version 1 manifest"),
        (b"{", "not valid JSON"),
    ):
        (artifact / MANIFEST_NAME).write_bytes(data)
        with pytest.raises(IntegrityError, match=words):
            read_manifest(artifact)
    (artifact / MANIFEST_NAME).unlink()
    with pytest.raises(IntegrityError, match=r"no manifest\.json"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        (
            "genai_config.json",
            {"model": {"decoder": {"session_options": {"custom_ops_library": "x"}}}},
            "custom_ops_library",
        ),
        ("genai_config.json", {"model": {"pipeline": [{"x": {"custom_ops_library": ""}}]}}, "custom_ops_library"),
        ("config.json", {"auto_map": {"AutoModel": "model.Model"}}, "auto_map"),
    ],
)
def test_a_configuration_that_loads_code_is_refused(artifact: Path, name: str, content: object, key: str) -> None:
    refuse_code(artifact)
    (artifact / name).write_bytes(readable_json(content))
    with pytest.raises(IntegrityError, match=f"{name}: {key} makes a runtime load code"):
        refuse_code(artifact)
