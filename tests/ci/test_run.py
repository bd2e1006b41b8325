"""Recipes are run in CI: exit codes, verdicts, what is published, and what later steps and people get to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("code", "says", "verdict", "ends"),
    [
        (0, "PASS", "PASS", 0),
        (1, "FAIL", "FAIL", 1),
        (2, "", "ERROR", 2),
        (3, "INCONCLUSIVE", "INCONCLUSIVE", 3),
        (4, "INVALID", "INVALID", 4),
        (4, "", "ERROR", 4),
        (5, "", "ERROR", 5),
        (4, "PASS", "ERROR", 4),  # it passed, and the disk was full
        (130, "", "ERROR", 4),
        (139, "", "ERROR", 4),
        (0, "", "ERROR", 4),  # nobody said PASS
        (0, "FAIL", "ERROR", 4),
        (1, "", "ERROR", 4),
    ],
)
def test_the_exit_code_is_that_of_assay(repository: Any, code: int, says: str, verdict: str, ends: int) -> None:
    repository.recipe("recipes/a.yaml", name="a2", verdict=says, code=code)
    repository.commit()
    done = repository.on_github()
    assert done.returncode == ends, done.stdout + done.stderr
    output = repository.output()
    assert (output["verdict"], output["exit-code"]) == (verdict, str(ends))
    assert output["digest"] == (DIGEST if ends == 0 else "")
    assert f"## Assay: {verdict}" in repository.summary.read_text()
    collected = repository.collected / "1-recipes_a.yaml"
    if verdict == "ERROR":
        assert output["report"] == "" and not (collected / "report.html").exists()
        case = ElementTree.parse(collected / "junit.xml").find(".//testcase/error")
        assert case is not None and case.get("message") == f"exit code {ends}"
    else:
        assert Path(output["report"]).read_text() == f"<html>{verdict}</html>"
        assert (collected / "junit.xml").read_text() == "<testsuites/>"


def test_an_assay_that_is_not_installed_is_a_failure_of_the_machine(repository: Any) -> None:
    repository.recipe("recipes/a.yaml", name="a2", verdict="PASS", code=0)
    repository.commit()
    done = repository.on_github(PATH="/usr/bin:/bin")
    assert done.returncode == 4 and "assay: command not found" in done.stdout


def test_a_place_that_cannot_be_written_is_a_failure_of_the_machine_not_a_fail(repository: Any) -> None:
    repository.recipe("recipes/a.yaml", name="a2", verdict="PASS", code=0)
    repository.commit()
    done = repository.on_github(ASSAY_OUTPUT="/proc/nowhere/x")
    assert done.returncode == 4 and "of run.sh failed" in done.stderr
    unseen = repository.on_github(GITHUB_STEP_SUMMARY="/dev/full")
    assert unseen.returncode == 4 and "of run.sh failed" in unseen.stderr


@pytest.mark.slow
def test_several_recipes_end_with_the_worst(repository: Any) -> None:
    for name, code, verdict in (("a", 3, "INCONCLUSIVE"), ("b", 1, "FAIL"), ("c", 0, "PASS"), ("d", 3, "INCONCLUSIVE")):
        repository.recipe(f"recipes/{name}.yaml", name=name, verdict=verdict, code=code)
    repository.commit()
    assert repository.on_github().returncode == 1
    output = repository.output()
    assert output["verdict"] == "FAIL" and output["report"].endswith("2-recipes_b.yaml/report.html")
    assert output["digest"] == DIGEST, "of the one that passed"
    text = repository.summary.read_text()
    rows = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| <code>")]
    assert rows == [
        ["INCONCLUSIVE", "3", "no |"],
        ["FAIL", "1", "no |"],
        ["PASS", "0", f"{DIGEST} |"],
        ["INCONCLUSIVE", "3", "no |"],
    ]
    assert text.index("## INCONCLUSIVE: a") < text.index("## FAIL: b") < text.index("## PASS: c")
    assert "[log and files](https://github.example/org/models/actions/runs/12)" in text
    repository.recipe("recipes/e.yaml", name="e", verdict="", code=2)
    repository.recipe("recipes/f.yaml", name="f", verdict="", code=5)
    repository.commit()
    assert repository.on_github().returncode == 5


def test_no_change_is_no_work(repository: Any) -> None:
    done = repository.on_github()
    assert done.returncode == 0 and not repository.compiled()
    assert repository.output() | {"reports": "", "comment": ""} == {
        "verdict": "NONE",
        "exit-code": "0",
        "digest": "",
        "report": "",
        "reports": "",
        "comment": "",
    }
    assert "No recipe has changed" in repository.summary.read_text()


def test_a_wrong_pattern_is_not_no_change(repository: Any) -> None:
    done = repository.on_github(ASSAY_RECIPES="recpies/**")
    assert done.returncode == 2 and repository.output()["verdict"] == "ERROR"
    assert "no file in git matches" in repository.summary.read_text() and "no file in git" in done.stderr


# What is published


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "published"),
    [
        ({}, True),
        ({"ASSAY_PUBLISH": "never"}, False),
        ({"GITHUB_REF": "refs/heads/feature"}, False),
        ({"GITHUB_REF": "refs/heads/release", "GITHUB_REF_PROTECTED": "true"}, True),
        ({"GITHUB_REF": "refs/tags/v1", "GITHUB_REF_PROTECTED": "true"}, False),
        ({"GITHUB_EVENT_NAME": "pull_request", "GITHUB_REF": "refs/pull/7/merge"}, False),
        ({"GITHUB_EVENT_NAME": "pull_request_target"}, False),
        ({"GITHUB_EVENT_NAME": "workflow_run"}, False),
        ({"GITHUB_EVENT_NAME": "merge_group", "GITHUB_REF": "refs/heads/gh-readonly-queue/main/x"}, False),
        ({"GITHUB_EVENT_NAME": "schedule", "ASSAY_DEFAULT_BRANCH": ""}, True),
        ({"GITHUB_EVENT_NAME": "workflow_dispatch"}, True),
        ({"GITHUB_REF": "refs/heads/main", "ASSAY_DEFAULT_BRANCH": ""}, False),
        ({"GITHUB_ACTIONS": "false"}, False),
    ],
)
def test_only_a_protected_or_the_default_branch_of_github_publishes(
    repository: Any, environment: dict[str, str], published: bool
) -> None:
    repository.recipe("recipes/a.yaml", name="a2", verdict="PASS", code=0)
    repository.commit()
    assert repository.on_github(**environment).returncode == 0
    (call,) = repository.compiled()
    assert ("--no-publish" not in call) == published
    assert repository.output()["digest"] == (DIGEST if published else "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "published"),
    [
        ({"CI_PIPELINE_SOURCE": "push", "CI_COMMIT_BRANCH": "main"}, True),
        ({"CI_PIPELINE_SOURCE": "schedule", "CI_COMMIT_BRANCH": "main"}, True),
        ({"CI_PIPELINE_SOURCE": "push", "CI_COMMIT_BRANCH": "feature"}, False),
        ({"CI_PIPELINE_SOURCE": "push", "CI_COMMIT_BRANCH": "release", "CI_COMMIT_REF_PROTECTED": "true"}, True),
        # Of a protected branch, and of nobody's review: a merge request has no CI_COMMIT_BRANCH.
        ({"CI_PIPELINE_SOURCE": "merge_request_event", "CI_COMMIT_REF_PROTECTED": "true"}, False),
        ({"CI_PIPELINE_SOURCE": "push", "CI_COMMIT_TAG": "v1", "CI_COMMIT_REF_PROTECTED": "true"}, False),
        ({"CI_PIPELINE_SOURCE": "trigger", "CI_COMMIT_BRANCH": "main"}, False),
        ({}, False),
    ],
)
def test_only_a_protected_or_the_default_branch_of_gitlab_publishes(
    repository: Any, environment: dict[str, str], published: bool
) -> None:
    runner = {"GITLAB_CI": "true", "CI_DEFAULT_BRANCH": "main", "ASSAY_CHANGED": "false"}
    done = repository.script("run.sh", ASSAY_RECIPES="recipes/a.yaml", **(runner | environment))
    assert done.returncode == 0
    (call,) = repository.compiled()
    assert ("--no-publish" not in call) == published
    wanted = [
        "ASSAY_VERDICT=PASS",
        "ASSAY_EXIT_CODE=0",
        *([f"ASSAY_DIGEST={DIGEST}"] if published else []),
        f"ASSAY_REPORT={repository.collected}/1-recipes_a.yaml/report.html",
    ]
    assert (repository.collected / "assay.env").read_text().splitlines() == wanted


# How assay is called


def test_settings_reach_assay_as_they_are(repository: Any) -> None:
    repository.recipe("recipes/-x $(touch owned).yaml", name="x", verdict="PASS", code=0)
    repository.commit()
    settings = "publish.registry=oci://r.example/$(touch owned)\n\n  \nquantize.group_size=32\r\n"
    assert repository.on_github(ASSAY_SET=settings, ASSAY_FRESH="true", ASSAY_WORKSPACE="work space").returncode == 0
    assert repository.compiled() == [
        "compile --workspace work space --fresh-evidence --set publish.registry=oci://r.example/$(touch owned) "
        "--set quantize.group_size=32 -- recipes/-x $(touch owned).yaml"
    ]
    assert not (repository.path / "owned").exists()


def test_a_key_is_used_only_where_something_may_be_published(repository: Any) -> None:
    repository.recipe("recipes/a.yaml", name="a2", verdict="PASS", code=0)
    repository.commit()
    assert repository.on_github(ASSAY_KEY="env:CI_KEY").returncode == 0
    asked = {"GITHUB_EVENT_NAME": "pull_request", "GITHUB_REF": "refs/pull/7/merge"}
    assert repository.on_github(ASSAY_KEY="env:CI_KEY", **asked).returncode == 0
    assert ["--key env:CI_KEY" in call for call in repository.compiled()] == [True, False]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ASSAY_PUBLISH": "always"}, "publish is always; allowed: auto, never"),
        ({"ASSAY_OUTPUT": "recipes"}, "recipes is not empty"),
        ({"ASSAY_OUTPUT": "a\nb"}, "a control character"),
    ],
)
def test_a_wrong_setting_is_exit_code_2(repository: Any, environment: dict[str, str], words: str) -> None:
    done = repository.on_github(**environment)
    assert done.returncode == 2 and words in done.stderr and not repository.compiled()


def test_what_assay_says_is_no_command_to_the_runner(repository: Any) -> None:
    repository.recipe("recipes/a.yaml", name="a", verdict="FAIL", code=1, says="::add-path::/tmp/owned")
    repository.commit()
    lines = repository.on_github().stdout.splitlines()
    stopped = next(line for line in lines if line.startswith("::stop-commands::"))
    token = stopped.removeprefix("::stop-commands::")
    assert len(token) == 40
    assert lines.index(stopped) < lines.index("::add-path::/tmp/owned") < lines.index(f"::{token}::")


# The summary


def test_names_and_logs_are_no_markup(repository: Any) -> None:
    repository.recipe("recipes/<img src=x>|`@me`.yaml", name="x", verdict="", code=2, says="```\n<script>")
    repository.commit()
    assert repository.on_github().returncode == 2
    text = repository.summary.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| <code>"))
    assert row.startswith("| <code>recipes/&lt;img src=x&gt;&#124;&#96;&#64;me&#96;.yaml</code> | ERROR | 2 |")
    log = text.split("\n\n")[-1].splitlines()
    assert len(log) == 2 and all(line.startswith("    ") for line in log), "a block of code, to the end"
    assert "unknown key 'qantize'" in log[-1]
    case = ElementTree.parse(next(repository.collected.glob("1-*/junit.xml"))).find(".//testcase")
    assert case is not None and case.get("name") == "recipes/<img src=x>|`@me`.yaml"


def test_a_summary_stays_below_what_github_shows(repository: Any) -> None:
    for name in "abcd":
        repository.recipe(f"recipes/{name}.yaml", name=name, verdict="FAIL", code=1, bytes=400_000)
    repository.commit()
    assert repository.on_github().returncode == 1
    text = repository.summary.read_text()
    assert 800_000 < len(text.encode()) <= 1_000_000
    assert "## FAIL: b" in text and "## FAIL: c" not in text and "Reports left out" in text
    assert text.count("| FAIL | 1 |") == 4, "the verdicts are there, all of them"
    comment = Path(repository.output()["comment"]).read_text()
    assert len(comment) <= 65_000 and comment.count("| FAIL | 1 |") == 4 and "Reports left out" in comment


@pytest.mark.slow
def test_more_recipes_than_a_comment_has_room_for(repository: Any) -> None:
    for index in range(12):
        folder = "/".join(str(index % 10) * 200 for _ in range(16 + index // 10))
        repository.recipe(f"recipes/{folder}/x.yaml", name=f"n{index}", verdict="PASS", code=0)
    repository.commit()
    assert repository.on_github().returncode == 0
    comment = Path(repository.output()["comment"]).read_text()
    assert len(comment) <= 65_000 and comment.count("| PASS | 0 |") == 9 and "3 more recipes" in comment
