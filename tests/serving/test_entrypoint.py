"""The example of a container's entry point, run against a local registry, with a program in the server's place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from assay.files import readable_json, sha256_bytes, sha256_file
from assay.registry.publish import publish

ENTRYPOINT = Path(__file__).parents[2] / "docs/examples/serving/entrypoint.py"


@pytest.fixture
def published(make_artifact: Callable[..., Path], tmp_path: Path) -> str:
    """The digest of an artifact in a registry at "store"."""
    from assay.artifact import directory_digest

    run = tmp_path / "run"
    (run / "evidence").mkdir(parents=True)
    artifact = make_artifact()
    (artifact / "assay.lock.json").write_bytes(readable_json({"version": 1, "recipe": {"digest": sha256_bytes(b"r")}}))
    bundle, recipe = directory_digest(artifact), sha256_bytes(b"r")
    for name in ("quality.jsonl", "speed.jsonl"):
        (run / "evidence" / name).write_text("{}\n")
    (run / "report.html").write_text("<!doctype html>")
    files = {name: sha256_file(run / "evidence" / name) for name in ("quality.jsonl", "speed.jsonl")}
    header = {
        "version": 1,
        "recipe": {"name": "m", "digest": recipe, "gate": {}, "evaluate": {}},
        "candidate": {"bundle_digest": bundle},
        "baseline": {"bundle_digest": sha256_bytes(b"b")},
        "checks": [],
        "files": files,
    }
    (run / "evidence/evidence.json").write_bytes(readable_json(header))
    verdict = {
        "version": 1,
        "verdict": "PASS",
        "exit_code": 0,
        "candidate": bundle,
        "baseline": sha256_bytes(b"b"),
        "recipe": recipe,
        "evidence": sha256_file(run / "evidence/evidence.json"),
        "gates": [{"metric": "cloze_accuracy", "verdict": "PASS", "reason": "measured"}],
        "reported": [],
        "checks": [{"name": "tokenizer identity", "passed": True, "detail": ""}],
        "reasons": [],
    }
    (run / "verdict.json").write_bytes(readable_json(verdict))
    return publish(artifact, run, tmp_path / "store", "m").digest


def start(place: Path, reference: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (place / "bin").mkdir(exist_ok=True)
    server = place / "bin/vllm"
    server.write_text('#!/bin/sh\necho "server: $HF_HUB_OFFLINE $*"\n')
    server.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "ASSAY_REFERENCE": reference,
        "ASSAY_REGISTRY": str(place / "store"),
        "ASSAY_DIRECTORY": str(place / "models/m"),
    }
    command = [sys.executable, ENTRYPOINT, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_server_starts_on_the_bytes_that_were_asked_for(published: str, tmp_path: Path) -> None:
    for _ in range(2):
        done = start(tmp_path, f"m@{published}", "--max-model-len", "512")
        assert done.returncode == 0, done.stderr
        names = f"--served-model-name m m@{published}"
        last = f"server: 1 serve {tmp_path}/models/m {names} --load-format safetensors --port 8000 --max-model-len 512"
        assert done.stdout.splitlines()[-1] == last


def test_a_tag_is_not_deployed(published: str, tmp_path: Path) -> None:
    done = start(tmp_path, "m:latest")
    assert done.returncode == 1 and "a tag can move" in done.stderr and not (tmp_path / "models").exists()


def test_damaged_bytes_start_no_server(published: str, tmp_path: Path) -> None:
    blob = next(path for path in (tmp_path / "store/blobs/sha256").iterdir() if path.read_bytes() == b"weights")
    blob.write_bytes(b"weightz")
    done = start(tmp_path, f"m@{published}")
    assert done.returncode == 5 and blob.name in done.stderr and "server:" not in done.stdout
    assert not (tmp_path / "models/m").exists()
