"""The command line as others use it: exit codes, JSON and nothing but JSON, no noise, no waiting for heavy libraries."""

from __future__ import annotations

import json
import math
import os
import pty
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from assay import __version__
from assay.cli import app
from assay.recipe import Recipe
from assay.recipe_file import load_recipe

Assay = Callable[..., CompletedProcess[str]]
MakeRecipe = Callable[..., Path]
SHIPPED = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
COMMANDS = sorted(typer.main.get_command(app).commands)  # pyright: ignore[reportAttributeAccessIssue]
HEAVY = ("torch", "transformers", "onnxruntime", "onnxruntime_genai", "numpy", "scipy", "safetensors", "cryptography")
IMPOSSIBLE = {"kl_divergence": {"max": 1e-9}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_recipe: MakeRecipe) -> SimpleNamespace:
    """Finished runs of every verdict, and a registry with the one that passed; never to be changed."""
    from assay.pipeline import compile_recipe
    from assay.progress import Progress
    from assay.workspace import Workspace

    root = tmp_path_factory.mktemp("cli")
    registry = root / "store"

    def compile_(name: str, **parts: Any) -> Path:
        recipe = make_recipe(root / "recipes", name=name, publish={"registry": str(registry)}, **parts)
        return compile_recipe(load_recipe(recipe)[0], recipe.parent, Workspace(root / "artifacts", Progress())).run

    runs = {"PASS": compile_("passes"), "FAIL": compile_("fails", gate=IMPOSSIBLE)}
    found = json.loads((runs["PASS"] / "verdict.json").read_bytes())["gates"][0]["difference"]
    runs["INCONCLUSIVE"] = compile_("undecided", gate={"kl_divergence": {"max": found}})
    (root / "recipes/same.txt").write_text("The cat sat on the mat and looked at Python. " * 200)
    same = {"source": "text", "path": "same.txt"}
    evaluate = {"text": same, "length": 64, "quality": [{"metric": "kl_divergence", "tokens": 200}]}
    gate = {"kl_divergence": {"max": 1.0}}
    # All of one document: nothing is known of the spread between documents.
    runs["INVALID"] = compile_("invalid", evaluate=evaluate, gate=gate)
    recipe = make_recipe(root / "recipes", name="passes", publish={"registry": str(registry)})
    return SimpleNamespace(root=root, registry=registry, runs=runs, recipe=recipe)


@pytest.fixture
def run(place: SimpleNamespace, tmp_path: Path) -> Path:
    return shutil.copytree(place.runs["PASS"], tmp_path / "run")


# Help and usage


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(assay: Assay, command: str) -> None:
    for option in ("--help", "-h"):
        done = assay(command, option)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"assay {command} [OPTIONS]" in done.stdout


def test_help_lists_every_command_and_exit_code(assay: Assay) -> None:
    text = " ".join(assay("--help").stdout.split())
    assert all(command in text for command in COMMANDS)
    for words in ("0 PASS", "1 FAIL", "2 usage", "3 INCONCLUSIVE", "4 INVALID", "5 integrity"):
        assert words in text
    assert assay("--version").stdout == f"assay {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ""),
        (("chek",), "Did you mean 'check'"),
        (("check",), "Missing argument"),
        (("check", "x.yaml", "--loud"), "No such option: --loud"),
        (("check", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("compile", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("import", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("gate", "nowhere"), "neither a run directory"),
        (("publish", "nowhere"), "not a finished run"),
        (("report", "nowhere"), "not a finished run"),
        (("compare", "nowhere"), "not a finished run"),
        (("schema", "verdicts"), "'verdicts' is not one of"),
        (("bench",), "give either an artifact directory, or --endpoint"),
        (("list",), "there is no registry here"),
        (("pull", "x:latest", "there"), "there is no registry here"),
        (("show", "x:latest"), "there is no registry here"),
        (("verify", "x:latest"), "there is no registry here"),
        (("generate", "nowhere", "-p", "x"), "does not exist"),
    ],
)
def test_a_wrong_request_is_exit_code_2_and_says_why(
    assay: Assay, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = assay(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir()), "nothing is made for a request that cannot be served"


# check and schema


def test_check_answers_at_once(assay: Assay, tmp_path: Path) -> None:
    assert SHIPPED
    # As installed: with compiled modules, which an editable install on a machine that keeps none lacks.
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}

    def seconds(*command: object) -> float:
        """Of the processor: what one waits for on an idle machine, whoever else uses this one."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([str(part) for part in command], env=environment, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    check = (sys.executable, "-c", "from assay.cli import main; main()", "check", SHIPPED[0])
    libraries = (sys.executable, "-c", "import rich, typer, yaml; from pydantic import *; type('M', (BaseModel,), {})")
    ours, theirs = math.inf, math.inf
    for _ in range(20):
        ours, theirs = min(ours, seconds(*check)), min(theirs, seconds(*libraries))
        # Or, on a machine that is slow just now, in proportion to what importing the libraries takes.
        if ours < max(0.4, 1.6 * theirs):
            break
    else:
        pytest.fail(f"{ours:.2f} s of the processor, of which {theirs:.2f} s are the libraries'")
    assert assay("check", SHIPPED[0]).returncode == 0


def _imported(*arguments: object) -> set[str]:
    """The heavy libraries that a command imported; it must end well."""
    code = (
        "import sys; from assay.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"sys.stderr.write(' '.join(sorted(set({HEAVY}) & set(sys.modules))))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.slow
def test_light_commands_import_nothing_heavy(place: SimpleNamespace, tmp_path: Path, run: Path) -> None:
    for command in ("list", "show", "verify", "pull"):
        reference = () if command == "list" else ("passes:latest",)
        destination = (tmp_path / "served",) if command == "pull" else ()
        assert _imported(command, *reference, *destination, "--registry", place.registry) == set()
    assert _imported("check", place.recipe) == set()
    assert _imported("verify", tmp_path / "served", "--registry", place.registry) == set()
    assert not {"torch", "transformers", "onnxruntime", "safetensors"} & _imported("gate", run)


def test_check_names_every_problem_of_every_file(assay: Assay, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    make_recipe(tmp_path / "good")
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nname: Bad Name\nquantise: {}\n")
    (tmp_path / "worse").mkdir()
    (tmp_path / "worse/worse.yaml").write_text("version: [1\n")
    done = assay("check", tmp_path / "good", bad, tmp_path / "worse")
    assert done.returncode == 2
    assert f"{bad}:2: " in done.stderr and f"{bad}:3: " in done.stderr and "worse.yaml:" in done.stderr
    assert done.stdout == f"{tmp_path / 'good/recipe.yaml'}: ok\n"
    found = json.loads(assay("check", tmp_path, "--json").stdout)
    assert not found["passed"] and [bool(file["problems"]) for file in found["files"]] == [True, False, True]
    assert {problem["line"] for problem in found["files"][0]["problems"]} >= {2, 3}


def test_check_of_an_empty_directory_is_no_pass(assay: Assay, tmp_path: Path) -> None:
    assert assay("check", tmp_path).returncode == 2


def test_set_overrides_are_checked_too(assay: Assay, place: SimpleNamespace) -> None:
    assert assay("check", place.recipe, "--set", "quantize.scheme=W4A16", "--set", "calibration.seed=3").returncode == 0
    done = assay("check", place.recipe, "--set", "quantize.scheme=W3A16")
    assert done.returncode == 2 and "W4A16" in done.stderr


def test_the_schema_is_one_and_accepts_the_shipped_recipes(
    assay: Assay, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    done = assay("schema")
    assert (done.returncode, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    recipes = [*SHIPPED, make_recipe(tmp_path)]
    for path in recipes:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert validator.is_valid(content), path
        for wrong in (
            content | {"nmae": "x"},
            content | {"version": 2},
            content | {"gate": {"kl_divergence": {"max": -1}}},
        ):
            assert not validator.is_valid(wrong)
        assert not validator.is_valid({name: value for name, value in content.items() if name != "quantize"})
    assert schema["title"] == Recipe.__name__


def test_the_schema_of_verdicts_accepts_each_of_them(assay: Assay, place: SimpleNamespace) -> None:
    schema = json.loads(assay("schema", "verdict").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for run in place.runs.values():
        found = json.loads((run / "verdict.json").read_bytes())
        assert not list(validator.iter_errors(found))
        for wrong in (found | {"verdict": "GOOD"}, found | {"exit_code": 7}, {**found, "version": 2}):
            assert not validator.is_valid(wrong)
        assert not validator.is_valid({name: value for name, value in found.items() if name != "evidence"})


# report


def test_a_run_is_reported_in_every_form_as_it_was_written(assay: Assay, run: Path, tmp_path: Path) -> None:
    for form, name in (
        ("html", "report.html"),
        ("markdown", "report.md"),
        ("junit", "junit.xml"),
        ("json", "verdict.json"),
    ):
        done = assay("report", run, "--format", form)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", (run / name).read_text(encoding="utf-8")), form
    assert assay("report", run, "--output", tmp_path / "comment.md").stdout == ""
    assert (tmp_path / "comment.md").read_bytes() == (run / "report.md").read_bytes()


def test_a_verdict_that_does_not_follow_is_not_reported(assay: Assay, place: SimpleNamespace, tmp_path: Path) -> None:
    run = shutil.copytree(place.runs["FAIL"], tmp_path / "run")
    shutil.copy(place.runs["PASS"] / "verdict.json", run)
    done = assay("report", run)
    assert done.returncode == 5 and "FAIL follows from the evidence" in done.stderr and not done.stdout


def test_a_reader_that_goes_away_is_no_crash() -> None:
    """As in `assay schema | head -1`."""
    command = f"{sys.executable} -m assay.cli schema | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


# Exit codes


@pytest.mark.slow
@pytest.mark.parametrize(("verdict", "code"), [("PASS", 0), ("FAIL", 1), ("INCONCLUSIVE", 3), ("INVALID", 4)])
def test_gate_and_publish_end_with_the_code_of_the_verdict(
    assay: Assay, place: SimpleNamespace, tmp_path: Path, verdict: str, code: int
) -> None:
    run = shutil.copytree(place.runs[verdict], tmp_path / "run")
    judged = assay("gate", run)
    assert judged.returncode == code and f"verdict    {verdict}" in judged.stdout and not judged.stderr
    published = assay("publish", run, "--registry", tmp_path / "store", "--force")
    assert published.returncode == code
    assert (tmp_path / "store").exists() == (verdict == "PASS")
    assert verdict == "PASS" or f"the verdict on these bytes is {verdict}; only a PASS is published" in published.stderr


@pytest.mark.slow
def test_what_was_tampered_with_is_exit_code_5(assay: Assay, run: Path, place: SimpleNamespace, tmp_path: Path) -> None:
    (run / "artifact/config.json").write_text("{}")
    for command in ("gate", "publish"):
        done = assay(command, run, *(("--registry", tmp_path / "store") if command == "publish" else ()))
        assert done.returncode == 5 and str(run) in done.stderr and not done.stdout
    store = shutil.copytree(place.registry, tmp_path / "damaged")
    blob = max((store / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for command in (("verify",), ("pull", tmp_path / "served")):
        done = assay(command[0], "passes:latest", *command[1:], "--registry", store)
        assert done.returncode == 5 and blob.name in done.stderr
    assert not (tmp_path / "served").exists()


def test_a_defect_is_not_taken_for_a_fail(tmp_path: Path) -> None:
    """An exception that nobody foresaw shows its traceback and ends with 4; Python's own 1 would mean FAIL."""
    code = "import assay.checking as c; c.check_recipes = None; from assay.cli import main; main()"
    command = [sys.executable, "-c", code, "check", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "Traceback" in done.stderr and "TypeError" in done.stderr


@pytest.mark.slow
def test_a_pulled_directory_is_verified_against_its_registry(
    assay: Assay, place: SimpleNamespace, tmp_path: Path
) -> None:
    served, store = tmp_path / "passes", ("--registry", place.registry)
    assert assay("pull", "passes:latest", served, *store).returncode == 0
    done = assay("verify", served, *store)
    assert done.returncode == 0 and "PASS       for exactly these bytes" in done.stdout
    digest = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("digest"))
    assert assay("verify", served, "--digest", digest, cwd=tmp_path).returncode == 0, "without a registry"
    assert assay("verify", served, cwd=tmp_path).returncode == 2, "neither a registry nor a digest"
    both = assay("verify", "passes", *store, cwd=tmp_path)
    assert both.returncode == 2 and "write ./passes or passes:TAG" in both.stderr
    assert assay("verify", "./passes", *store, cwd=tmp_path).returncode == 0
    (served / "tokenizer.json").write_text("{}")
    changed = assay("verify", served, *store)
    assert changed.returncode == 5 and "are of no artifact in" in changed.stderr and not changed.stdout


def test_what_a_command_lacks_is_named_with_its_extra(assay: Assay, place: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module', name='torch')")
    done = assay("plan", place.recipe, PYTHONPATH=str(tmp_path))
    assert (
        done.returncode == 2 and "needs torch, which is not installed: pip install 'assay[compile,cpu]'" in done.stderr
    )


def test_a_tag_that_cannot_be_is_a_usage_error(assay: Assay, run: Path, tmp_path: Path) -> None:
    done = assay("publish", run, "--registry", tmp_path / "store", "--tag", "a b")
    assert done.returncode == 2 and "'a b' cannot be a tag" in done.stderr and not (tmp_path / "store").exists()


# JSON, quiet, terminals


def _published(place: SimpleNamespace, tmp_path: Path, run: Path) -> list[tuple[object, ...]]:
    """Every light command with its arguments, in an order in which each can succeed."""
    store = ("--registry", place.registry)
    return [
        ("check", place.recipe),
        ("gate", run),
        ("report", run),
        ("compare", run, place.runs["FAIL"]),
        ("publish", run, "--registry", tmp_path / "own"),
        ("list", *store),
        ("show", "passes:latest", *store),
        ("verify", "passes:latest", *store),
        ("pull", "passes:latest", tmp_path / "served", *store),
        ("verify", tmp_path / "served", *store),
        ("schema",),
    ]


@pytest.mark.slow
def test_json_is_json_and_nothing_else(assay: Assay, place: SimpleNamespace, tmp_path: Path, run: Path) -> None:
    for arguments in _published(place, tmp_path, run):
        done = assay(*arguments, "--json")
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert json.loads(done.stdout), arguments


@pytest.mark.slow
def test_plain_output_has_no_escapes_and_quiet_has_only_the_result(
    assay: Assay, place: SimpleNamespace, tmp_path: Path, run: Path
) -> None:
    for arguments in _published(place, tmp_path, run):
        done = assay(*arguments)
        assert done.returncode == 0 and done.stdout and "\x1b" not in done.stdout + done.stderr, arguments
    assert assay("check", place.recipe, "--quiet").stdout == ""
    assert "PASS" in assay("gate", run, "--quiet").stdout


@pytest.mark.slow
def test_errors_are_json_too(assay: Assay, place: SimpleNamespace, tmp_path: Path) -> None:
    done = assay("publish", place.runs["FAIL"], "--registry", tmp_path / "store", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["exit_code"]) == (1, 1) and "FAIL" in found["error"] and not done.stderr
    (tmp_path / "bad.yaml").write_text("version: 2\n")
    found = json.loads(assay("plan", tmp_path / "bad.yaml", "--json").stdout)
    assert found["exit_code"] == 2 and found["problems"][0]["line"] == 1


def test_a_terminal_gets_colours(run: Path) -> None:
    """What makes the test above mean something."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "assay.cli", "gate", str(run)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:
                break
    os.close(ours)
    assert process.returncode == 0 and b"\x1b[" in shown and b"PASS" in shown


# The commands that load a model


@pytest.mark.slow
def test_compile_plan_and_generate(assay: Assay, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, publish={"registry": "store"})
    planned = assay("plan", recipe.name, "--json", cwd=tmp_path)
    assert planned.returncode == 0 and not any(stage["cached"] for stage in json.loads(planned.stdout)["stages"])
    done = assay("compile", recipe.name, "--json", cwd=tmp_path)
    assert done.returncode == 0 and "quantize: done in" in done.stderr and "\x1b" not in done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"]["verdict"] == "PASS" and (tmp_path / found["report"]).is_file()
    planned = assay("plan", recipe.name, cwd=tmp_path)
    assert planned.stdout.count("cached") == 5 and "to do" not in planned.stdout
    second = assay("compile", recipe.name, "--quiet", cwd=tmp_path)
    assert (second.returncode, second.stderr) == (0, "")
    assert found["published"]["digest"] in second.stdout
    served = tmp_path / "served"
    assert assay("pull", "tiny:latest", served, "--registry", tmp_path / "store").returncode == 0
    continued = assay("generate", served, "--prompt", "The assert statement", "-n", 4, "--json")
    assert continued.returncode == 0 and json.loads(continued.stdout)["prompt"] == "The assert statement"
    plain = assay("generate", served, "--prompt", "[bold]The", "-n", 4, "--quiet")
    assert plain.stdout.startswith("[bold]The") and plain.stderr == ""


@pytest.mark.slow
def test_compile_ends_with_the_code_of_the_verdict(assay: Assay, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, gate=IMPOSSIBLE, publish={"registry": "store"})
    failed = assay("compile", recipe.name, cwd=tmp_path)
    assert failed.returncode == 1 and "verdict    FAIL" in failed.stdout and "published  no: " in failed.stdout
    assert not (tmp_path / "store").exists()
    found = json.loads(assay("compile", recipe.name, "--json", cwd=tmp_path).stdout)
    assert found["published"] is None and "FAIL" in found["refused"]
    held = assay("compile", recipe.name, "--set", "gate.kl_divergence.max=1.0", "--no-publish", cwd=tmp_path)
    assert held.returncode == 0 and "published  no: " in held.stdout and not (tmp_path / "store").exists()


@pytest.mark.slow
def test_compile_and_publish_sign(assay: Assay, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    key = json.loads(assay("keygen", "key", "--no-password", "--json", cwd=tmp_path).stdout)["key_id"]
    recipe = make_recipe(tmp_path, publish={"registry": "store", "key": "absent"})
    refused = assay("compile", recipe.name, cwd=tmp_path)
    assert refused.returncode == 2 and "absent: cannot be read" in refused.stderr
    assert not list((tmp_path / "artifacts").rglob("*.safetensors"))  # a wrong key is known before anything is built
    done = assay("compile", recipe.name, "--key", "key", "--json", cwd=tmp_path)
    published = json.loads(done.stdout)["published"]
    assert published["signer"] == key and len(published["attestations"]) == 3
    again = assay("publish", "artifacts/runs/tiny", "--registry", "store", "--key", "key", "--json", cwd=tmp_path)
    assert json.loads(again.stdout) == published | {
        "created": False,
        "tags_set": [],
        "evidence_created": False,
        "blobs_written": 0,
    }
    rules = [{"names": ["tiny"], "require": [{"type": kind, "signers": ["me"]} for kind in ("test-result", "bom")]}]
    (tmp_path / "policy.yaml").write_text(
        json.dumps({"version": 1, "signers": {"me": {"file": "key.pub"}}, "rules": rules})
    )
    trust = ("--registry", tmp_path / "store", "--policy", tmp_path / "policy.yaml")
    pulled = assay("pull", "tiny", tmp_path / "served", *trust)
    assert pulled.returncode == 0 and "trusted    bom: signed by me" in pulled.stdout
    assert assay("verify", tmp_path / "served", *trust).returncode == 0
