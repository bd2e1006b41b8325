from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from assay.artifact import directory_digest
from assay.errors import AssayError, IntegrityError, PublishRefusedError, UsageError
from assay.files import sha256_bytes, sha256_file
from assay.registry.base import Attachment, part, read_attachment
from assay.registry.inspection import list_artifacts, show
from assay.registry.open import open_registry
from assay.registry.publish import Judged, Receipt, publish
from assay.registry.reference import parse_reference

MakeRun = Callable[..., Path]
OTHER = sha256_bytes(b"other")


def publish_run(run: Path, registry: Path, tags: tuple[str, ...] = ("latest",), force: bool = False) -> Receipt:
    return publish(run / "artifact", run, registry, "small", tags, force=force)


def test_a_pass_is_published(run: Path, registry: Path, helpers: Any) -> None:
    receipt = publish_run(run, registry, ("latest", "1.0"))
    assert receipt.created and receipt.evidence_created and receipt.tags_set == ("latest", "1.0")
    assert receipt.bundle_digest == directory_digest(run / "artifact")
    assert receipt.reference == f"small@{receipt.digest}"
    # 7 model files (tokenizer.json holds the same bytes as the empty config), config, manifest, 5 of evidence, its manifest.
    assert receipt.blobs_written == len(list((registry / "blobs/sha256").iterdir())) == 15
    helpers.assert_sound(registry)


def test_the_evidence_names_the_model_as_its_subject(run: Path, registry: Path) -> None:
    receipt = publish_run(run, registry)
    manifest = json.loads((registry / "blobs/sha256" / receipt.evidence_digest.removeprefix("sha256:")).read_bytes())
    assert manifest["artifactType"] == "application/vnd.assay.evidence.v1"
    assert manifest["subject"]["digest"] == receipt.digest
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    files = {layer["annotations"]["org.opencontainers.image.title"]: layer["digest"] for layer in manifest["layers"]}
    assert files == {
        "evidence.json": sha256_file(run / "evidence/evidence.json"),
        "quality.jsonl": sha256_file(run / "evidence/quality.jsonl"),
        "speed.jsonl": sha256_file(run / "evidence/speed.jsonl"),
        "verdict.json": sha256_file(run / "verdict.json"),
        "report.html": sha256_file(run / "report.html"),
    }


def test_publishing_again_rewrites_nothing(run: Path, registry: Path, helpers: Any) -> None:
    first = publish_run(run, registry)
    before = helpers.snapshot(registry)
    second = publish_run(run, registry)
    assert helpers.snapshot(registry) == before
    assert (second.created, second.evidence_created, second.tags_set, second.blobs_written) == (False, False, (), 0)
    assert (second.digest, second.evidence_digest) == (first.digest, first.evidence_digest)


def test_new_evidence_for_the_same_model_is_added(run: Path, registry: Path, helpers: Any) -> None:
    first = publish_run(run, registry)
    (run / "evidence/quality.jsonl").write_text('{"kind":"window","measured":"again"}\n')
    helpers.write_evidence(run)
    helpers.write_verdict(run)
    second = publish_run(run, registry)
    assert second.digest == first.digest and second.evidence_digest != first.evidence_digest
    assert (second.created, second.evidence_created, second.tags_set) == (False, True, ())
    assert [found.digest for found in show(registry, "small").evidence] == [
        first.evidence_digest,
        second.evidence_digest,
    ]


def test_a_new_tag_for_the_same_model(run: Path, registry: Path) -> None:
    publish_run(run, registry)
    receipt = publish_run(run, registry, ("latest", "1.0"))
    assert (receipt.created, receipt.tags_set, receipt.blobs_written) == (False, ("1.0",), 0)


def test_tag_rules(make_run: MakeRun, registry: Path, helpers: Any) -> None:
    one = publish_run(make_run("one"), registry, ("latest", "1.0"))
    other = make_run("two", files={"model.onnx": b"other"})
    before = helpers.snapshot(registry)
    with pytest.raises(UsageError, match=r"small:1\.0 is .* versions do not move"):
        publish_run(other, registry, ("latest", "1.0"))
    assert helpers.snapshot(registry) == before
    two = publish_run(other, registry, ("latest", "1.1"))
    assert {(listing.tag, listing.digest) for listing in list_artifacts(registry)} == {
        ("latest", two.digest),
        ("1.0", one.digest),
        ("1.1", two.digest),
    }
    assert publish_run(other, registry, ("1.0",), force=True).tags_set == ("1.0",)
    helpers.assert_sound(registry)


def test_a_damaged_blob_is_mended_by_publishing_again(run: Path, registry: Path, helpers: Any) -> None:
    publish_run(run, registry)
    for number, path in enumerate(sorted((registry / "blobs/sha256").iterdir())):
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        receipt = publish_run(run, registry)
        assert (receipt.created, receipt.blobs_written) == (False, 1), number
        helpers.assert_sound(registry)


@pytest.mark.parametrize(("verdict", "exit_code"), [("FAIL", 1), ("INCONCLUSIVE", 3), ("INVALID", 4)])
@pytest.mark.parametrize("force", [False, True])
def test_other_verdicts_are_refused(
    make_run: MakeRun, registry: Path, verdict: str, exit_code: int, force: bool
) -> None:
    with pytest.raises(
        PublishRefusedError, match=f"is {verdict}; only a PASS is published. it is {verdict}"
    ) as refused:
        publish_run(make_run(verdict=verdict), registry, force=force)
    assert refused.value.exit_code == exit_code
    assert not registry.exists()


def test_an_invalid_run_without_evidence_is_refused_for_being_invalid(make_run: MakeRun, registry: Path) -> None:
    run = make_run(verdict="INVALID")
    (run / "evidence/speed.jsonl").unlink()
    with pytest.raises(PublishRefusedError) as refused:
        publish_run(run, registry)
    assert refused.value.exit_code == 4


def test_no_verdict_is_refused(run: Path, registry: Path) -> None:
    (run / "verdict.json").unlink()
    with pytest.raises(PublishRefusedError, match="never judged") as refused:
        publish_run(run, registry)
    assert refused.value.exit_code == 4


def change_model(run: Path, helpers: Any) -> None:
    path = run / "artifact/model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def add_file(run: Path, helpers: Any) -> None:
    (run / "artifact/extra.json").write_text("{}")


def rename_file(run: Path, helpers: Any) -> None:
    (run / "artifact/tokenizer.json").rename(run / "artifact/tokens.json")


def remove_file(run: Path, helpers: Any) -> None:
    (run / "artifact/README.md").unlink()


def change_evidence(run: Path, helpers: Any) -> None:
    path = run / "evidence/evidence.json"
    path.write_bytes(path.read_bytes() + b"\n")


def change_quality(run: Path, helpers: Any) -> None:
    (run / "evidence/quality.jsonl").write_text('{"kind":"window","kl":[0]}\n')


def change_speed(run: Path, helpers: Any) -> None:
    (run / "evidence/speed.jsonl").write_text("")


def drop_quality(run: Path, helpers: Any) -> None:
    (run / "evidence/quality.jsonl").unlink()


def drop_report(run: Path, helpers: Any) -> None:
    (run / "report.html").unlink()


def evidence_of_other_candidate(run: Path, helpers: Any) -> None:
    helpers.write_evidence(run, candidate={"bundle_digest": OTHER})
    helpers.write_verdict(run)


def evidence_of_other_baseline(run: Path, helpers: Any) -> None:
    helpers.write_evidence(run, baseline={"bundle_digest": OTHER})
    helpers.write_verdict(run)


def evidence_of_other_recipe(run: Path, helpers: Any) -> None:
    helpers.write_evidence(run, recipe={"digest": OTHER})
    helpers.write_verdict(run)


def evidence_without_speed(run: Path, helpers: Any) -> None:
    helpers.write_evidence(run, files={"quality.jsonl": sha256_file(run / "evidence/quality.jsonl")})
    helpers.write_verdict(run)


def evidence_of_a_later_version(run: Path, helpers: Any) -> None:
    helpers.write_evidence(run, version=2)
    helpers.write_verdict(run)


def verdict_of_other_recipe(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, recipe=OTHER)


def verdict_of_other_evidence(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, evidence=OTHER)


def verdict_of_no_candidate(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, candidate=None)


def fail_for_other_bytes(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, verdict="FAIL", candidate=OTHER)


def unknown_verdict(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, verdict="GREAT")


def pass_with_the_exit_code_of_fail(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, exit_code=1)


def pass_with_a_failed_gate(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, gates=[{"verdict": "PASS"}, {"verdict": "FAIL"}])


def pass_without_gates(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, gates=[])


def pass_with_a_failed_check(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, checks=[{"name": "x", "passed": False}])


def verdict_that_is_no_json(run: Path, helpers: Any) -> None:
    (run / "verdict.json").write_text("PASS")


def verdict_of_a_later_version(run: Path, helpers: Any) -> None:
    helpers.write_verdict(run, version=2)


def lock_of_other_recipe(run: Path, helpers: Any) -> None:
    (run / "artifact/assay.lock.json").write_text(json.dumps({"recipe": {"digest": OTHER}}))
    helpers.write_evidence(run)
    helpers.write_verdict(run)


def no_lock(run: Path, helpers: Any) -> None:
    (run / "artifact/assay.lock.json").unlink()
    helpers.write_evidence(run)
    helpers.write_verdict(run)


TAMPERINGS = [
    *(change_model, add_file, rename_file, remove_file, change_evidence, change_quality, change_speed, drop_quality),
    *(drop_report, evidence_of_other_candidate, evidence_of_other_baseline, evidence_of_other_recipe),
    *(evidence_without_speed, evidence_of_a_later_version, verdict_of_other_recipe, verdict_of_other_evidence),
    *(verdict_of_no_candidate, fail_for_other_bytes, unknown_verdict, pass_with_the_exit_code_of_fail),
    *(pass_with_a_failed_gate, pass_without_gates, pass_with_a_failed_check, verdict_that_is_no_json),
    *(verdict_of_a_later_version, lock_of_other_recipe, no_lock),
]


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda tamper: tamper.__name__)
def test_a_broken_chain_is_an_integrity_error(
    run: Path, registry: Path, helpers: Any, tamper: Callable[[Path, Any], None]
) -> None:
    tamper(run, helpers)
    with pytest.raises(IntegrityError) as broken:
        publish_run(run, registry, force=True)
    assert broken.value.exit_code == 5
    assert not registry.exists()


def test_bad_names_and_tags_are_refused_first(run: Path, registry: Path) -> None:
    with pytest.raises(UsageError, match="cannot name an artifact"):
        publish(run / "artifact", run, registry, "../small")
    with pytest.raises(UsageError, match="cannot be a tag"):
        publish(run / "artifact", run, registry, "small", ["a:b"])
    assert not registry.exists()


def test_an_index_that_would_be_too_long_is_not_written(
    run: Path, registry: Path, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_run(run, registry)
    before = (registry / "index.json").read_bytes()
    monkeypatch.setattr("assay.registry.layout.MAX_INDEX_BYTES", len(before))
    with pytest.raises(AssayError, match="Start another registry"):
        publish_run(run, registry, ("another",))
    assert (registry / "index.json").read_bytes() == before


def test_more_is_said_about_a_model_than_its_evidence(run: Path, registry: Path, helpers: Any) -> None:
    seen: list[Judged] = []

    def attach(judged: Judged) -> list[Attachment]:
        seen.append(judged)
        content = judged.model.digest.encode()
        return [Attachment("application/vnd.test", (part("x.txt", "text/plain", content),), {"dev.test": "y"})]

    receipt = publish(run / "artifact", run, registry, "small", attach=attach)
    assert (seen[0].model.digest, seen[0].evidence.digest) == (receipt.digest, receipt.evidence_digest)
    repository = open_registry(registry).repository("small")
    model = repository.resolve(parse_reference("small"))
    (found,) = repository.referrers(model.digest, "application/vnd.test")
    assert found.annotations["dev.test"] == "y" and len(repository.referrers(model.digest)) == 2
    manifest = read_attachment(repository, found, model)
    assert repository.read_json_blob(manifest.layers[0]) == receipt.digest.encode()
    helpers.assert_sound(registry)
    before = helpers.snapshot(registry)
    assert publish(run / "artifact", run, registry, "small", attach=attach).blobs_written == 0
    assert helpers.snapshot(registry) == before
    with pytest.raises(IntegrityError, match="its subject is not"):
        read_attachment(repository, found, found)
