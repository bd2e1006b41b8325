"""The bill of materials of a published model: CycloneDX 1.6 with a model card, as JSON with one spelling.

Source: CycloneDX 1.6 (bom-1.6.schema.json; component, modelCard).  The serial number is derived from what is described
and no time is written: the same artifact gives the same bytes.  Left out on purpose: licences, which neither recipe
nor lock knows.
"""

from __future__ import annotations

import uuid
from typing import Any, cast

from assay.registry.oci import DIGEST, Descriptor
from assay.registry.statements import PREDICATES, Statement, package_url, source_uri

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:assay:bom:v1")
_MODEL, _SOURCE, _CALIBRATION = "model", "source", "calibration"


def bom(
    name: str,
    digest: str,
    *,
    about: dict[str, Any],
    lock: dict[str, Any],
    verdict: dict[str, Any],
    files: dict[str, Descriptor],
) -> Statement:
    """The bill of materials as a statement.  about, lock, verdict: contents of manifest.json, assay.lock.json, verdict.json."""
    packages = [_package(package, str(version)) for package, version in sorted(_part(lock, "tools").items())]
    materials = [*_source(lock), *_calibration(lock)]
    predicate = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, f'{name}@{digest}')}",
        "version": 1,
        "metadata": {"component": _model(name, digest, about, verdict, files)},
        "components": [*materials, *packages],
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [part["bom-ref"] for part in (*materials, *packages)]},
            *({"ref": part["bom-ref"]} for part in (*materials, *packages)),
        ],
    }
    return Statement(name, digest, PREDICATES["bom"], predicate)


def _model(
    name: str, digest: str, about: dict[str, Any], verdict: dict[str, Any], files: dict[str, Descriptor]
) -> dict[str, Any]:
    facts = {key: about[key] for key in ("scheme", "method", "target", "runtime", "bits_per_weight") if key in about}
    parameters: dict[str, Any] = {}
    if isinstance(architecture := about.get("architecture"), str):
        parameters["modelArchitecture"] = architecture
        if architecture.endswith("ForCausalLM"):
            parameters["task"] = "text-generation"
    return {
        "bom-ref": _MODEL,
        "type": "machine-learning-model",
        "name": name,
        "version": digest,
        "hashes": _hashes(digest),
        "modelCard": {
            "modelParameters": parameters,
            "quantitativeAnalysis": {
                "performanceMetrics": [metric for row in _rows(verdict, "gates") for metric in _metrics(row)]
            },
        },
        "properties": [{"name": f"assay:{key}", "value": str(value)} for key, value in sorted(facts.items())],
        "components": [
            {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": _hashes(layer.digest)}
            for path, layer in files.items()
        ],
    }


def _metrics(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A gated metric as the candidate has it, and its difference from the baseline with the interval of that."""
    name, value, interval = str(row.get("metric")), row.get("candidate"), row.get("interval")
    measured = [] if value is None else [{"type": name, "value": repr(value)}]
    difference: dict[str, Any] = {"type": f"{name}.difference", "value": repr(row.get("difference"))}
    if isinstance(interval, list) and len(bounds := cast("list[Any]", interval)) == 2:
        difference["confidenceInterval"] = {"lowerBound": repr(bounds[0]), "upperBound": repr(bounds[1])}
    return measured if row.get("difference") is None else [*measured, difference]


def _source(lock: dict[str, Any]) -> list[dict[str, Any]]:
    model = _part(lock, "model")
    if not DIGEST.fullmatch(str(model.get("digest"))):
        return []
    uri = source_uri(str(model.get("source")), model.get("commit"))
    found: dict[str, Any] = {
        "bom-ref": _SOURCE,
        "type": "machine-learning-model",
        "name": str(model.get("source")),
        "hashes": _hashes(model["digest"]),
    }
    if isinstance(model.get("commit"), str):
        found["version"] = model["commit"]
    return [found | ({"purl": uri} if uri.startswith("pkg:") else {})]


def _calibration(lock: dict[str, Any]) -> list[dict[str, Any]]:
    used = _part(lock, "calibration")
    if not DIGEST.fullmatch(str(used.get("text_digest"))):
        return []
    return [
        {
            "bom-ref": _CALIBRATION,
            "type": "data",
            "name": str(used.get("source")),
            "hashes": _hashes(used["text_digest"]),
            "data": [{"type": "dataset", "name": str(used.get("source"))}],
        }
    ]


def _package(name: str, version: str) -> dict[str, Any]:
    purl = package_url(name, version)
    return {"bom-ref": purl, "type": "library", "name": name, "version": version, "purl": purl}


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}]


def _part(value: dict[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _rows(value: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = value.get(key)
    return [row for row in cast("list[Any]", found) if isinstance(row, dict)] if isinstance(found, list) else []
