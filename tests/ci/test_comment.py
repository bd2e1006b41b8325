"""One comment on a pull request, written by the script through GitHub's interface."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from github_server import GitHub, running_github

MARKER = "<!-- assay-ci assay -->"


@pytest.fixture
def github() -> Iterator[GitHub]:
    with running_github() as running:
        yield running


def comment(repository: Any, github: GitHub, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run comment.sh on pull request 7, with a summary that says something already."""
    file = Path(repository.path.parent / "comment.md")
    file.write_text(text)
    repository.summary.write_text("## Assay: PASS\n")
    runner = {
        "ASSAY_COMMENT": str(file),
        "ASSAY_PULL_REQUEST": "7",
        "ASSAY_VERDICT": "PASS",
        "GITHUB_TOKEN": github.token,
        "GITHUB_API_URL": github.url,
        "GITHUB_REPOSITORY": "org/models",
        "GITHUB_STEP_SUMMARY": str(repository.summary),
    }
    return repository.script("comment.sh", **(runner | environment))


def test_a_second_run_updates_the_comment_of_the_first(repository: Any, github: GitHub) -> None:
    github.add("Nice work!", "reviewer")
    first = comment(repository, github, '## Assay: FAIL\n| "quoted" \\ü | ✗ |\n')
    assert (first.returncode, first.stderr) == (0, "") and f"{github.url}/comment/2" in first.stdout
    assert github.comments[1]["body"] == MARKER + '\n## Assay: FAIL\n| "quoted" \\ü | ✗ |\n'
    assert comment(repository, github, "## Assay: PASS\n").returncode == 0
    assert [entry["body"] for entry in github.comments] == ["Nice work!", f"{MARKER}\n## Assay: PASS\n"]
    assert repository.summary.read_text() == "## Assay: PASS\n"


def test_it_is_found_among_many(repository: Any, github: GitHub) -> None:
    for index in range(250):
        github.add(f"Remark {index}", "reviewer")
    ours = github.add(f"{MARKER}\nold")
    github.add("Later", "reviewer")
    assert comment(repository, github, "new").returncode == 0
    assert ours["body"] == f"{MARKER}\nnew" and len(github.comments) == 252
    assert [path.partition("?")[2] for method, path in github.requests if method == "GET"] == [
        f"per_page=100&page={page}" for page in (1, 2, 3)
    ]


def test_only_its_own_comments_are_updated(repository: Any, github: GitHub) -> None:
    """Neither somebody else's who wrote the marker, nor one that quotes it, nor another job's."""
    github.add(f"{MARKER}\nPASS, trust me", "mallory")
    github.add(f"> {MARKER}\n> quoted")
    github.add("<!-- assay-ci nightly -->\nanother job's")
    assert comment(repository, github, "ours").returncode == 0
    assert [entry["body"][:26] for entry in github.comments[:3]] == [
        f"{MARKER}\nPA",
        f"> {MARKER}\n",
        "<!-- assay-ci nightly -->\n",
    ]
    assert github.comments[3]["body"] == f"{MARKER}\nours"
    assert comment(repository, github, "at night", ASSAY_COMMENT_KEY="nightly").returncode == 0
    assert github.comments[2]["body"] == "<!-- assay-ci nightly -->\nat night" and len(github.comments) == 4
    assert comment(repository, github, "as a bot of ours", ASSAY_COMMENT_AUTHOR="mallory").returncode == 0
    assert github.comments[0]["body"] == f"{MARKER}\nas a bot of ours"


def test_no_change_adds_no_comment_but_updates_one(repository: Any, github: GitHub) -> None:
    assert comment(repository, github, "none", ASSAY_VERDICT="NONE").returncode == 0 and not github.comments
    github.add(f"{MARKER}\nFAIL")
    assert comment(repository, github, "none", ASSAY_VERDICT="NONE").returncode == 0
    assert [entry["body"] for entry in github.comments] == [f"{MARKER}\nnone"]


def test_a_comment_that_was_deleted_meanwhile_is_written_anew(repository: Any, github: GitHub) -> None:
    github.add(f"{MARKER}\nold")
    github.forgotten.add(1)
    assert comment(repository, github, "new").returncode == 0
    assert github.comments[1]["body"] == f"{MARKER}\nnew"


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ({"POST": 403}, "the token may not write comments here (HTTP 403); pull requests from forks never may."),
        ({"GET": 403}, "the token may not write comments here (HTTP 403)"),
        ({"GET": 404}, "the token may not write comments here (HTTP 404)"),
        ({"POST": 422}, "GitHub answered HTTP 422."),
        ({"POST": 500}, "GitHub answered HTTP 500."),
    ],
)
def test_a_token_that_may_not_write_is_a_note_not_a_failure(
    repository: Any, github: GitHub, refused: dict[str, int], words: str
) -> None:
    github.refused |= refused
    done = comment(repository, github, "text")
    assert done.returncode == 0 and words in done.stderr and not github.comments
    summary = repository.summary.read_text()
    assert summary.startswith("## Assay: PASS\n") and words in summary
    assert [method for method, _ in github.requests].count("POST") <= 1, "posted twice would be two comments"


def test_no_token_no_network_and_a_wrong_token_are_notes_too(repository: Any, github: GitHub) -> None:
    for environment, words in (
        ({"GITHUB_TOKEN": ""}, "there is no token."),
        ({"GITHUB_TOKEN": 'x"\nurl = "http://127.0.0.1:1/'}, "there is no token."),
        ({"GITHUB_TOKEN": "ghs_wrong"}, "(HTTP 401)"),
        ({"GITHUB_API_URL": "http://127.0.0.1:9"}, "GitHub could not be reached."),
    ):
        done = comment(repository, github, "text", **environment)
        assert done.returncode == 0 and words in done.stderr and words in repository.summary.read_text()
    assert not github.comments


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ASSAY_PULL_REQUEST": "7/../8"}, "no number of a pull request"),
        ({"ASSAY_PULL_REQUEST": ""}, "no number of a pull request"),
        ({"GITHUB_REPOSITORY": "org/models/issues"}, "not OWNER/NAME"),
        ({"ASSAY_COMMENT_KEY": "a --> b"}, "allowed: letters, digits"),
        ({"ASSAY_COMMENT": "nowhere.md"}, "there is no file nowhere.md"),
    ],
)
def test_a_wrong_request_is_exit_code_2(
    repository: Any, github: GitHub, environment: dict[str, str], words: str
) -> None:
    done = comment(repository, github, "text", **environment)
    assert done.returncode == 2 and words in done.stderr and not github.requests


def test_the_token_is_in_no_list_of_processes(repository: Any, github: GitHub, tmp_path: Path) -> None:
    """curl is called with arguments that anyone on the machine can read."""
    spy = repository.path.parent / "tools/curl"
    spy.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>{tmp_path}/arguments\nexec /usr/bin/curl "$@"\n')
    spy.chmod(0o755)
    assert comment(repository, github, "text").returncode == 0 and github.comments
    assert github.token not in (tmp_path / "arguments").read_text()
