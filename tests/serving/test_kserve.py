"""KServe's InferenceService against a hand-derived part of its resource definition, and the image that it mounts."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from assay.errors import UsageError
from assay.files import sha256_bytes, sha256_file
from assay.serving.make import Options, make_serving

MakeArtifact = Callable[..., Path]
DIGEST = "sha256:" + "ab" * 32
# Of serving.kserve.io_inferenceservices.yaml (KServe 0.20): the fields that are written, their types, and that there are no others.
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_RESOURCES = {"type": "object", "additionalProperties": False, "properties": {"limits": _STRINGS, "requests": _STRINGS}}
_MODEL = {
    "type": "object",
    "additionalProperties": False,
    "required": ["modelFormat", "storageUri"],
    "properties": {
        "modelFormat": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {"name": {"type": "string"}, "version": {"type": "string"}},
        },
        "storageUri": {"type": "string"},
        "args": {"type": "array", "items": {"type": "string"}},
        "env": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": False,
                "properties": {"name": {"type": "string"}, "value": {"type": "string"}},
            },
        },
        "resources": _RESOURCES,
    },
}
_PREDICTOR = {"type": "object", "additionalProperties": False, "required": ["model"], "properties": {"model": _MODEL}}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "serving.kserve.io/v1beta1"},
        "kind": {"const": "InferenceService"},
        "metadata": {
            "type": "object",
            "additionalProperties": False,
            "required": ["name"],
            "properties": {
                "name": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63},
                "annotations": _STRINGS,
            },
        },
        "spec": {"type": "object", "additionalProperties": False, "properties": {"predictor": _PREDICTOR}},
    },
}


def _service(directory: Path) -> dict[str, Any]:
    return yaml.safe_load((directory / "inferenceservice.yaml").read_text())


def test_the_service_is_of_the_form_that_kserve_takes(make_artifact: MakeArtifact) -> None:
    storage = f"oci+native://registry.example/m@{DIGEST}"
    serving = make_serving(make_artifact(cache=True), "kserve", options=Options(storage=storage))
    service = _service(serving.directory)
    jsonschema.validate(service, SCHEMA)
    model = service["spec"]["predictor"]["model"]
    assert service["metadata"]["annotations"] == {"dev.assay.digest": serving.digest} and model["storageUri"] == storage
    assert model["args"] == [
        *("--model_name=m", "--backend=vllm", "--dtype=bfloat16", "--load-format=safetensors", "--kv-cache-dtype=fp8")
    ]


def test_a_precision_that_is_no_word_is_not_passed_on(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(precision="float32 --trust-remote-code")
    serving = make_serving(artifact, "kserve", options=Options(storage="s3://bucket/m"))
    assert "trust" not in (serving.directory / "inferenceservice.yaml").read_text()


def _read_layout(layout: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest of a layout's image, and its files as a container sees them; every blob is what its name says."""
    blobs = layout / "blobs/sha256"
    for path in blobs.iterdir():
        assert sha256_file(path) == f"sha256:{path.name}"
    (entry,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    data = (blobs / entry["digest"][7:]).read_bytes()
    assert sha256_bytes(data) == entry["digest"] and len(data) == entry["size"]
    manifest = json.loads(data)
    config = json.loads((blobs / manifest["config"]["digest"][7:]).read_bytes())
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    files: dict[str, bytes] = {}
    for layer in manifest["layers"]:
        with tarfile.open(blobs / layer["digest"][7:]) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    files[member.name] = content.read()
    return manifest, files


def test_a_modelcar_holds_the_artifact_and_names_it(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    options = Options(storage="oci+native://registry.example/m", modelcar=tmp_path / "car")
    serving = make_serving(artifact, "kserve", options=options)
    assert serving.modelcar is not None
    manifest, files = _read_layout(tmp_path / "car")
    assert files == {f"models/{path.name}": path.read_bytes() for path in artifact.iterdir()}
    assert manifest["annotations"] == {"dev.assay.modelpack.digest": serving.digest}
    model = _service(serving.directory)["spec"]["predictor"]["model"]
    assert model["storageUri"] == f"oci+native://registry.example/m@{serving.modelcar.digest}"


def test_the_same_artifact_gives_the_same_image(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    from assay.serving.modelcar import write_modelcar

    artifact = make_artifact()
    nested = artifact / "sub/deep"
    nested.mkdir(parents=True)
    (nested / ("x" * 120 + ".json")).write_bytes(b"{}")
    first = write_modelcar(artifact, tmp_path / "one", "m", DIGEST)
    for path in artifact.rglob("*"):
        path.touch()
        path.chmod(0o777)
    second = write_modelcar(artifact, tmp_path / "two", "m", DIGEST)
    assert first.digest == second.digest
    assert "models/sub/deep/" + "x" * 120 + ".json" in _read_layout(tmp_path / "two")[1]
    (artifact / "tokenizer.json").write_bytes(b"{ }")
    assert write_modelcar(artifact, tmp_path / "three", "m", DIGEST).digest != first.digest


def test_a_layout_that_is_there_is_kept(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    (tmp_path / "car").mkdir()
    (tmp_path / "car/index.json").write_text("mine")
    options = Options(storage="oci+native://registry.example/m", modelcar=tmp_path / "car")
    with pytest.raises(UsageError, match="holds other files"):
        make_serving(make_artifact(), "kserve", options=options)
    assert (tmp_path / "car/index.json").read_text() == "mine"


def test_nothing_is_hashed_or_written_for_what_cannot_be(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assay.serving.make.verify_directory", lambda _: pytest.fail("hashed"))
    artifact = make_artifact()
    storage = "oci+native://registry.example/m"
    wrong = (
        Options(),
        Options(storage=storage),
        Options(storage=storage, modelcar=tmp_path / "car", name="m_1"),
        Options(storage="ftp://registry.example/m", modelcar=tmp_path / "car"),
    )
    for options in wrong:
        with pytest.raises(UsageError):
            make_serving(artifact, "kserve", options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_image_is_not_written_where_its_service_cannot_be(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    (tmp_path / "m.kserve").mkdir()
    (tmp_path / "m.kserve/notes").touch()
    options = Options(storage="oci+native://registry.example/m", modelcar=tmp_path / "car")
    with pytest.raises(UsageError, match="holds other files"):
        make_serving(make_artifact(), "kserve", options=options)
    assert not (tmp_path / "car").exists()


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_skopeo_copies_the_image_as_it_is(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    from assay.serving.modelcar import write_modelcar

    car = write_modelcar(make_artifact(), tmp_path / "car", "m", DIGEST)
    copy = [
        "skopeo",
        "--insecure-policy",
        "copy",
        "--preserve-digests",
        f"oci:{car.layout}:m",
        f"oci:{tmp_path / 'copy'}:m",
    ]
    subprocess.run(copy, check=True, capture_output=True)
    (entry,) = json.loads((tmp_path / "copy/index.json").read_bytes())["manifests"]
    assert entry["digest"] == car.digest
