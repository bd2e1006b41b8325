"""What is said of a published artifact, as in-toto statements about the digest of its manifest and the name it has.

Source: in-toto attestation framework (Statement v1, test-result v0.1, CycloneDX predicate), SLSA v1 (provenance,
verification summary).  The three that a publish makes hold no time and no host of the publisher: the same artifact
and evidence give the same bytes.  Fields of our own begin with `assay_`, as SLSA asks of extensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from assay.errors import IntegrityError
from assay.files import canonical_json
from assay.registry.oci import DIGEST, parse_json

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
Kind = Literal["test-result", "provenance", "bom", "promotion"]
PREDICATES: dict[Kind, str] = {
    "test-result": "https://in-toto.io/attestation/test-result/v0.1",
    "provenance": "https://slsa.dev/provenance/v1",
    "bom": "https://cyclonedx.org/bom",
    "promotion": "https://slsa.dev/verification_summary/v1",
}
_KINDS = {uri: kind for kind, uri in PREDICATES.items()}
# Not web addresses: nobody has to own a domain for them, and there is no page behind them.
BUILD_TYPE = "urn:assay:compile:v1"
BUILDER = "urn:assay:builder"
VERIFIER = "urn:assay:verifier"
GATE_PASSED = "ASSAY_GATE_PASSED"

Action = Literal["promote", "rollback"]


@dataclass(frozen=True)
class Statement:
    """One thing said of one artifact.  digest: of its manifest.  predicate_type: a URI."""

    name: str
    digest: str
    predicate_type: str
    predicate: dict[str, Any]

    @property
    def kind(self) -> str:
        """The word for its predicate, or the URI of one that Assay has no word for."""
        return _KINDS.get(self.predicate_type, self.predicate_type)

    def to_bytes(self) -> bytes:
        """The one spelling of this statement."""
        return canonical_json(
            {
                "_type": STATEMENT_TYPE,
                "subject": [{"name": self.name, "digest": _digest_set(self.digest)}],
                "predicateType": self.predicate_type,
                "predicate": self.predicate,
            }
        )


@dataclass(frozen=True)
class Promotion:
    """A change of a channel.

    sequence: 1 for a channel's first, one more for each that follows.  previous: the digest that the channel had
    before.  restores: of a rollback, the sequence of the promotion that it goes back to.
    """

    action: Action
    channel: str
    sequence: int
    previous: str | None
    restores: int | None
    time: str | None


def parse_statement(data: bytes, where: str) -> Statement:
    """Check a statement from outside; IntegrityError unless it is about exactly one named artifact."""
    value = parse_json(data, where)
    subject, predicate_type, predicate = value.get("subject"), value.get("predicateType"), value.get("predicate")
    if value.get("_type") != STATEMENT_TYPE:
        raise IntegrityError(f"{where}: _type is {value.get('_type')!r}; read is {STATEMENT_TYPE}.")
    if not isinstance(predicate_type, str) or not isinstance(predicate, dict):
        raise IntegrityError(f"{where}: predicateType must be a text and predicate an object.")
    subjects = cast("list[Any]", subject) if isinstance(subject, list) else []
    first = cast("dict[str, Any]", subjects[0]) if len(subjects) == 1 and isinstance(subjects[0], dict) else {}
    name, digests = first.get("name"), first.get("digest")
    digest = f"sha256:{cast('dict[str, Any]', digests).get('sha256')}" if isinstance(digests, dict) else ""
    if not isinstance(name, str) or not DIGEST.fullmatch(digest):
        raise IntegrityError(f"{where}: subject must be one artifact with a name and a sha256 digest.")
    return Statement(name, digest, predicate_type, cast("dict[str, Any]", predicate))


def gate_result(
    name: str, digest: str, *, bundle: str, verdict: dict[str, Any], evidence: dict[str, Any], digests: dict[str, str]
) -> Statement:
    """That the gate passed, by which recipe, on which bytes and data.

    verdict, evidence: contents of verdict.json and evidence.json.  digests: name → digest of what they rest on.
    """
    configuration = [
        _resource("recipe", verdict["recipe"]),
        _resource("bundle", bundle),
        _resource("baseline", verdict["baseline"]),
        *(_resource(key, value) for key, value in sorted(digests.items())),
        *_evaluation_data(evidence),
    ]
    passed = [f"gate: {row['metric']}" for row in verdict["gates"]]
    passed += [f"check: {check['name']}" for check in verdict["checks"]]
    predicate = {
        "result": "PASSED",
        "configuration": configuration,
        "passedTests": passed,
        "warnedTests": [],
        "failedTests": [],
    }
    return Statement(name, digest, PREDICATES["test-result"], predicate)


def provenance(name: str, digest: str, *, lock: dict[str, Any], lock_digest: str | None, evidence: str) -> Statement:
    """How the artifact was made, by its lock.

    lock: content of assay.lock.json, whose digest is `lock_digest`.  evidence: digest of the evidence manifest.
    """
    recipe, tools = _object(lock, "recipe"), _object(lock, "tools")
    byproducts = [_resource("evidence", evidence)]
    if lock_digest:
        byproducts.append(_resource("assay.lock.json", lock_digest))
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"recipe": recipe},
            "internalParameters": {"calibration": _object(lock, "calibration"), "host": _object(lock, "host")},
            "resolvedDependencies": [*_materials(lock), *_packages(tools)],
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": {"assay": str(tools.get("assay", "unknown"))}},
            "byproducts": byproducts,
        },
    }
    return Statement(name, digest, PREDICATES["provenance"], predicate)


def promotion(
    name: str,
    digest: str,
    change: Promotion,
    *,
    policy: tuple[str, str] | None,
    attestations: Iterable[str],
    assay_version: str,
) -> Statement:
    """That an artifact was checked and put into a channel.

    policy: name and digest of the trust policy that it was checked by.  attestations: digests of what was relied on.
    """
    named, found = policy or (GATE_PASSED, None)
    predicate: dict[str, Any] = {
        "verifier": {"id": VERIFIER, "version": {"assay": assay_version}},
        "resourceUri": f"{name}@{digest}",
        "policy": {"uri": f"urn:assay:policy:{named}"} | ({"digest": _digest_set(found)} if found else {}),
        "inputAttestations": [{"digest": _digest_set(item)} for item in attestations],
        "verificationResult": "PASSED",
        "verifiedLevels": [GATE_PASSED],
        "assay_action": change.action,
        "assay_channel": change.channel,
        "assay_sequence": change.sequence,
        "assay_previous": change.previous,
        "assay_restores": change.restores,
    }
    if change.time:
        predicate["timeVerified"] = change.time
    return Statement(name, digest, PREDICATES["promotion"], predicate)


def read_promotion(statement: Statement, where: str) -> Promotion | None:
    """The change of a channel that a verification summary records, None for a summary of others; IntegrityError."""
    predicate = statement.predicate
    if statement.kind != "promotion" or "assay_channel" not in predicate:
        return None
    action, channel = predicate.get("assay_action"), predicate["assay_channel"]
    sequence, restores = predicate.get("assay_sequence"), predicate.get("assay_restores")
    previous, time = predicate.get("assay_previous"), predicate.get("timeVerified")
    well_formed = (
        action in ("promote", "rollback")
        and isinstance(channel, str)
        and type(sequence) is int
        and sequence >= 1
        and (previous is None or (isinstance(previous, str) and DIGEST.fullmatch(previous)))
        and (restores is None or (type(restores) is int and 1 <= restores < sequence))
        and (action == "rollback") == (restores is not None)
        and (time is None or isinstance(time, str))
    )
    if not well_formed or predicate.get("verificationResult") != "PASSED":
        raise IntegrityError(f"{where}: not a promotion record that can be relied on.")
    return Promotion(cast("Action", action), channel, cast("int", sequence), previous, restores, time)


def contradiction(statement: Statement, *, bundle: str, recipe: str | None) -> str | None:
    """What a statement says that is not so of the artifact with this bundle and recipe digest, as half a sentence."""
    predicate = statement.predicate
    if statement.kind == "test-result":
        if predicate.get("result") != "PASSED":
            return f"says {predicate.get('result')!r}, not PASSED"
        stated = configured(statement)
        return next(
            (
                f"is about the {key} {stated.get(key)}, not {found}"
                for key, found in (("bundle", bundle), ("recipe", recipe))
                if stated.get(key) != found
            ),
            None,
        )
    if statement.kind == "provenance":
        stated = _object(_object(_object(predicate, "buildDefinition"), "externalParameters"), "recipe").get("digest")
        return None if stated == recipe else f"is about the recipe {stated}, not {recipe}"
    return None


def configured(statement: Statement) -> dict[str, str]:
    """Name → digest of the configuration of a test result."""
    rows = statement.predicate.get("configuration")
    found: dict[str, str] = {}
    for row in cast("list[Any]", rows) if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(name := cast("dict[str, Any]", row).get("name"), str):
            found[name] = f"sha256:{_object(cast('dict[str, Any]', row), 'digest').get('sha256')}"
    return found


def _evaluation_data(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    """The texts and items that the evidence says were used."""
    used = {"evaluation text": _object(evidence, "text")}
    used |= {f"task {name}": _object(_object(evidence, "tasks"), name) for name in sorted(_object(evidence, "tasks"))}
    return [
        _resource(name, str(data["digest"])) | {"annotations": {"source": str(data.get("source"))}}
        for name, data in used.items()
        if DIGEST.fullmatch(str(data.get("digest")))
    ]


def _materials(lock: dict[str, Any]) -> list[dict[str, Any]]:
    """The model and the calibration text, as far as the lock names them."""
    found: list[dict[str, Any]] = []
    model, calibration = _object(lock, "model"), _object(lock, "calibration")
    if DIGEST.fullmatch(str(model.get("digest"))):
        row = _resource("model", model["digest"])
        row |= {"uri": source_uri(str(model.get("source")), model.get("commit"))}
        if isinstance(model.get("commit"), str):
            row["digest"] = row["digest"] | {"gitCommit": model["commit"]}
        found.append(row)
    if DIGEST.fullmatch(str(calibration.get("text_digest"))):
        found.append(
            _resource("calibration", calibration["text_digest"])
            | {"annotations": {"source": str(calibration.get("source"))}}
        )
    return found


def _packages(tools: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "uri": package_url(name, str(version))} for name, version in sorted(tools.items())]


def package_url(name: str, version: str) -> str:
    """A Python package as purl writes it."""
    return f"pkg:pypi/{name.lower().replace('_', '-')}@{version.replace('+', '%2B')}"


def source_uri(source: str, commit: Any) -> str:
    """Where a model is from: a purl for the hub's, else the source as the recipe has it, as a URI."""
    if source.startswith("hf:"):
        return f"pkg:huggingface/{source.removeprefix('hf:')}" + (f"@{commit}" if commit else "")
    return f"urn:assay:source:{source}"


def _resource(name: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": _digest_set(digest)}


def _digest_set(digest: str) -> dict[str, str]:
    return {"sha256": digest.removeprefix("sha256:")}


def _object(value: dict[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
