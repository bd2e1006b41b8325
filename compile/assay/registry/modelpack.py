"""An artifact directory as a ModelPack: one raw layer per file, a model config, a manifest; and back again, checked.

Source: CNCF ModelPack specification v0.0.7 (docs/spec.md, docs/config.md, schema/config-schema.json).  The bytes
depend on the files alone: no createdAt, no file times or owners.  The config schema refuses keys of our own, so that
Assay's facts are manifest annotations `dev.assay.*`.  Left out on purpose: tar and compressed layers (nothing of
others is ever unpacked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from assay.artifact import LOCK_NAME, MANIFEST_NAME, bundle_digest, read_manifest, refuse_code
from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.files import canonical_json, list_files, sha256_bytes, sha256_file, unsafe_name
from assay.registry.oci import (
    DIGEST,
    MANIFEST_TYPE,
    TITLE,
    Descriptor,
    Manifest,
    describe,
    parse_json,
    parse_manifest,
    read_small,
)

MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
FILEPATH = "org.cncf.model.filepath"

BUNDLE = "dev.assay.bundle.digest"
RECIPE = "dev.assay.recipe.digest"
# Annotation → the manifest.json key that it repeats, so that a listing needs no layer.
_REPEATED = {
    "dev.assay.scheme": "scheme",
    "dev.assay.method": "method",
    "dev.assay.source": "source",
    "dev.assay.target": "target",
}
_DOC_STEMS = frozenset({"readme", "license", "licence", "notice", "copying"})
_DOC_SUFFIXES = frozenset({".md", ".html", ".pdf", ".rst"})
_CONFIG_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".yaml", ".yml", ".tiktoken", ".pbtxt"})
_NUMBERS = (
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "float8_e4m3",
    "float8_e5m2",
    "complex32",
    "complex64",
    "complex128",
)
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
_PRECISIONS = frozenset((*_NUMBERS, *_INTEGERS))
_MAX_PART_BYTES = 255


@dataclass(frozen=True)
class Pack:
    """A model's manifest: its bytes, its config, the layer of each file by name."""

    manifest: bytes
    config: Descriptor
    layers: dict[str, Descriptor]
    annotations: dict[str, str]

    @property
    def descriptor(self) -> Descriptor:
        """What names the whole model."""
        return describe_model(self.manifest)

    @property
    def bundle_digest(self) -> str:
        """The digest of the artifact directory (assay.artifact)."""
        return self.annotations[BUNDLE]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(layer.size for layer in self.layers.values())


def describe_model(manifest: bytes) -> Descriptor:
    """The descriptor that names a model: of its manifest."""
    return Descriptor(MANIFEST_TYPE, sha256_bytes(manifest), len(manifest), {}, MODEL_TYPE)


def build_pack(artifact: Path) -> tuple[Pack, bytes]:
    """Hash every file of an artifact directory and describe it as a ModelPack: same files, same bytes, always.

    Returns the pack and its config blob.  Raises IntegrityError for links, unsafe names, a missing manifest.json and
    configurations that load code, NotSupportedError for unknown formats.
    """
    if not artifact.is_dir():
        raise UsageError(f"{artifact}: there is no such directory. Give the directory of an artifact that was built.")
    about = read_manifest(artifact)
    refuse_code(artifact)
    lock_path = artifact / LOCK_NAME
    lock = parse_json(read_small(lock_path), str(lock_path)) if lock_path.is_file() else {}
    layers: dict[str, Descriptor] = {}
    for name in list_files(artifact):
        path = artifact / name
        layers[name] = Descriptor(
            media_type(name), sha256_file(path), path.stat().st_size, {FILEPATH: name, TITLE: name}
        )
    return _assemble(layers, about, lock, where=str(artifact))


def read_pack(data: bytes, where: str) -> Pack:
    """Check a model manifest from outside: its types, the safety of its names, its bundle digest.

    Raises IntegrityError.  The config blob that it names is checked by `check_config`.
    """
    manifest = parse_manifest(data, where)
    if manifest.artifact_type != MODEL_TYPE or manifest.config.media_type != CONFIG_TYPE:
        raise IntegrityError(
            f"{where}: not a model, but {manifest.artifact_type!r} with {manifest.config.media_type!r}."
        )
    layers: dict[str, Descriptor] = {}
    for index, layer in enumerate(manifest.layers):
        place = f"{where}: layers[{index}]"
        if layer.media_type not in (WEIGHT, WEIGHT_CONFIG, DOC):
            raise IntegrityError(
                f"{place}: media type {layer.media_type!r}; allowed: {WEIGHT}, {WEIGHT_CONFIG}, {DOC}."
            )
        layers[_layer_name(layer, place)] = layer
    if len(layers) != len(manifest.layers):
        raise IntegrityError(f"{where}: two layers have one name.")
    _check_collisions(list(layers), where)
    found = bundle_digest({name: layer.digest for name, layer in layers.items()})
    if (promised := manifest.annotations.get(BUNDLE)) != found:
        raise IntegrityError(f"{where}: its layers have the bundle digest {found}, but {BUNDLE} says {promised}.")
    return Pack(data, manifest.config, layers, manifest.annotations)


def check_config(config: bytes, pack: Pack, where: str) -> dict[str, Any]:
    """Parse a config blob; IntegrityError unless it lists the layers of the manifest, in order."""
    value = parse_json(config, where)
    if value.get("modelfs") != {"type": "layers", "diffIds": [layer.digest for layer in pack.layers.values()]}:
        raise IntegrityError(f"{where}: its modelfs does not list the layers of the manifest.")
    return value


def media_type(name: str) -> str:
    """The kind of a file by its name: doc, weight.config, or, when in doubt, weight."""
    path = PurePosixPath(name.lower())
    documents = path.suffix in _DOC_SUFFIXES or path.name.split(".")[0] in _DOC_STEMS
    if documents or name in (MANIFEST_NAME, LOCK_NAME):
        return DOC
    return WEIGHT_CONFIG if path.suffix in _CONFIG_SUFFIXES else WEIGHT


def recipe_digest(lock: dict[str, Any]) -> str | None:
    """The digest of the recipe that a lock belongs to: lock["recipe"], a digest or an object with one."""
    recipe = lock.get("recipe")
    if isinstance(recipe, dict):
        recipe = cast("dict[str, Any]", recipe).get("digest")
    return recipe if isinstance(recipe, str) and DIGEST.fullmatch(recipe) else None


def _assemble(
    layers: dict[str, Descriptor], about: dict[str, Any], lock: dict[str, Any], where: str
) -> tuple[Pack, bytes]:
    config = canonical_json(
        {
            "descriptor": _about_model(about),
            "config": _about_format(layers, about, where),
            "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers.values()]},
        }
    )
    annotations = {BUNDLE: bundle_digest({name: layer.digest for name, layer in layers.items()})}
    if digest := recipe_digest(lock):
        annotations[RECIPE] = digest
    for annotation, key in _REPEATED.items():
        if text := _text(about, key):
            annotations[annotation] = text
    manifest = Manifest(MODEL_TYPE, describe(config, CONFIG_TYPE), tuple(layers.values()), annotations)
    return Pack(manifest.to_bytes(), manifest.config, layers, annotations), config


def _about_model(about: dict[str, Any]) -> dict[str, str]:
    """The config's `descriptor`: the name, and where the model came from when that is a public place."""
    descriptor: dict[str, str] = {}
    if name := _text(about, "name"):
        descriptor["name"] = name
    if (source := _text(about, "source")) and source.startswith("hf:"):
        descriptor["sourceURL"] = "https://huggingface.co/" + source.removeprefix("hf:")
    return descriptor


def _about_format(layers: dict[str, Descriptor], about: dict[str, Any], where: str) -> dict[str, str]:
    """The config's `config`.  There is no word for 4-bit precision in it, so that `quantization` carries the scheme."""
    suffixes = {PurePosixPath(name).suffix for name in layers}
    known = [suffix for suffix in (".onnx", ".safetensors") if suffix in suffixes]
    if not known:
        raise NotSupportedError(f"{where}: no .onnx and no .safetensors file; other formats cannot be published yet.")
    result = {"format": known[0].removeprefix(".")}
    if architecture := _text(about, "architecture"):
        result["architecture"] = architecture
    if (precision := _text(about, "precision")) and all(part in _PRECISIONS for part in precision.split(",")):
        result["precision"] = precision
    scheme, method = _text(about, "scheme"), _text(about, "method")
    if scheme and scheme != "none":
        result["quantization"] = "-".join(part.lower() for part in (scheme, method) if part)
    return result


def _text(value: dict[str, Any], key: str) -> str | None:
    text = value.get(key)
    return text if isinstance(text, str) and text else None


def _layer_name(layer: Descriptor, where: str) -> str:
    """The file name of a layer; IntegrityError when it could lead out of the destination or is not usable."""
    name = layer.annotations.get(FILEPATH)
    if name is None or layer.annotations.get(TITLE) != name:
        raise IntegrityError(f"{where}: {FILEPATH} and {TITLE} must both hold the file name.")
    if reason := unsafe_name(name):
        raise IntegrityError(f"{where}: the file name {name!r} is refused: {reason}.")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in name):
        raise IntegrityError(f"{where}: the file name {name!r} is not Unicode text.")
    if any(len(part.encode()) > _MAX_PART_BYTES for part in name.split("/")):
        raise IntegrityError(f"{where}: the file name {name!r} has a part longer than {_MAX_PART_BYTES} bytes.")
    return name


def _check_collisions(names: Sequence[str], where: str) -> None:
    """IntegrityError when names meet on disk: equal but for case, or one a file and in another a directory."""
    files = {name.casefold() for name in names}
    if len(files) != len(names):
        raise IntegrityError(f"{where}: two file names differ in case alone.")
    for name in names:
        for parent in PurePosixPath(name.casefold()).parents:
            if str(parent) in files:
                raise IntegrityError(f"{where}: {name!r} lies in a directory that is also a file.")
