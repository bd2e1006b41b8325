from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from assay.files import sha256_bytes
from assay.registry.bom import bom
from assay.registry.oci import Descriptor

MODEL = sha256_bytes(b"model")
LOCK: dict[str, Any] = {
    "model": {"source": "hf:org/small", "commit": "0" * 40, "digest": sha256_bytes(b"source")},
    "calibration": {"source": "python-docs", "text_digest": sha256_bytes(b"calibration")},
    "tools": {"assay": "0.1.0", "onnx-ir": "1.1.0", "torch": "2.13.0+cpu"},
}
ABOUT: dict[str, Any] = {
    "scheme": "W4A16",
    "method": "gptq",
    "architecture": "LlamaForCausalLM",
    "bits_per_weight": 4.5,
}
GATE = {"metric": "kl_divergence", "candidate": 0.05, "difference": 0.05, "interval": [0.04, 0.06], "verdict": "PASS"}
FILES = {"model.onnx": Descriptor("x", sha256_bytes(b"graph"), 5), "sub/a.json": Descriptor("x", sha256_bytes(b"a"), 1)}


def made(**changes: Any) -> dict[str, Any]:
    parts = {"about": ABOUT, "lock": LOCK, "verdict": {"gates": [GATE]}, "files": FILES} | changes
    return json.loads(bom("small", MODEL, **parts).to_bytes())["predicate"]


def test_the_statement() -> None:
    statement = bom("small", MODEL, about=ABOUT, lock=LOCK, verdict={"gates": [GATE]}, files=FILES)
    assert (statement.predicate_type, statement.name, statement.digest) == ("https://cyclonedx.org/bom", "small", MODEL)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lock": {}, "about": {}, "verdict": {}, "files": {}},
        {"lock": LOCK | {"model": {"source": "./model", "commit": None, "digest": MODEL}}},
        {"verdict": {"gates": [GATE | {"interval": None}, GATE | {"difference": None, "candidate": None}]}},
    ],
)
def test_it_is_valid_cyclonedx(changes: dict[str, Any]) -> None:
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made(**changes)))
    assert problem is None, problem


def test_the_validator_can_refuse() -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made() | {"licence": "MIT"})) is not None


def test_what_it_says() -> None:
    content = made()
    model = content["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "small", MODEL)
    assert model["modelCard"]["modelParameters"] == {
        "task": "text-generation",
        "modelArchitecture": "LlamaForCausalLM",
    }
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "kl_divergence", "value": "0.05"},
        {
            "type": "kl_divergence.difference",
            "value": "0.05",
            "confidenceInterval": {"lowerBound": "0.04", "upperBound": "0.06"},
        },
    ]
    assert [part["name"] for part in model["components"]] == ["model.onnx", "sub/a.json"]
    assert {row["name"]: row["value"] for row in model["properties"]}["assay:scheme"] == "W4A16"
    source, calibration, *packages = content["components"]
    assert source["purl"] == f"pkg:huggingface/org/small@{'0' * 40}"
    assert (calibration["type"], calibration["name"]) == ("data", "python-docs")
    assert [part["purl"] for part in packages] == [
        "pkg:pypi/assay@0.1.0",
        "pkg:pypi/onnx-ir@1.1.0",
        "pkg:pypi/torch@2.13.0%2Bcpu",
    ]


def test_the_same_bytes_each_time_and_others_for_others() -> None:
    assert made() == made()
    assert (
        made()["serialNumber"]
        != json.loads(bom("other", MODEL, about=ABOUT, lock=LOCK, verdict={}, files=FILES).to_bytes())["predicate"][
            "serialNumber"
        ]
    )


def test_of_a_real_lock(tmp_path: Path) -> None:
    """What `resolve` writes into a lock is what is read here."""
    from assay.host import cpu_facts, package_versions

    content = made(lock=LOCK | {"tools": package_versions(), "host": cpu_facts()})
    assert {part["name"] for part in content["components"]} >= {"assay", "torch"}
