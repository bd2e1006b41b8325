"""A small finished run on disk, as `assay compile` leaves it: an artifact, its evidence, its verdict, its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from assay.artifact import directory_digest
from assay.files import readable_json, sha256_bytes, sha256_file

RECIPE = sha256_bytes(b"a recipe")
BASELINE = sha256_bytes(b"a baseline")
EXIT_CODES = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3, "INVALID": 4}


def write_artifact(
    directory: Path, files: dict[str, bytes], about: dict[str, Any] | None = None, recipe: str = RECIPE
) -> None:
    """Write an artifact directory; `about` replaces keys of its manifest."""
    manifest = {
        "version": 1,
        "name": "small",
        "target": "onnxruntime-genai",
        "scheme": "W4A16",
        "method": "gptq",
        "architecture": "llama",
        "source": "hf:org/small",
    }
    files = files | {
        "manifest.json": readable_json(manifest | (about or {})),
        "assay.lock.json": readable_json({"version": 1, "recipe": {"name": "small", "digest": recipe}}),
    }
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_verdict(run: Path, **changes: Any) -> None:
    """Write verdict.json for what is in the run now; `changes` replace its keys."""
    word = changes.get("verdict", "PASS")
    row = {"metric": "cloze_accuracy", "verdict": word, "reason": "measured"}
    verdict = {
        "version": 1,
        "verdict": word,
        "exit_code": EXIT_CODES.get(word, 0),
        "candidate": directory_digest(run / "artifact"),
        "baseline": BASELINE,
        "recipe": RECIPE,
        "evidence": sha256_file(run / "evidence/evidence.json"),
        "gates": [row],
        "reported": [],
        "checks": [{"name": "tokenizer identity", "passed": True, "detail": ""}],
        "reasons": [f"it is {word}"],
    }
    (run / "verdict.json").write_bytes(readable_json(verdict | changes))


def write_evidence(run: Path, **changes: Any) -> None:
    """Write evidence.json for what is in the run now; `changes` replace its keys."""
    evidence = run / "evidence"
    header = {
        "version": 1,
        "recipe": {"name": "small", "digest": RECIPE, "gate": {}, "evaluate": {}},
        "candidate": {"bundle_digest": directory_digest(run / "artifact")},
        "baseline": {"bundle_digest": BASELINE},
        "checks": [],
        "files": {name: sha256_file(evidence / name) for name in ("quality.jsonl", "speed.jsonl")},
    }
    (evidence / "evidence.json").write_bytes(readable_json(header | changes))


def write_proof(run: Path, verdict: str = "PASS", note: str = "") -> None:
    """Write everything beside the artifact; `note` makes other measurements."""
    (run / "evidence").mkdir()
    (run / "evidence/quality.jsonl").write_text('{"kind":"window"}\n' + note)
    (run / "evidence/speed.jsonl").write_text('{"block":0}\n')
    (run / "report.html").write_text("<!doctype html>")
    write_evidence(run)
    write_verdict(run, verdict=verdict)
