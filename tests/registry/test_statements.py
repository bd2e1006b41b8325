from __future__ import annotations

import json
from typing import Any

import pytest

from assay.errors import IntegrityError
from assay.files import canonical_json, sha256_bytes
from assay.registry.statements import (
    Promotion,
    Statement,
    configured,
    contradiction,
    gate_result,
    parse_statement,
    promotion,
    provenance,
    read_promotion,
)

MODEL, BUNDLE, RECIPE, OTHER = (sha256_bytes(name) for name in (b"model", b"bundle", b"recipe", b"other"))
VERDICT: dict[str, Any] = {
    "recipe": RECIPE,
    "baseline": OTHER,
    "gates": [{"metric": "kl_divergence"}],
    "checks": [{"name": "one runtime"}],
}
EVIDENCE: dict[str, Any] = {
    "text": {"source": "python-docs", "digest": sha256_bytes(b"text")},
    "tasks": {"facts": {"source": "facts.jsonl", "digest": sha256_bytes(b"facts"), "items": 3}},
}
LOCK: dict[str, Any] = {
    "recipe": {"digest": RECIPE, "name": "small", "content": {"gate": {}}},
    "model": {"source": "hf:org/small", "commit": "0" * 40, "digest": sha256_bytes(b"source")},
    "calibration": {"source": "python-docs", "text_digest": sha256_bytes(b"calibration"), "samples": 4},
    "tools": {"assay": "0.1.0", "torch": "2.13.0+cpu"},
    "host": {"cpu": "a cpu"},
}


@pytest.fixture
def result() -> Statement:
    digests = {"evidence": sha256_bytes(b"evidence"), "verdict.json": sha256_bytes(b"verdict")}
    return gate_result("small", MODEL, bundle=BUNDLE, verdict=VERDICT, evidence=EVIDENCE, digests=digests)


def test_the_gate_result(result: Statement) -> None:
    value = json.loads(result.to_bytes())
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["subject"] == [{"name": "small", "digest": {"sha256": MODEL.removeprefix("sha256:")}}]
    assert value["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    predicate = value["predicate"]
    assert (predicate["result"], predicate["failedTests"]) == ("PASSED", [])
    assert predicate["passedTests"] == ["gate: kl_divergence", "check: one runtime"]
    assert configured(result) == {
        "recipe": RECIPE,
        "bundle": BUNDLE,
        "baseline": OTHER,
        "evidence": sha256_bytes(b"evidence"),
        "verdict.json": sha256_bytes(b"verdict"),
        "evaluation text": sha256_bytes(b"text"),
        "task facts": sha256_bytes(b"facts"),
    }


def test_a_statement_round_trips(result: Statement) -> None:
    assert parse_statement(result.to_bytes(), "test") == result
    assert result.to_bytes() == canonical_json(json.loads(result.to_bytes()))


def test_provenance() -> None:
    statement = provenance("small", MODEL, lock=LOCK, lock_digest=OTHER, evidence=BUNDLE)
    definition, details = statement.predicate["buildDefinition"], statement.predicate["runDetails"]
    assert definition["externalParameters"] == {"recipe": LOCK["recipe"]}
    assert definition["internalParameters"] == {"calibration": LOCK["calibration"], "host": LOCK["host"]}
    model, calibration, assay, torch = definition["resolvedDependencies"]
    assert model["uri"] == f"pkg:huggingface/org/small@{'0' * 40}" and model["digest"]["gitCommit"] == "0" * 40
    assert calibration["name"] == "calibration" and assay["uri"] == "pkg:pypi/assay@0.1.0"
    assert torch["uri"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert details["builder"] == {"id": "urn:assay:builder", "version": {"assay": "0.1.0"}}
    assert [row["name"] for row in details["byproducts"]] == ["evidence", "assay.lock.json"]


def test_provenance_of_a_lock_that_says_little() -> None:
    statement = provenance("small", MODEL, lock={"recipe": {"digest": RECIPE}}, lock_digest=None, evidence=BUNDLE)
    assert statement.predicate["buildDefinition"]["resolvedDependencies"] == []
    assert contradiction(statement, bundle=BUNDLE, recipe=RECIPE) is None
    assert "is about the recipe" in str(contradiction(statement, bundle=BUNDLE, recipe=OTHER))


def test_contradictions(result: Statement) -> None:
    assert contradiction(result, bundle=BUNDLE, recipe=RECIPE) is None
    assert "is about the bundle" in str(contradiction(result, bundle=OTHER, recipe=RECIPE))
    assert "is about the recipe" in str(contradiction(result, bundle=BUNDLE, recipe=OTHER))
    failed = Statement("small", MODEL, result.predicate_type, result.predicate | {"result": "FAILED"})
    assert contradiction(failed, bundle=BUNDLE, recipe=RECIPE) == "says 'FAILED', not PASSED"


PROMOTION = Promotion("rollback", "production", 3, OTHER, 1, "2026-11-01T00:00:00Z")


def recorded(change: Promotion) -> Statement:
    return promotion(
        "small", MODEL, change, policy=("policy.yaml", OTHER), attestations=[BUNDLE], assay_version="0.1.0"
    )


def test_a_promotion_round_trips() -> None:
    statement = recorded(PROMOTION)
    predicate = statement.predicate
    assert statement.predicate_type == "https://slsa.dev/verification_summary/v1"
    assert (predicate["verificationResult"], predicate["resourceUri"]) == ("PASSED", f"small@{MODEL}")
    assert predicate["policy"]["digest"] == {"sha256": OTHER.removeprefix("sha256:")}
    assert predicate["inputAttestations"] == [{"digest": {"sha256": BUNDLE.removeprefix("sha256:")}}]
    assert not any(level.startswith("SLSA_") for level in predicate["verifiedLevels"])
    assert read_promotion(parse_statement(statement.to_bytes(), "test"), "test") == PROMOTION


@pytest.mark.parametrize(
    "change",
    [
        {"verificationResult": "FAILED"},
        {"assay_action": "demote"},
        {"assay_sequence": 0},
        {"assay_sequence": True},
        {"assay_restores": 3},
        {"assay_restores": None},
        {"assay_previous": "sha256:x"},
        {"assay_channel": 1},
    ],
)
def test_promotions_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    statement = recorded(PROMOTION)
    wrong = Statement("small", MODEL, statement.predicate_type, statement.predicate | change)
    with pytest.raises(IntegrityError, match="not a promotion record"):
        read_promotion(wrong, "test")


def test_a_summary_of_others_is_no_promotion(result: Statement) -> None:
    statement = recorded(PROMOTION)
    other = {key: value for key, value in statement.predicate.items() if not key.startswith("assay_")}
    assert read_promotion(Statement("small", MODEL, statement.predicate_type, other), "test") is None
    assert read_promotion(result, "test") is None


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"predicateType": 1},
        {"predicate": []},
        {"subject": []},
        {"subject": [{"name": "a", "digest": {"sha256": "0" * 64}}] * 2},
        {"subject": [{"digest": {"sha256": "0" * 64}}]},
        {"subject": [{"name": "a", "digest": {"sha256": "0" * 63}}]},
        {"subject": [{"name": "a", "digest": {"sha1": "0" * 40}}]},
        {"subject": [{"name": "a", "digest": "0" * 64}]},
        {"subject": {"name": "a"}},
    ],
)
def test_malformed_statements_are_refused(result: Statement, change: dict[str, Any]) -> None:
    value = json.loads(result.to_bytes()) | change
    with pytest.raises(IntegrityError, match="test: "):
        parse_statement(json.dumps(value).encode(), "test")
