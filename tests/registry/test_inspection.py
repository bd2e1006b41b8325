from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.artifact import directory_digest
from assay.errors import IntegrityError, PublishRefusedError, UsageError
from assay.files import canonical_json, sha256_bytes
from assay.registry.inspection import list_artifacts, show, verify, verify_directory, verify_pulled
from assay.registry.layout import Layout
from assay.registry.oci import MANIFEST_TYPE, Descriptor, describe
from assay.registry.publish import Receipt, publish
from assay.registry.pull import pull

MakeRun = Callable[..., Path]


@pytest.fixture
def receipt(run: Path, registry: Path) -> Receipt:
    return publish(run / "artifact", run, registry, "small", ["latest", "1.0"])


def blob(registry: Path, digest: str) -> Path:
    return registry / "blobs/sha256" / digest.removeprefix("sha256:")


def test_hostile_words_are_shown_as_text(make_run: MakeRun, registry: Path, assay: Callable[..., Any]) -> None:
    """Neither what a library takes for markup nor what steers a terminal."""
    run = make_run(about={"scheme": "[/x]\x1b[31m", "method": "[/]"})
    publish(run / "artifact", run, registry, "small")
    for command in (("list",), ("show", "small")):
        done = assay(*command, "--registry", registry)
        assert done.returncode == 0 and "[/x]" in done.stdout and "\x1b" not in done.stdout, done.stderr


def test_an_empty_registry_lists_nothing(registry: Path) -> None:
    Layout.create(registry)
    assert list_artifacts(registry) == ()
    with pytest.raises(UsageError, match="no registry here"):
        list_artifacts(registry / "other")


def test_the_listing(receipt: Receipt, registry: Path, make_run: MakeRun) -> None:
    other = make_run("other", files={"model.safetensors": b"x"}, about={"scheme": "W8A16"})
    publish(other / "artifact", other, registry, "another", [])
    another, one, latest = list_artifacts(registry)
    assert [(found.name, found.tag) for found in (another, one, latest)] == [
        ("another", None),
        ("small", "1.0"),
        ("small", "latest"),
    ]
    assert another.annotations["dev.assay.scheme"] == "W8A16"
    assert (latest.digest, latest.size_bytes, latest.verdicts) == (receipt.digest, receipt.size_bytes, ("PASS",))
    assert latest.problem is None


def test_a_damaged_artifact_is_listed_with_its_problem(receipt: Receipt, registry: Path, make_run: MakeRun) -> None:
    other = make_run("other", files={"model.onnx": b"x"})
    publish(other / "artifact", other, registry, "another")
    blob(registry, receipt.digest).unlink()
    another, *small = list_artifacts(registry)
    assert another.problem is None
    assert len(small) == 2 and all("missing" in str(found.problem) for found in small)


def test_show(receipt: Receipt, registry: Path, run: Path) -> None:
    shown = show(registry, "small:1.0")
    assert shown.names == ("small:1.0", "small:latest")
    assert (shown.digest, shown.bundle_digest, shown.size_bytes) == (
        receipt.digest,
        receipt.bundle_digest,
        receipt.size_bytes,
    )
    assert shown.annotations["dev.assay.target"] == "onnxruntime-genai"
    assert shown.config["config"]["quantization"] == "w4a16-gptq"
    assert {file.name for file in shown.files} == {path.name for path in (run / "artifact").iterdir()}
    (evidence,) = shown.evidence
    assert evidence.verdict == json.loads((run / "verdict.json").read_bytes())
    assert list(evidence.layers) == ["evidence.json", "quality.jsonl", "speed.jsonl", "verdict.json", "report.html"]


def test_verify(receipt: Receipt, registry: Path) -> None:
    verification = verify(registry, "small")
    assert verification.bundle_digest == receipt.bundle_digest
    assert verification.evidence == (receipt.evidence_digest,)
    assert verification.blobs == len(list((registry / "blobs/sha256").iterdir()))
    assert verification.size_bytes == sum(path.stat().st_size for path in (registry / "blobs/sha256").iterdir())


def test_verify_sees_damage_to_every_blob(receipt: Receipt, registry: Path) -> None:
    for path in sorted((registry / "blobs/sha256").iterdir()):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=path.name):
            verify(registry, "small")
        path.write_bytes(data)
    verify(registry, "small")


def replace_evidence(registry: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Put other evidence, of an attacker who can compute digests, in the place of the evidence."""
    layout = Layout.open(registry)
    index = json.loads((registry / "index.json").read_bytes())
    entry = index["manifests"][-1]
    manifest = json.loads(blob(registry, entry["digest"]).read_bytes())
    change(manifest)
    data = canonical_json(manifest)
    layout.put_bytes(data, MANIFEST_TYPE)
    entry |= describe(data, MANIFEST_TYPE).to_json()
    (registry / "index.json").write_bytes(canonical_json(index))


def with_verdict(registry: Path, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        layer = manifest["layers"][3]
        verdict = json.loads(blob(registry, layer["digest"]).read_bytes()) | changes
        data = canonical_json(verdict)
        Layout.open(registry).put_bytes(data, "application/json")
        layer |= {"digest": sha256_bytes(data), "size": len(data)}

    return change


def test_evidence_of_others_is_refused(receipt: Receipt, registry: Path) -> None:
    kept = (registry / "index.json").read_bytes()
    other = sha256_bytes(b"other")
    subject = Descriptor(MANIFEST_TYPE, other, 1).to_json()
    changes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda manifest: manifest.update(subject=subject), "its subject is not"),
        (lambda manifest: manifest.pop("subject"), "its subject is not"),
        (lambda manifest: manifest.update(artifactType="text/plain"), "listed as"),
        (lambda manifest: manifest["layers"].pop(), "needed are"),
        (lambda manifest: manifest["layers"].append(manifest["layers"][0]), "needed are"),
        (with_verdict(registry, candidate=other), "the artifact that was judged"),
        (with_verdict(registry, evidence=other), "the evidence that"),
        (with_verdict(registry, recipe=other), "the recipe that was judged"),
        (with_verdict(registry, gates=[]), "has no gate"),
    ]
    for change, message in changes:
        replace_evidence(registry, change)
        with pytest.raises(IntegrityError, match=message):
            verify(registry, "small")
        (registry / "index.json").write_bytes(kept)
    replace_evidence(registry, with_verdict(registry, verdict="FAIL", exit_code=1))
    with pytest.raises(PublishRefusedError) as refused:
        verify(registry, "small")
    assert refused.value.exit_code == 1


def test_an_artifact_without_evidence_is_not_verified(receipt: Receipt, registry: Path) -> None:
    index = json.loads((registry / "index.json").read_bytes())
    index["manifests"].pop()
    (registry / "index.json").write_bytes(canonical_json(index))
    with pytest.raises(IntegrityError, match="has no evidence"):
        verify(registry, "small")


def test_a_pulled_directory_is_found_by_its_bytes(receipt: Receipt, registry: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pull(registry, "small", out)
    assert verify_pulled(registry, verify_directory(out)).digest == receipt.digest
    (out / "README.md").write_text("# Another model\n")
    with pytest.raises(IntegrityError, match="are of no artifact in"):
        verify_pulled(registry, verify_directory(out))


def test_a_pulled_directory_is_verified_without_a_registry(receipt: Receipt, registry: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pull(registry, "small", out)
    facts = verify_directory(out)
    assert (facts.bundle_digest, facts.digest) == (receipt.bundle_digest, receipt.digest)
    assert facts.bundle_digest == directory_digest(out) and facts.size_bytes == receipt.size_bytes
    assert verify_directory(out, receipt.digest) == verify_directory(out, receipt.bundle_digest) == facts
    (out / "tokenizer.json").write_text("[]")
    with pytest.raises(IntegrityError, match="expected was"):
        verify_directory(out, receipt.digest)
