"""The whole job on a tiny model: what passes is published, what does not is not, and nothing is done twice or by halves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from assay.artifact import MANIFEST_NAME, bundle_digest, directory_digest, read_manifest
from assay.build import build_candidate
from assay.conclusion import judge_again, publish_run
from assay.errors import (
    EXIT_INCONCLUSIVE,
    AssayError,
    IntegrityError,
    NotSupportedError,
    PublishRefusedError,
    UsageError,
)
from assay.files import canonical_json, read_json, readable_json, sha256_bytes, sha256_file
from assay.host import package_versions
from assay.job import resolve
from assay.pipeline import Outcome, compile_recipe
from assay.progress import Progress
from assay.quantize.model import quantize_model
from assay.recipe_file import load_recipe
from assay.registry.inspection import verify
from assay.registry.pull import pull
from assay.workspace import Workspace
from assay_evals import evaluate as evaluation
from assay_evals.evidence import read_evidence
from assay_evals.runtimes.base import generate_text
from assay_evals.task_findings import judged_items

MakeRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, tuple[bytes, int, int]]]
IMPOSSIBLE = {"kl_divergence": {"max": 1e-9}}


def compile_(recipe: Path, workspace: Path, force: bool = False, **options: bool) -> Outcome:
    loaded, _ = load_recipe(recipe)
    return compile_recipe(loaded, recipe.parent, Workspace(workspace, Progress(), force), **options)


class Tiny:
    """A compiled tiny recipe, published to its own registry; read-only for the tests that share it."""

    def __init__(self, directory: Path, make_recipe: MakeRecipe) -> None:
        self.registry, self.workspace = directory / "store", directory / "artifacts"
        self.recipe = make_recipe(directory, publish={"registry": str(self.registry), "tags": ["latest", "1.0"]})
        self.outcome = compile_(self.recipe, self.workspace)
        self.digest = directory_digest(self.outcome.run / "artifact")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"), make_recipe)


@pytest.fixture
def own(tmp_path: Path, tiny: Tiny, make_recipe: MakeRecipe) -> Tiny:
    """The same, for tests that change it: a copy of the workspace, where all is cached."""
    shutil.copytree(tiny.workspace, tmp_path / "artifacts", symlinks=True)
    return Tiny(tmp_path, make_recipe)


@pytest.fixture
def run(tmp_path: Path, tiny: Tiny) -> Path:
    """A copy of the finished run that may be tampered with."""
    return shutil.copytree(tiny.outcome.run, tmp_path / "run")


# A PASS


def test_a_pass_is_published_pulled_and_generates(tiny: Tiny, tmp_path: Path) -> None:
    outcome = tiny.outcome
    assert (outcome.verdict.verdict, outcome.verdict.exit_code, outcome.refused) == ("PASS", 0, None)
    receipt = outcome.receipt
    assert receipt is not None and receipt.created and receipt.tags_set == ("latest", "1.0")
    assert receipt.bundle_digest == outcome.verdict.candidate == tiny.digest
    assert len(verify(tiny.registry, "tiny:1.0").evidence) == 1
    pulled = pull(tiny.registry, receipt.reference, tmp_path / "served")
    assert pulled.bundle_digest == tiny.digest == directory_digest(tmp_path / "served")
    manifest = read_manifest(tmp_path / "served")
    continued = generate_text(manifest["runtime"], tmp_path / "served", "The assert statement", 6)
    assert continued.text and continued.time_to_first_token_seconds > 0


def test_the_run_holds_what_the_verdict_rests_on(tiny: Tiny) -> None:
    run, verdict = tiny.outcome.run, tiny.outcome.verdict
    written = ["artifact", "evidence", "junit.xml", "report.html", "report.md", "verdict.json"]
    assert sorted(path.name for path in run.iterdir()) == written
    assert read_json(run / "verdict.json") == json.loads(readable_json(verdict.to_json()))
    header = read_json(run / "evidence/evidence.json")
    assert verdict.evidence == sha256_file(run / "evidence/evidence.json")
    assert header["candidate"]["bundle_digest"] == verdict.candidate == directory_digest(run / "artifact")
    assert header["recipe"]["digest"] == verdict.recipe == load_recipe(tiny.recipe)[0].digest()
    assert all(check["passed"] for check in header["checks"]) and header["checks"]
    assert {row.metric for row in verdict.gates} == {"kl_divergence", "size_on_disk"}
    assert "PASS" in tiny.outcome.report.read_text()


def test_the_manifest_says_what_each_layer_really_holds(tiny: Tiny) -> None:
    manifest = read_manifest(tiny.outcome.run / "artifact")
    layers = {row["name"]: row for row in manifest["layers"]}
    assert len(layers) == 2 * 7 + 1
    assert [name for name, row in layers.items() if row["scheme"] != "W8A16"] == ["lm_head"]
    down = layers["model.layers.1.mlp.down_proj"]
    assert down["shape"] == [64, 128] and down["group_size"] == 32 and 0 < down["relative_error"] < 0.01
    assert down["bits_per_weight"] == manifest["bits_per_weight"] == 8.5, "8 bits, and a 16-bit scale for 32 of them"
    assert layers["lm_head"]["scheme"] == "none"
    assert manifest["fallbacks"] == ["not quantized: lm_head."] and 0 < manifest["coverage"] < 1
    assert (manifest["method"], manifest["source"], manifest["runtime"]) == ("rtn", "./model", "transformers")
    assert manifest["requires"] == {}, "engines of many releases load a checkpoint"


def test_the_lock_names_everything_that_decides_the_bytes(tiny: Tiny) -> None:
    lock = read_json(tiny.outcome.run / "artifact/assay.lock.json")
    recipe = load_recipe(tiny.recipe)[0]
    assert lock["recipe"]["digest"] == recipe.digest() == sha256_bytes(canonical_json(lock["recipe"]["content"]))
    assert lock["tools"] == package_versions()
    model = tiny.recipe.parent / "model"
    assert lock["model"]["digest"] == bundle_digest({path.name: sha256_file(path) for path in model.iterdir()})
    assert (lock["calibration"]["samples"], lock["calibration"]["length"]) == (4, 32)
    assert lock["host"]["cores"] >= 1


# Nothing is done twice


def test_the_same_recipe_again_builds_and_publishes_nothing(own: Tiny, snapshot: Snapshot) -> None:
    cache, store = snapshot(own.workspace / "cache"), snapshot(own.registry)
    verdict = (own.outcome.run / "verdict.json").read_bytes()
    second = compile_(own.recipe, own.workspace)
    assert (snapshot(own.workspace / "cache"), snapshot(own.registry)) == (cache, store)
    assert second.receipt is not None and not second.receipt.created and second.receipt.blobs_written == 0
    assert directory_digest(second.run / "artifact") == own.digest
    assert (second.run / "verdict.json").read_bytes() == verdict


@pytest.mark.slow
def test_force_builds_everything_again_to_the_same_bytes(own: Tiny, snapshot: Snapshot) -> None:
    before = snapshot(own.workspace / "cache")
    forced = compile_(own.recipe, own.workspace, force=True, fresh_evidence=True)
    after = snapshot(own.workspace / "cache")
    assert before.keys() == after.keys()
    assert all(before[name][1:] != after[name][1:] for name in before if not name.endswith(".lock"))
    built = [name for name in before if not name.startswith(("quality", "speed"))]
    assert [before[name][0] for name in built] == [after[name][0] for name in built]
    assert directory_digest(forced.run / "artifact") == own.digest


def test_fresh_evidence_measures_and_builds_nothing(own: Tiny, snapshot: Snapshot) -> None:
    before = snapshot(own.workspace / "cache")
    fresh = compile_(own.recipe, own.workspace, fresh_evidence=True)
    after = snapshot(own.workspace / "cache")
    changed = {name.split("-")[0].lstrip(".") for name in before if before[name] != after[name]}
    assert changed == {"quality", "speed"} and fresh.verdict.verdict == "PASS"
    known = read_json(fresh.run / "evidence/evidence.json")["environment"]
    assert known["speed_measurements"] == 2, "how often it was measured does not stay hidden"


def test_another_gate_is_judged_on_the_same_measurements(
    own: Tiny, make_recipe: MakeRecipe, snapshot: Snapshot
) -> None:
    before = snapshot(own.workspace / "cache")
    failed = compile_(make_recipe(own.recipe.parent, gate=IMPOSSIBLE), own.workspace)
    after = snapshot(own.workspace / "cache")
    assert failed.verdict.verdict == "FAIL"
    assert {name.split("-")[0].lstrip(".") for name in after.keys() - before.keys()} == {"candidate"}
    assert all(after[name] == before[name] for name in before)
    assert (failed.verdict.row("kl_divergence") or 0).difference == own.outcome.verdict.row("kl_divergence").difference


def test_a_cached_artifact_that_was_changed_is_not_used(own: Tiny) -> None:
    weights = (own.outcome.run / "artifact").resolve() / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    again = compile_(own.recipe, own.workspace)
    assert directory_digest(again.run / "artifact") == own.digest == again.verdict.candidate


@pytest.mark.slow
def test_the_artifact_depends_on_neither_place_nor_time(tiny: Tiny, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(tmp_path / "another place")
    (tmp_path / "another place/model/README.md").write_text("a note that is not part of the model")
    other = compile_(recipe, tmp_path / "other artifacts")
    assert directory_digest(other.run / "artifact") == tiny.digest
    words = [b"another place", b"other artifacts", str(tmp_path).encode()]
    for path in (other.run / "artifact").iterdir():
        assert not any(word in path.read_bytes() for word in words), path


# What does not pass


@pytest.mark.parametrize(
    ("parts", "verdict", "exit_code"),
    [
        ({"gate": IMPOSSIBLE}, "FAIL", 1),
        ({"gate": None}, "INCONCLUSIVE", 3),
        ({}, "INVALID", 4),
    ],
)
def test_only_a_pass_is_published(
    own: Tiny, make_recipe: MakeRecipe, parts: dict[str, Any], verdict: str, exit_code: int
) -> None:
    directory = own.recipe.parent
    registry = directory / "another store"
    if verdict == "INCONCLUSIVE":
        # The divergence found, which its own interval spans.
        found = own.outcome.verdict.row("kl_divergence")
        parts = {"gate": {"kl_divergence": {"max": found.difference}}}
    if verdict == "INVALID":
        # All of one document: nothing is known of the spread between documents.
        (directory / "text.txt").write_text("The cat sat on the mat and looked at Python. " * 400)
        text = {"source": "text", "path": "text.txt"}
        parts |= {"evaluate": {"text": text, "length": 64, "quality": [{"metric": "kl_divergence", "tokens": 300}]}}
        parts |= {"gate": {"kl_divergence": {"max": 1.0}}}
    recipe = make_recipe(directory, publish={"registry": str(registry)}, **parts)
    outcome = compile_(recipe, own.workspace)
    assert (outcome.verdict.verdict, outcome.verdict.exit_code) == (verdict, exit_code)
    assert outcome.receipt is None and verdict in (outcome.refused or "")
    with pytest.raises(PublishRefusedError) as refused:
        publish_run(outcome.run, registry, ("latest",), force=True)
    assert refused.value.exit_code == exit_code
    assert not registry.exists(), "not even an empty registry is left"


def test_text_that_was_calibrated_on_is_refused_before_anything_is_built(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    (tmp_path / "text.txt").write_text(
        "\n---\n".join(f"In the year {n} the cat sat on mat {n * n}. " * 30 for n in range(9))
    )
    text = {"source": "text", "path": "text.txt"}
    evaluate = {"text": text, "length": 64, "quality": [{"metric": "kl_divergence", "tokens": 300}]}
    gate = {"kl_divergence": {"max": 1.0}}
    recipe = make_recipe(tmp_path, calibration=text | {"samples": 4, "length": 32}, evaluate=evaluate, gate=gate)
    with pytest.raises(UsageError, match=r"evaluate\.text was calibrated on: .* stand in the calibration text"):
        compile_(recipe, tmp_path / "artifacts")
    assert not any((tmp_path / "artifacts/cache").glob("*"))


def test_a_registry_that_cannot_be_is_known_before_anything_is_built(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/letter.txt").touch()
    recipe = make_recipe(tmp_path, publish={"registry": str(tmp_path / "taken")})
    with pytest.raises(UsageError, match="not a registry, and not empty"):
        compile_(recipe, tmp_path / "artifacts")
    assert not any((tmp_path / "artifacts").rglob("cache/*"))


def test_a_version_that_is_taken_leaves_the_verdict_to_be_seen(own: Tiny, make_recipe: MakeRecipe) -> None:
    """And the code of what went wrong."""
    parts = {"quantize": {"scheme": "W8A16", "group_size": 64, "method": "rtn"}}
    publish = {"registry": str(own.registry), "tags": ["1.0"]}
    outcome = compile_(make_recipe(own.recipe.parent, publish=publish, **parts), own.workspace)
    assert (outcome.verdict.verdict, outcome.receipt, outcome.exit_code) == ("PASS", None, 2)
    assert "versions do not move" in (outcome.refused or "") and outcome.report.is_file()


def test_a_model_that_changes_under_the_job_is_noticed(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path)
    path = tmp_path / "model/model.safetensors"

    def touched(*arguments: Any) -> None:
        quantize_model(*arguments)
        path.write_bytes(path.read_bytes())

    monkeypatch.setattr("assay.build.quantize_model", touched)
    with pytest.raises(AssayError, match="changed while they were read"):
        compile_(recipe, tmp_path / "artifacts")
    assert not [stage for stage in (tmp_path / "artifacts/cache").glob("quantize-*") if stage.suffix != ".resumable"]


def test_a_pickle_is_never_handed_to_the_builder(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(tmp_path, target={"format": "onnxruntime-genai"})
    (tmp_path / "model/model.safetensors").rename(tmp_path / "model/pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model\.bin is a pickle, which Assay never loads"):
        compile_(recipe, tmp_path / "artifacts")
    assert not any((tmp_path / "artifacts/cache").glob("*"))


def test_a_quantized_model_is_made_float_first_when_the_recipe_says_so(
    tiny: Tiny, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe(tmp_path, model=tiny.outcome.run / "artifact")
    with pytest.raises(NotSupportedError, match="already quantized"):
        compile_(recipe, tmp_path / "artifacts")
    recipe.write_text(recipe.read_text().replace('"./model"', '"./model", "dequantize": true'))
    run = compile_(recipe, tmp_path / "artifacts").run
    notes = json.loads((run / "artifact" / MANIFEST_NAME).read_bytes())["fallbacks"]
    assert "the source was quantized (compressed-tensors) and was made bfloat16 first" in notes[0]
    assert notes[0] in (run / "report.html").read_text()


@pytest.mark.slow
def test_every_slice_of_a_tagged_text_is_judged(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """One language of two, in a text of 24 documents."""
    lines = [
        {
            "text": f"The cat number {number} sat on the mat of number {number * 7} and looked at me. " * 12,
            "language": tag,
        }
        for number, tag in enumerate(("en", "de") * 12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = {"source": "jsonl", "path": "rows.jsonl", "field": "text", "tag": "language"}
    evaluate = {"length": 64, "text": text, "quality": [{"metric": "kl_divergence", "tokens": 1500}]}
    gate = {"kl_divergence": {"max": 1.0}, "slices": {"kl_divergence": {"max": 1e-9}}}
    verdict = compile_(make_recipe(tmp_path, evaluate=evaluate, gate=gate), tmp_path / "artifacts").verdict
    assert {row.metric: row.verdict for row in verdict.gates} == {
        "kl_divergence": "PASS",
        "kl_divergence@tag=de": "FAIL",
        "kl_divergence@tag=en": "FAIL",
    }
    assert sum(row.n for row in verdict.gates[1:]) == verdict.gates[0].n


def test_continuations_are_measured_when_they_are_asked_for(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    greedy = {"metric": "greedy_agreement", "prompts": 6, "prompt_tokens": 16, "new_tokens": 8}
    evaluate = {"length": 64, "quality": [{"metric": "kl_divergence", "tokens": 400}, greedy]}
    gate = {"kl_divergence": {"max": 1.0}, "greedy_agreement": {"min": 0.01}}
    outcome = compile_(make_recipe(tmp_path, evaluate=evaluate, gate=gate), tmp_path / "artifacts")
    rows = [json.loads(line) for line in (outcome.run / "evidence/quality.jsonl").read_text().splitlines()]
    continuations = [row for row in rows if row["kind"] == "continuation"]
    assert len(continuations) == 6 and all(row["prompt_tokens"] == 16 for row in continuations)
    found = outcome.verdict.row("greedy_agreement")
    assert found is not None and found.n == 6 and outcome.verdict.verdict == "PASS", outcome.verdict.reasons


@pytest.mark.slow
def test_an_unsettled_gate_looks_again_at_twice_the_samples_and_reads_nothing_twice(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(most: float, looks: int) -> Outcome:
        quality = [
            {"metric": "kl_divergence", "tokens": 400},
            {"metric": "greedy_agreement", "prompts": 3, "new_tokens": 4},
        ]
        evaluate = {"length": 64, "quality": quality, "looks": looks}
        recipe = make_recipe(tmp_path, evaluate=evaluate, gate={"kl_divergence": {"max": most}})
        return compile_(recipe, tmp_path / "artifacts")

    first = run(9.0, 1).verdict.gates[0]
    assert first.difference is not None and first.confidence == pytest.approx(0.9)
    read: list[int] = []
    measured = evaluation.measure_quality

    def counted(before: Any, after: Any, passages: Any, progress: Any) -> Any:
        read.append(sum(len(passage.tokens) - 1 for passage in passages))
        return measured(before, after, passages, progress)

    monkeypatch.setattr(evaluation, "measure_quality", counted)
    # No sample settles a gate at the very divergence that was found at first, or none soon.
    outcome = run(first.difference, 3)
    row = outcome.verdict.gates[0]
    assert row.confidence == pytest.approx(1 - 0.1 / 3)
    kinds = [json.loads(line)["kind"] for line in (outcome.run / "evidence/quality.jsonl").read_text().splitlines()]
    assert (row.n - first.n, len(read)) == (sum(read), kinds.count("continuation") // 3 // 2)
    assert row.n >= 800 and 1 <= len(read) <= 2
    assert not [check for check in outcome.verdict.checks if not check.passed]
    again = run(first.difference, 3).verdict
    assert again.to_json() == outcome.verdict.to_json() and len(read) <= 2


@pytest.mark.slow
def test_a_settled_gate_does_not_look_again(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    for most, verdict in ((9.0, "PASS"), (1e-9, "FAIL")):
        evaluate = {"length": 64, "quality": [{"metric": "kl_divergence", "tokens": 400}], "looks": 5}
        recipe = make_recipe(tmp_path, evaluate=evaluate, gate={"kl_divergence": {"max": most}})
        outcome = compile_(recipe, tmp_path / "artifacts")
        assert (outcome.verdict.verdict, outcome.verdict.gates[0].n < 800) == (verdict, True)


def test_a_margin_out_of_reach_is_refused_before_anything_is_built_where_the_recipe_says_so(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    evaluate = {"length": 64, "quality": [{"metric": "cloze_accuracy", "samples": 20}], "unreachable": "refuse"}
    recipe = make_recipe(tmp_path, evaluate=evaluate, gate={"cloze_accuracy": {"max_drop": 0.01}})
    with pytest.raises(
        UsageError, match=r"too few for the gate .*The margin is 1 points: ask for about [\d,]+ questions"
    ):
        compile_(recipe, tmp_path / "artifacts")
    assert not [stage for stage in (tmp_path / "artifacts/cache").glob("*") if stage.name.startswith("quantize")]


def test_a_text_too_short_for_the_last_look_is_refused_before_anything_is_built(
    tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    (tmp_path / "short.txt").write_text("\n\n".join(f"A sentence, number {number}. " * 20 for number in range(12)))
    text = {"source": "text", "path": "short.txt"}
    evaluate = {"length": 64, "text": text, "quality": [{"metric": "kl_divergence", "tokens": 400}], "looks": 5}
    with pytest.raises(UsageError, match="the recipe declares 6400"):
        compile_(make_recipe(tmp_path, evaluate=evaluate, gate={"kl_divergence": {"max": 1.0}}), tmp_path / "artifacts")
    assert not [stage for stage in (tmp_path / "artifacts/cache").glob("*") if stage.name.startswith("quantize")]


def test_structured_output_is_measured_when_it_is_asked_for_and_kept(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    choice = {"enum": ["a", "b"], "x-guidance": {"whitespace_flexible": False}}
    lines = [{"prompt": f"Choose {number}:", "schema": choice, "expected": "a"} for number in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {"items": {"source": "jsonl", "path": "items.jsonl"}, "samples": 4, "new_tokens": 8}
    evaluate = {"length": 64, "quality": [{"metric": "kl_divergence", "tokens": 400}], "structured": settings}
    recipe = make_recipe(tmp_path, evaluate=evaluate, gate={"kl_divergence": {"max": 1.0}})
    outcome = compile_(recipe, tmp_path / "artifacts")
    assert outcome.verdict.verdict == "PASS", outcome.verdict.reasons
    found = {row.metric: row for row in outcome.verdict.reported}
    # A random model writes no JSON by itself, and what it is made to write is valid.
    assert (found["structured.valid"].candidate, found["structured.enforced.valid"].candidate) == (0, 1)
    assert found["structured.enforced.correct"].n == 4 and found["structured.first_use"].n == 4
    rows = (outcome.run / "evidence/quality.jsonl").read_bytes()
    assert compile_(recipe, tmp_path / "artifacts").run.joinpath("evidence/quality.jsonl").read_bytes() == rows
    cached = [path.name for path in (tmp_path / "artifacts/cache").iterdir() if path.name.startswith("structured-")]
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(line | {"expected": "b"}) for line in lines))
    compile_(recipe, tmp_path / "artifacts")
    again = [path.name for path in (tmp_path / "artifacts/cache").iterdir() if path.name.startswith("structured-")]
    assert len(again) > len(cached) > 0


@pytest.mark.slow
def test_another_look_at_structured_output_asks_for_further_items_only(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"prompt": "Choose:", "schema": {"enum": ["a", "b"]}}
    (tmp_path / "items.jsonl").write_text("\n".join([json.dumps(line)] * 4))
    settings = {"items": {"source": "jsonl", "path": "items.jsonl"}, "samples": 2, "new_tokens": 8}
    evaluate = {"length": 64, "quality": [{"metric": "kl_divergence", "tokens": 400}], "structured": settings}

    def rows(looks: int) -> list[str]:
        recipe = make_recipe(tmp_path, evaluate=evaluate | {"looks": looks}, gate={"kl_divergence": {"max": 1.0}})
        lines = (compile_(recipe, tmp_path / "artifacts").run / "evidence/quality.jsonl").read_text().splitlines()
        return [line for line in lines if json.loads(line)["kind"] == "structured"]

    monkeypatch.setattr("assay_evals.evaluate._Comparison.undecided", lambda *_: ["structured.correct"])
    first, second = rows(1), rows(2)
    # The times are those of the first look.
    assert len(first) == 2 and len(second) == 4 and second[:2] == first
    with pytest.raises(UsageError, match=r"items\.jsonl has 4 items; the recipe asks for 8"):
        rows(3)


@pytest.mark.parametrize(
    ("line", "parts", "message"),
    [
        ({"schema": {"type": "text"}}, {}, r"items\.jsonl:1: 'schema' is no JSON Schema"),
        ({"expected": 3}, {}, r"items\.jsonl:1: 'expected' is not valid by its own schema"),
        ({}, {"samples": 5}, r"items\.jsonl has 4 items; the recipe asks for 5"),
        ({"prompt": "word " * 300}, {}, r"the prompt of items\.jsonl:1 has \d+ tokens; with 8 new ones"),
        (
            {"expected": None},
            {"gate": {"max_drop": 0.1}},
            r"max_drop needs items that say what is right; 0 of the 4 do",
        ),
    ],
)
def test_structured_output_that_could_not_be_measured_is_refused_before_anything_is_built(
    tmp_path: Path, make_recipe: MakeRecipe, line: Any, parts: Any, message: str
) -> None:
    good = {"prompt": "Choose:", "schema": {"enum": ["a", "b"]}, "expected": "a"}
    (tmp_path / "items.jsonl").write_text("\n".join([json.dumps(good | line)] * 4))
    structured = {"items": {"source": "jsonl", "path": "items.jsonl"}, "samples": 4, "new_tokens": 8} | parts
    gate = structured.pop("gate", None)
    evaluate = {"length": 64, "quality": [{"metric": "kl_divergence", "tokens": 400}], "structured": structured}
    gates = {"kl_divergence": {"max": 1.0}} | ({"structured": gate} if gate else {})
    recipe = make_recipe(tmp_path, evaluate=evaluate, gate=gates)
    with pytest.raises(UsageError, match=message):
        compile_(recipe, tmp_path / "artifacts")
    assert not list((tmp_path / "artifacts").glob("cache/*"))


QUESTIONS = [
    {
        "query": f"Line {number} binds the name",
        "choices": ["x to it", "none"],
        "gold": number % 2,
        "kind": "ab"[number % 2],
    }
    for number in range(20)
]
TASK = {"name": "mc", "kind": "multiple_choice", "items": {"source": "jsonl", "path": "mc.jsonl"}, "tag": "kind"}


def with_tasks(make_recipe: MakeRecipe, directory: Path, **parts: Any) -> Path:
    recipe = make_recipe(directory, **parts)
    (directory / "mc.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS), encoding="utf-8")
    content = json.loads(recipe.read_text(encoding="utf-8"))
    content["evaluate"]["tasks"] = [TASK]
    recipe.write_text(json.dumps(content), encoding="utf-8")
    return recipe


def test_tasks_are_answered_by_the_artifact_and_judged(
    tmp_path: Path, make_recipe: MakeRecipe, snapshot: Snapshot
) -> None:
    recipe = with_tasks(make_recipe, tmp_path)
    outcome = compile_(recipe, tmp_path / "artifacts")
    row = outcome.verdict.row("task.mc")
    assert outcome.verdict.verdict == "PASS" and row is not None and (row.n, row.clusters) == (20, 20)
    assert {row.metric for row in outcome.verdict.slices} >= {"task.mc@tag=a", "task.mc@tag=b"}
    assert judge_again(outcome.run) == outcome.verdict
    # The cache is by the items: the same ones are not asked again, another one is a stage of its own.
    stages = {path.name for path in (tmp_path / "artifacts" / "cache").glob("tasks-*") if path.is_dir()}
    before = snapshot(tmp_path / "artifacts" / "cache")
    compile_(recipe, tmp_path / "artifacts")
    assert snapshot(tmp_path / "artifacts" / "cache") == before and len(stages) == 1
    other = json.dumps(QUESTIONS[0] | {"query": "Line 0 binds no name"})
    (tmp_path / "mc.jsonl").write_text("\n".join([other, *map(json.dumps, QUESTIONS[1:])]), encoding="utf-8")
    compile_(recipe, tmp_path / "artifacts")
    kinds = [path.name.partition("-")[0] for path in (tmp_path / "artifacts" / "cache").iterdir() if path.is_dir()]
    assert (kinds.count("tasks"), kinds.count("quality"), kinds.count("speed")) == (2, 1, 1)


@pytest.mark.slow
def test_a_task_that_is_not_settled_is_not_asked_again(tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """Twenty answers, all right in both arms, cannot show that fewer than 5 in 100 are lost; no other samples would."""
    recipe = with_tasks(make_recipe, tmp_path)
    evidence = read_evidence(compile_(recipe, tmp_path / "artifacts").run / "evidence")
    answers = [item.answers[0] for item in judged_items(evidence, "mc")]
    rows = [row | {"gold": answer} for row, answer in zip(QUESTIONS, answers, strict=True)]
    (tmp_path / "mc.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    content = json.loads(recipe.read_text(encoding="utf-8"))
    content["evaluate"]["looks"] = 2
    content["gate"] = {"kl_divergence": {"max": 1.0}, "tasks": {"mc": {"max_drop": 0.05}}}
    recipe.write_text(json.dumps(content), encoding="utf-8")
    outcome = compile_(recipe, tmp_path / "artifacts")
    assert {row.metric: row.verdict for row in outcome.verdict.gates} == {
        "kl_divergence": "PASS",
        "task.mc": "INCONCLUSIVE",
    }
    assert outcome.exit_code == EXIT_INCONCLUSIVE
    kinds = [path.name.partition("-")[0] for path in (tmp_path / "artifacts" / "cache").iterdir() if path.is_dir()]
    assert (kinds.count("quality"), kinds.count("speed")) == (1, 1)


@pytest.mark.slow
def test_a_task_with_more_items_is_asked_for_them_until_it_is_settled(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred answers, all right in both arms: twenty and forty of them cannot show that fewer than 6 in 100 are lost, eighty can."""
    recipe = with_tasks(make_recipe, tmp_path)
    rows = [QUESTIONS[0] | {"query": f"Line {number} binds the name"} for number in range(100)]
    content = json.loads(recipe.read_text(encoding="utf-8"))

    def run(**parts: Any) -> Outcome:
        (tmp_path / "mc.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        recipe.write_text(json.dumps(content | parts), encoding="utf-8")
        return compile_(recipe, tmp_path / "artifacts")

    items = judged_items(read_evidence(run().run / "evidence"), "mc")
    rows = [row | {"gold": item.answers[0]} for row, item in zip(rows, items, strict=True)]
    asked: list[int] = []
    measured = evaluation.measure_tasks

    def counted(tasks: Any, *rest: Any, look: int) -> Any:
        asked.append(len(tasks[0].added(look)))
        return measured(tasks, *rest, look=look)

    monkeypatch.setattr(evaluation, "measure_tasks", counted)
    evaluate = content["evaluate"] | {"looks": 3, "tasks": [TASK | {"samples": 20}]}
    gate = {"kl_divergence": {"max": 1.0}, "tasks": {"mc": {"max_drop": 0.06}}}
    outcome = run(evaluate=evaluate, gate=gate)
    row = outcome.verdict.row("task.mc")
    assert row is not None and (row.n, asked) == (80, [20, 20, 40]), outcome.verdict.reasons
    assert outcome.verdict.verdict == "PASS" and row.confidence == pytest.approx(1 - 0.1 / 3)
    header = read_evidence(outcome.run / "evidence").header
    assert (header.tasks["mc"].items, header.tasks["mc"].looks) == (80, 3)
    assert run(evaluate=evaluate, gate=gate).verdict == outcome.verdict and asked == [20, 20, 40]
    # Were there no more than these, that would be the end.
    del rows[40:]
    outcome = run(evaluate=evaluate, gate=gate)
    row = outcome.verdict.row("task.mc")
    assert outcome.verdict.verdict == "INCONCLUSIVE" and row is not None and row.n == 40
    assert row.confidence == pytest.approx(1 - 0.1 / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": 5}, r"mc\.jsonl:20: 'gold' is 5"),
        ({"choices": ["a", "long " * 400]}, r"mc\.jsonl:20: query and choice are .* tokens"),
    ],
)
def test_a_bad_item_is_known_before_anything_is_built(
    tmp_path: Path, make_recipe: MakeRecipe, change: dict[str, Any], message: str
) -> None:
    recipe = with_tasks(make_recipe, tmp_path)
    rows = [*QUESTIONS[:-1], QUESTIONS[-1] | change]
    (tmp_path / "mc.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        compile_(recipe, tmp_path / "artifacts")
    assert not (tmp_path / "artifacts" / "cache").exists()


def test_a_recipe_without_publish_and_a_run_without_publishing_stay_here(own: Tiny, make_recipe: MakeRecipe) -> None:
    before = sorted(own.registry.rglob("*"))
    held = compile_(own.recipe, own.workspace, publishing=False)
    assert (held.verdict.verdict, held.receipt, held.refused) == ("PASS", None, None)
    silent = compile_(make_recipe(own.recipe.parent), own.workspace)
    assert (silent.verdict.verdict, silent.receipt, silent.refused) == ("PASS", None, None)
    assert sorted(own.registry.rglob("*")) == before


# What was tampered with


def _refused(run: Path, registry: Path) -> str:
    with pytest.raises(IntegrityError) as refused:
        publish_run(run, registry, ("latest",), force=True)
    assert refused.value.exit_code == 5 and not registry.exists()
    return str(refused.value)


def test_the_untouched_copy_can_be_published(run: Path, tmp_path: Path) -> None:
    assert publish_run(run, tmp_path / "store", ("latest",)).created


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "assay.lock.json", "tokenizer.json"])
def test_an_artifact_changed_by_one_byte_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    data = (run / "artifact" / name).read_bytes()
    (run / "artifact" / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    _refused(run, tmp_path / "store")


def test_a_file_added_to_an_artifact_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "artifact/extra.json").write_text("{}")
    _refused(run, tmp_path / "store")


def test_a_verdict_edited_to_pass_is_refused(tmp_path: Path, tiny: Tiny, make_recipe: MakeRecipe) -> None:
    """However well the file is edited: the verdict is what follows from the evidence."""
    shutil.copytree(tiny.workspace, tmp_path / "artifacts", symlinks=True)
    run = compile_(make_recipe(tmp_path, gate=IMPOSSIBLE), tmp_path / "artifacts").run
    word = read_json(run / "verdict.json") | {"verdict": "PASS"}
    code = word | {"exit_code": 0}
    rows = code | {"gates": [row | {"verdict": "PASS"} for row in code["gates"]]}
    margin = rows | {"gates": [row | {"margin": 1.0, "criterion": {"max": 1.0}} for row in rows["gates"]]}
    for edited, words in ((word, "exit code"), (code, "follows"), (rows, "follows"), (margin, "follows")):
        (run / "verdict.json").write_bytes(readable_json(edited))
        assert words in _refused(run, tmp_path / "store")
    (run / "verdict.json").write_bytes(readable_json(rows)[:-20])
    _refused(run, tmp_path / "store")


def _edit_rows(run: Path, deep: bool) -> None:
    """Replace every divergence by a better one; deep: with the digests that lead there mended too."""
    path, header_path = run / "evidence/quality.jsonl", run / "evidence/evidence.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "window":
            line["kl"] = [0.0] * len(line["kl"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if deep:
        header = read_json(header_path)
        header["files"]["quality.jsonl"] = sha256_file(path)
        header_path.write_bytes(readable_json(header))


@pytest.mark.parametrize("deep", [False, True])
def test_edited_measurements_are_refused(run: Path, tmp_path: Path, deep: bool) -> None:
    _edit_rows(run, deep)
    _refused(run, tmp_path / "store")


def test_a_loosened_gate_in_the_evidence_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / "evidence/evidence.json"
    header = read_json(path)
    header["recipe"]["gate"]["kl_divergence"]["max"] = 2.0
    path.write_bytes(readable_json(header))
    assert "the recipe that it states is not the one in" in _refused(run, tmp_path / "store")
    with pytest.raises(IntegrityError, match="the recipe that it states is not the one in"):
        judge_again(run)


@pytest.mark.parametrize("lock", [{}, [], {"recipe": {"content": {"gate": 1}}}])
def test_a_lock_without_its_recipe_is_refused(run: Path, tmp_path: Path, lock: Any) -> None:
    (run / "artifact/assay.lock.json").write_bytes(readable_json(lock))
    assert "the recipe that it states is not the one in" in _refused(run, tmp_path / "store")


def test_evidence_cut_short_or_lost_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / "evidence/quality.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    _refused(run, tmp_path / "store")
    path.unlink()
    _refused(run, tmp_path / "store")


def test_the_evidence_of_another_artifact_is_refused(run: Path, tmp_path: Path, tiny: Tiny) -> None:
    """The manifest of another build of the same weights, with the digests of its own."""
    manifest = read_manifest(run / "artifact")
    (run / "artifact/manifest.json").write_bytes(readable_json(manifest | {"method": "gptq"}))
    assert directory_digest(run / "artifact") != tiny.digest
    with pytest.raises(IntegrityError, match="not the bytes that the evidence was measured on"):
        judge_again(run)
    _refused(run, tmp_path / "store")


def test_what_is_no_finished_run_is_a_usage_error(tmp_path: Path, run: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="not a finished run"):
            publish_run(place, tmp_path / "store", ("latest",))
        with pytest.raises(UsageError, match="neither a run directory"):
            judge_again(place)
    (run / "verdict.json").unlink()
    with pytest.raises(UsageError, match="not a finished run"):
        publish_run(run, tmp_path / "store", ("latest",))


# Judging again


def test_judging_again_without_torch_gives_the_same_bytes(
    run: Path, tmp_path: Path, assay: Callable[..., CompletedProcess[str]]
) -> None:
    for module in ("torch", "transformers", "onnxruntime", "onnxruntime_genai", "safetensors"):
        (tmp_path / f"{module}.py").write_text(f"raise ImportError('{module} is not wanted here')")
    probe = assay("generate", run / "artifact", "-p", "x", PYTHONPATH=str(tmp_path))
    assert probe.returncode == 2 and "not wanted here" in probe.stderr, "the ban must work"
    verdict, report = (run / "verdict.json").read_bytes(), (run / "report.html").read_bytes()
    (run / "verdict.json").unlink()
    (run / "report.html").unlink()
    done = assay("gate", run, "--json", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert ((run / "verdict.json").read_bytes(), (run / "report.html").read_bytes()) == (verdict, report)
    assert json.loads(done.stdout) == json.loads(verdict)


def test_judging_by_another_recipe_writes_nothing_and_publishes_nothing(
    run: Path, tmp_path: Path, tiny: Tiny, make_recipe: MakeRecipe, snapshot: Snapshot
) -> None:
    other = make_recipe(tmp_path / "other", gate=IMPOSSIBLE)
    before = snapshot(run)
    verdict = judge_again(run, other)
    assert verdict.verdict == "FAIL" and verdict.recipe != tiny.outcome.verdict.recipe
    assert judge_again(run / "evidence", other) == verdict
    assert judge_again(run / "evidence") == tiny.outcome.verdict
    assert snapshot(run) == before


# The other target


@pytest.mark.slow
def test_the_whole_for_onnxruntime_genai(
    tmp_path: Path, make_recipe: MakeRecipe, assay: Callable[..., CompletedProcess[str]]
) -> None:
    """With every metric: quality, and speed in fresh processes, in both measured and reported form."""
    quality = [
        {"metric": "kl_divergence", "tokens": 600},
        {"metric": "top1_agreement", "tokens": 600},
        {"metric": "cloze_accuracy", "samples": 10},
    ]
    speed = [
        {"metric": "decode_tokens_per_second", "prompt_tokens": 16, "new_tokens": 8},
        {"metric": "inter_token_latency", "prompt_tokens": 16, "new_tokens": 8},
        {"metric": "time_per_output_token", "prompt_tokens": 16, "new_tokens": 8},
        {"metric": "end_to_end_latency", "prompt_tokens": 16, "new_tokens": 8},
        {"metric": "time_to_first_token", "prompt_tokens": [16, 32]},
        {"metric": "prefill_tokens_per_second", "prompt_tokens": 16},
        {"metric": "prefix_reuse", "prompt_tokens": 32, "prefix_tokens": 24},
        {"metric": "energy_per_output_token", "prompt_tokens": 16, "new_tokens": 8},
        {"metric": "load_time"},
        {"metric": "peak_memory"},
        {"metric": "size_on_disk"},
    ]
    parts: dict[str, Any] = {
        "quantize": {
            "scheme": "W4A16",
            "group_size": 32,
            "method": "gptq",
            "overrides": [{"match": "*.1.mlp.*", "scheme": "none"}],
        },
        "target": {"format": "onnxruntime-genai"},
        "evaluate": {"length": 64, "quality": quality, "speed": speed, "blocks": 3},
        "gate": {"kl_divergence": {"max": 5.0}, "size_on_disk": {"max_ratio": 2}},
        "publish": {"registry": "store"},
    }
    recipe = make_recipe(tmp_path, **parts)
    done = assay("compile", recipe.name, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    run = tmp_path / found["run"]
    elsewhere, space = make_recipe(tmp_path / "elsewhere", **parts), Workspace(tmp_path / "elsewhere/other", Progress())
    rebuilt = build_candidate(resolve(load_recipe(elsewhere)[0], elsewhere.parent, space), space)
    assert directory_digest(rebuilt) == found["published"]["bundle_digest"], "it depends on neither place nor time"
    rows = (*found["verdict"]["gates"], *found["verdict"]["reported"])
    measured = {row["metric"].partition("@")[0] for row in rows}
    assert {metric["metric"] for metric in (*quality, *speed)} <= measured
    # A machine without counters says so, every other metric is a number.
    assert {row["metric"] for row in rows if not row["n"]} <= {"energy_per_output_token"}
    assert len((run / "evidence/speed.jsonl").read_text().splitlines()) == 3 * 4
    manifest = read_manifest(run / "artifact")
    kept = {row["name"] for row in manifest["layers"] if row["scheme"] == "none"}
    assert kept == {"lm_head", *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))}
    assert manifest["fallbacks"][0].startswith("not quantized: model.layers.1.mlp.gate_proj")
    assert 0 < manifest["coverage"] < 1
    pull(tmp_path / "store", "tiny:latest", tmp_path / "served")
    continued = assay("generate", tmp_path / "served", "-p", "The assert statement", "-n", 8, "--json")
    assert continued.returncode == 0 and json.loads(continued.stdout)["decode_tokens_per_second"] > 0
