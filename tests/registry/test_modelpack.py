from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.artifact import bundle_digest, directory_digest
from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.files import canonical_json, sha256_bytes, unsafe_name
from assay.registry.modelpack import DOC, WEIGHT, WEIGHT_CONFIG, build_pack, check_config, media_type, read_pack
from assay.registry.oci import MAX_JSON_BYTES

GOLDEN = "sha256:5ed82546fa94628532e072ec45521e9945dd80a43ed41564440bdf30ae594232"
# ModelPack v0.0.7, schema/config-schema.json: additionalProperties is false in each of these.
ALLOWED = {
    "": {"descriptor", "config", "modelfs"},
    "descriptor": {
        *("createdAt", "authors", "family", "name", "docURL", "sourceURL", "datasetsURL", "version", "revision"),
        *("vendor", "licenses", "title", "description"),
    },
    "config": {"architecture", "format", "paramSize", "precision", "quantization", "capabilities"},
    "modelfs": {"type", "diffIds"},
}


def test_the_golden_artifact_has_its_golden_digest(run: Path) -> None:
    pack, _ = build_pack(run / "artifact")
    assert pack.descriptor.digest == GOLDEN


def test_the_manifest_is_what_the_specification_asks_for(run: Path) -> None:
    pack, config = build_pack(run / "artifact")
    manifest = json.loads(pack.manifest)
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["config"] == {
        "mediaType": "application/vnd.cncf.model.config.v1+json",
        "digest": sha256_bytes(config),
        "size": len(config),
    }
    names = [layer["annotations"]["org.cncf.model.filepath"] for layer in manifest["layers"]]
    assert names == sorted(path.name for path in (run / "artifact").iterdir())
    for layer, name in zip(manifest["layers"], names, strict=True):
        data = (run / "artifact" / name).read_bytes()
        assert (layer["digest"], layer["size"]) == (sha256_bytes(data), len(data))
        assert layer["annotations"]["org.opencontainers.image.title"] == name
    assert manifest["annotations"] == {
        "dev.assay.bundle.digest": directory_digest(run / "artifact"),
        "dev.assay.recipe.digest": sha256_bytes(b"a recipe"),
        "dev.assay.target": "onnxruntime-genai",
        "dev.assay.scheme": "W4A16",
        "dev.assay.method": "gptq",
        "dev.assay.source": "hf:org/small",
    }


def test_the_config_keeps_to_the_schema(run: Path) -> None:
    pack, data = build_pack(run / "artifact")
    config = json.loads(data)
    assert set(config) == ALLOWED[""]
    for part in ("descriptor", "config", "modelfs"):
        assert set(config[part]) <= ALLOWED[part]
    assert config["descriptor"] == {"name": "small", "sourceURL": "https://huggingface.co/org/small"}
    assert config["config"] == {"architecture": "llama", "format": "onnx", "quantization": "w4a16-gptq"}
    assert config["modelfs"]["diffIds"] == [layer.digest for layer in pack.layers.values()]


def test_only_names_and_bytes_count(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    copy.mkdir(parents=True)
    for path in sorted((run / "artifact").iterdir(), reverse=True):
        shutil.copyfile(path, copy / path.name)
        (copy / path.name).chmod(0o600)
        os.utime(copy / path.name, (1, 1))
    assert build_pack(copy) == build_pack(run / "artifact")
    (copy / "tokenizer.json").rename(copy / "tokenizer2.json")
    assert build_pack(copy)[0].descriptor != build_pack(run / "artifact")[0].descriptor


def test_metadata_that_is_missing_is_left_out(make_run: Callable[..., Path]) -> None:
    about = {"scheme": "none", "method": None, "source": {"path": "x"}, "architecture": "", "precision": "int4"}
    run = make_run(about=about, files={"a/model.safetensors": b"x"})
    (run / "artifact/assay.lock.json").unlink()
    pack, config = build_pack(run / "artifact")
    assert json.loads(config)["config"] == {"format": "safetensors"}
    assert json.loads(config)["descriptor"] == {"name": "small"}
    assert set(pack.annotations) == {"dev.assay.bundle.digest", "dev.assay.scheme", "dev.assay.target"}


def test_precisions_of_the_specification_are_kept(make_run: Callable[..., Path]) -> None:
    _, config = build_pack(make_run(about={"precision": "float16,float8_e4m3"}) / "artifact")
    assert json.loads(config)["config"]["precision"] == "float16,float8_e4m3"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.onnx", WEIGHT),
        ("model.onnx.data", WEIGHT),
        ("model-00001-of-00002.safetensors", WEIGHT),
        ("weights", WEIGHT),
        ("tokenizer.json", WEIGHT_CONFIG),
        ("merges.txt", WEIGHT_CONFIG),
        ("chat_template.jinja", WEIGHT_CONFIG),
        ("tokenizer.model", WEIGHT_CONFIG),
        ("model.safetensors.index.json", WEIGHT_CONFIG),
        ("README.md", DOC),
        ("LICENSE", DOC),
        ("license.txt", DOC),
        ("manifest.json", DOC),
        ("assay.lock.json", DOC),
        ("nested/manifest.json", WEIGHT_CONFIG),
    ],
)
def test_kinds_of_files(name: str, kind: str) -> None:
    assert media_type(name) == kind


def test_what_cannot_be_packed(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        build_pack(tmp_path / "nowhere")
    with pytest.raises(IntegrityError, match=r"no manifest\.json"):
        build_pack(tmp_path)
    with pytest.raises(NotSupportedError, match=r"no \.onnx and no \.safetensors"):
        build_pack(make_run("other", files={"model.gguf": b"x"}) / "artifact")
    linked = make_run("linked") / "artifact"
    (linked / "more.data").symlink_to(linked / "model.onnx")
    with pytest.raises(IntegrityError, match="link"):
        build_pack(linked)


# Manifests of others


def rewrite(pack_bytes: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Change a manifest, and mend its bundle digest so that only the change itself can be what is refused."""
    value = json.loads(pack_bytes)
    change(value)
    names = [layer["annotations"]["org.cncf.model.filepath"] for layer in value["layers"]]
    digests = [layer["digest"] for layer in value["layers"]]
    value["annotations"]["dev.assay.bundle.digest"] = bundle_digest(dict(zip(names, digests, strict=True)))
    # Not canonical_json: a lone surrogate must get through.
    return json.dumps(value).encode()


def named(name: str) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        value["layers"][0]["annotations"] = {"org.cncf.model.filepath": name, "org.opencontainers.image.title": name}

    return change


def test_a_manifest_reads_back(run: Path) -> None:
    pack, config = build_pack(run / "artifact")
    read = read_pack(pack.manifest, "here")
    assert read == pack
    assert check_config(config, read, "here") == json.loads(config)


@pytest.mark.parametrize(
    "name",
    [
        "../escape",
        "/etc/passwd",
        "a/../../b",
        "a//b",
        "./a",
        "a\\b",
        "C:x",
        "nul\0",
        "",
        "x.py",
        "weights.bin",
        "pickle.PT",
        "e\u0301",
        "x" * 256,
        "d/" + "é" * 128,
        "model.onnx",
        "MODEL.onnx",
        "model.onnx/below",
        "Model.Onnx/below",
    ],
)
def test_hostile_names_are_refused(run: Path, name: str) -> None:
    pack, _ = build_pack(run / "artifact")
    with pytest.raises(IntegrityError):
        read_pack(rewrite(pack.manifest, named(name)), "here")


def test_a_name_that_is_not_unicode_is_refused(run: Path) -> None:
    pack, _ = build_pack(run / "artifact")
    text = rewrite(pack.manifest, named("PLACE")).replace(b"PLACE", b"\\ud800")
    with pytest.raises(IntegrityError, match="not Unicode text"):
        read_pack(text, "here")


@given(st.text(max_size=40))
def test_a_name_that_is_accepted_stays_inside(name: str) -> None:
    digest = sha256_bytes(b"")
    layer = {
        "mediaType": WEIGHT,
        "digest": digest,
        "size": 0,
        "annotations": {"org.cncf.model.filepath": name, "org.opencontainers.image.title": name},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": {"mediaType": "application/vnd.cncf.model.config.v1+json", "digest": digest, "size": 0},
        "layers": [layer],
        "annotations": {"dev.assay.bundle.digest": bundle_digest({name: digest})},
    }
    try:
        pack = read_pack(canonical_json(manifest), "here")
    except IntegrityError:
        assert unsafe_name(name) or len(name.encode()) > 255
        return
    assert unsafe_name(name) is None
    inside = os.path.normpath(os.path.join("/safe", name))  # noqa: PTH118
    assert inside.startswith("/safe/") and list(pack.layers) == [name]


def set_at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("schemaVersion", to=1), "not an OCI image manifest"),
        (set_at("mediaType", to="application/vnd.oci.image.index.v1+json"), "not an OCI image manifest"),
        (set_at("artifactType", to="application/vnd.docker"), "not a model"),
        (set_at("artifactType", to=None), "artifactType"),
        (set_at("config", "mediaType", to="application/vnd.oci.empty.v1+json"), "not a model"),
        (set_at("config", to=None), "must be an object"),
        (set_at("layers", 0, "mediaType", to="application/vnd.cncf.model.weight.v1.tar"), "media type"),
        (set_at("layers", 0, "size", to=-1), "size is -1"),
        (set_at("layers", 0, "size", to=1 << 60), "size is"),
        (set_at("layers", 0, "size", to=True), "size is True"),
        (set_at("layers", 0, "size", to=1.0), "size is 1.0"),
        (set_at("layers", 0, "digest", to="sha512:" + "0" * 128), "allowed: sha256"),
        (set_at("layers", 0, "digest", to="sha256:../../../etc/passwd"), "allowed: sha256"),
        (set_at("layers", 0, "annotations", "org.opencontainers.image.title", to="other"), "must both hold"),
        (set_at("layers", 0, "annotations", "x", to=1), "a text is needed"),
        (set_at("subject", to={}), "subject: mediaType"),
    ],
)
def test_hostile_manifests_are_refused(run: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    pack, _ = build_pack(run / "artifact")
    with pytest.raises(IntegrityError, match=message):
        read_pack(rewrite(pack.manifest, change), "here")


@pytest.mark.parametrize("part", ["layers", "annotations"])
def test_a_manifest_of_wrong_types_is_refused(run: Path, part: str) -> None:
    value = json.loads(build_pack(run / "artifact")[0].manifest)
    value[part] = "text"
    with pytest.raises(IntegrityError, match=f"{part} is not a"):
        read_pack(canonical_json(value), "here")


def test_a_wrong_bundle_digest_is_refused(run: Path) -> None:
    value = json.loads(build_pack(run / "artifact")[0].manifest)
    value["annotations"]["dev.assay.bundle.digest"] = sha256_bytes(b"other")
    with pytest.raises(IntegrityError, match="bundle digest"):
        read_pack(canonical_json(value), "here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"a":NaN}',
        b'{"layers":[],"layers":[]}',
        b"[" * 100_000,
        b'{"size":' + b"9" * 5000 + b"}",
        b" " * (MAX_JSON_BYTES + 1),
    ],
)
def test_bytes_that_are_not_json_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        read_pack(data, "here")


def test_a_config_of_other_layers_is_refused(run: Path) -> None:
    pack, config = build_pack(run / "artifact")
    value = json.loads(config)
    value["modelfs"]["diffIds"].reverse()
    with pytest.raises(IntegrityError, match="does not list the layers"):
        check_config(canonical_json(value), pack, "here")
