"""Whether a verdict is a PASS for exactly these bytes, and whether its evidence is the evidence it was drawn from.

The chain: the artifact's bytes → bundle digest ← verdict.json → digest of evidence.json → digests of the
measurements; the recipe digest is in the lock, the evidence and the verdict alike.  Used before a publish and again
by verify.  Left out on purpose: judging the evidence again, which is the gate's work (assay_evals) and its caller's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from assay.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_INVALID, EXIT_OK, IntegrityError, PublishRefusedError
from assay.files import sha256_bytes
from assay.registry.oci import parse_json

EVIDENCE_TYPE = "application/vnd.assay.evidence.v1"
VERDICT = "dev.assay.verdict"
EVIDENCE_JSON = "evidence.json"
VERDICT_JSON = "verdict.json"
MEASUREMENTS = ("quality.jsonl", "speed.jsonl")
REPORT_HTML = "report.html"
# Every evidence manifest has these layers, in this order.
PROOF_TYPES = {
    EVIDENCE_JSON: "application/json",
    "quality.jsonl": "application/jsonl",
    "speed.jsonl": "application/jsonl",
    VERDICT_JSON: "application/json",
    REPORT_HTML: "text/html",
}
_VERSION = 1
_EXIT_CODES = {"PASS": EXIT_OK, "FAIL": EXIT_FAIL, "INCONCLUSIVE": EXIT_INCONCLUSIVE, "INVALID": EXIT_INVALID}


@dataclass(frozen=True)
class Proof:
    """A PASS and what it rests on; `verdict` is the content of verdict.json."""

    verdict: dict[str, Any]
    verdict_digest: str
    evidence_digest: str


def check_proof(
    verdict: bytes, evidence: bytes, measurements: dict[str, str], *, bundle: str, recipe: str | None, where: str
) -> Proof:
    """Follow the whole chain from the artifact's bytes to the measurements.

    verdict, evidence: bytes of verdict.json and evidence.json.  measurements: name → digest, as found.  bundle: the
    digest of the artifact's bytes, as found.  recipe: the recipe digest in the artifact's lock.
    Raises PublishRefusedError (exit code 1, 3 or 4) when the verdict is not PASS, IntegrityError when a link is
    broken.
    """
    judged = check_verdict(verdict, bundle, f"{where}: {VERDICT_JSON}")
    _check_recipe(judged, recipe, where)
    found = sha256_bytes(evidence)
    _same(judged.get("evidence"), found, f"{where}: the evidence that {VERDICT_JSON} was drawn from")
    header = parse_json(evidence, f"{where}: {EVIDENCE_JSON}")
    place = f"{where}: {EVIDENCE_JSON}:"
    _check_version(header, place)
    _same(_at(header, "candidate", "bundle_digest"), bundle, f"{place} candidate.bundle_digest")
    _same(_at(header, "baseline", "bundle_digest"), judged.get("baseline"), f"{place} baseline.bundle_digest")
    _same(_at(header, "recipe", "digest"), judged.get("recipe"), f"{place} recipe.digest")
    for name in MEASUREMENTS:
        _same(_at(header, "files", name), measurements.get(name), f"{place} the digest of {name}")
    return Proof(judged, sha256_bytes(verdict), found)


def check_verdict(data: bytes, bundle: str, where: str) -> dict[str, Any]:
    """Parse a verdict; it must be PASS, for these bytes, and must not contradict itself.

    Raises PublishRefusedError with the verdict's exit code, or IntegrityError.
    """
    judged = parse_json(data, where)
    _check_version(judged, where)
    # First of all: a verdict on other bytes says nothing about these, whichever verdict it is.
    _same(judged.get("candidate"), bundle, f"{where}: the artifact that was judged")
    word = judged.get("verdict")
    if not isinstance(word, str) or word not in _EXIT_CODES or judged.get("exit_code") != _EXIT_CODES[word]:
        raise IntegrityError(f"{where}: {word!r} with exit code {judged.get('exit_code')!r} is not a verdict.")
    if word != "PASS":
        reasons = " ".join(str(reason) for reason in _list(judged, "reasons"))
        raise PublishRefusedError(
            f"{where}: the verdict on these bytes is {word}; only a PASS is published. {reasons}".rstrip(),
            _EXIT_CODES[word],
        )
    gates = [_at(row, "verdict") for row in _list(judged, "gates")]
    checks = [_at(check, "passed") for check in _list(judged, "checks")]
    if not gates or any(gate != "PASS" for gate in gates) or any(check is not True for check in checks):
        raise IntegrityError(
            f"{where}: says PASS, but has no gate, a gate that is not PASS, or a check that did not pass."
        )
    return judged


def _check_recipe(judged: dict[str, Any], recipe: str | None, where: str) -> None:
    if recipe is None:
        raise IntegrityError(f"{where}: the artifact's lock names no recipe digest; build the artifact again.")
    _same(judged.get("recipe"), recipe, f"{where}: the recipe that was judged")


def _check_version(value: dict[str, Any], where: str) -> None:
    if value.get("version") != _VERSION:
        raise IntegrityError(f"{where}: version {value.get('version')!r}; this release reads version {_VERSION}.")


def _same(stated: Any, found: Any, what: str) -> None:
    if not isinstance(stated, str) or stated != found:
        raise IntegrityError(f"{what} is {stated}, but found was {found}. Run the evaluation again on these bytes.")


def _at(value: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = cast("dict[str, Any]", value).get(key)
    return value


def _list(value: dict[str, Any], key: str) -> Iterable[Any]:
    items = value.get(key)
    return cast("list[Any]", items) if isinstance(items, list) else []
