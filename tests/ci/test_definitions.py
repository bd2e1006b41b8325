"""action.yml, the GitLab component and the workflows in docs/ci.md: well-formed, and of one mind with the scripts they call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts/ci").glob("*.sh"))
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = ACTION["runs"]["steps"]
SPEC, TEMPLATE = yaml.safe_load_all((ROOT / "templates/assay.yml").read_text(encoding="utf-8"))
JOB: dict[str, Any] = TEMPLATE["assay"]
BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/ci.md").read_text(encoding="utf-8"), re.DOTALL)
WORKFLOWS = [block for block in BLOCKS if re.search(r"^jobs:", block, re.MULTILINE)]
INCLUDES = [block for block in BLOCKS if block.startswith("include:")]
# What is known of each input in the YAML of a workflow, whatever `on` is (YAML 1.1 reads it as true).
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)
# Contexts into which whoever opens a pull request can put words.
FOREIGN = re.compile(
    r"github\.(head_ref|event\.(pull_request\.(title|body|head\.(ref|label|repo))|issue|comment|commits|head_commit))"
)


def schema_errors(name: str, content: Any) -> list[str]:
    """What SchemaStore's schema finds wrong."""
    schema = get_builtin_schema(f"vendor.{name}")
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [error.message for error in validator.iter_errors(content)]


def expressions(value: Any) -> list[str]:
    """Every ${{ … }} in a piece of YAML."""
    return EXPRESSION.findall(yaml.safe_dump(value, width=10**6))


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    assert [path.name for path in SCRIPTS] == ["comment.sh", "install.sh", "recipes.sh", "run.sh"]
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert all(os.access(path, os.X_OK) for path in SCRIPTS)


# The action


def test_the_action_is_what_the_schema_says() -> None:
    assert schema_errors("github-actions", ACTION) == []
    assert schema_errors("github-actions", ACTION | {"runs": {"using": "composite"}}), "the schema can fail"


def test_every_step_of_the_action_is_complete() -> None:
    for step in STEPS:
        assert ("run" in step) != ("uses" in step)
        if "run" in step:
            assert step["shell"] == "bash"
            script = re.fullmatch(r'"\$GITHUB_ACTION_PATH/(scripts/ci/\w+\.sh)"', step["run"])
            assert script and (ROOT / script[1]) in SCRIPTS
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), "a tag can be moved; a commit cannot"


def test_nothing_is_interpolated_into_a_script() -> None:
    assert not any(expressions(step.get("run", "")) for step in STEPS)
    assert not FOREIGN.search((ROOT / "action.yml").read_text(encoding="utf-8"))
    assert not any(expressions(line) for line in JOB["before_script"] + JOB["script"])
    assert not any("$[[" in line for line in JOB["before_script"] + JOB["script"])


def test_inputs_and_outputs_of_the_action_are_those_it_uses() -> None:
    used = set(re.findall(r"inputs\.([\w-]+)", " ".join(expressions(STEPS))))
    assert used == set(ACTION["inputs"])
    assert all(entry["description"] and isinstance(entry["default"], str) for entry in ACTION["inputs"].values())
    steps = {step["id"] for step in STEPS if "id" in step}
    for place in (*expressions(ACTION["outputs"]), *expressions(STEPS)):
        assert set(re.findall(r"steps\.([\w-]+)", place)) <= steps
    written = re.search(r"printf '%s=%s\\n' (.*?) >>\"\$GITHUB_OUTPUT\"", _text("run.sh"), re.DOTALL)
    assert written is not None
    names = set(re.findall(r"(?<![\w$/.\"-])([a-z][a-z-]*) \"", written[1]))
    assert names == {*ACTION["outputs"], "comment"}
    assert all(f"steps.run.outputs.{name} " in entry["value"] for name, entry in ACTION["outputs"].items())


def _text(script: str) -> str:
    return (ROOT / "scripts/ci" / script).read_text(encoding="utf-8")


@pytest.mark.parametrize("settings", [*(step["env"] for step in STEPS if "env" in step), JOB["variables"]])
def test_every_setting_is_read_by_a_script_and_described_in_it(settings: dict[str, str]) -> None:
    code = "".join(map(_text, (path.name for path in SCRIPTS)))
    own = {name for name in settings if name.startswith("ASSAY_")} - {"ASSAY_REPOSITORY", "ASSAY_REFERENCE"}
    for name in own:
        assert re.search(rf"\$\{{?{name}\b", code), f"{name} is read by no script"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_variable_that_a_script_reads_is_in_its_head(script: Path) -> None:
    head, _, code = script.read_text(encoding="utf-8").partition("euo pipefail")
    assert set(re.findall(r"\$\{?(ASSAY_\w+)", code)) - {"ASSAY_COMMIT"} <= set(re.findall(r"ASSAY_\w+", head))


# The GitLab component


def test_the_component_is_what_the_schema_says() -> None:
    assert schema_errors("gitlab-ci", TEMPLATE) == [] and schema_errors("gitlab-ci", SPEC) == []
    assert schema_errors("gitlab-ci", {"assay": JOB | {"artifacts": {"reports": {"junit": 1}}}}), "the schema can fail"


def test_inputs_of_the_component_are_those_it_uses() -> None:
    used = set(re.findall(r"\$\[\[ inputs\.(\w+)", yaml.safe_dump(JOB, width=10**6)))
    assert used == set(SPEC["spec"]["inputs"])
    required = [name for name, entry in SPEC["spec"]["inputs"].items() if "default" not in entry]
    assert required == ["repository"]


def test_the_component_hands_over_what_the_scripts_write() -> None:
    output = JOB["variables"]["ASSAY_OUTPUT"]
    assert JOB["artifacts"]["reports"] == {"junit": f"{output}/*/junit.xml", "dotenv": f"{output}/assay.env"}
    assert JOB["artifacts"]["when"] == "always" and JOB["artifacts"]["paths"] == [f"{output}/"]
    assert JOB["cache"]["paths"][0] == f"{JOB['variables']['ASSAY_WORKSPACE']}/cache/"


def test_the_component_runs_for_merge_requests_and_the_default_branch() -> None:
    assert [rule["if"] for rule in JOB["rules"]] == [
        '$CI_PIPELINE_SOURCE == "merge_request_event"',
        '$CI_PIPELINE_SOURCE == "schedule" && $CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH',
        "$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH",
    ]
    assert "allow_failure" not in JOB, "INCONCLUSIVE does not pass"


# The documentation


def test_the_documented_workflows_are_well_formed() -> None:
    assert len(WORKFLOWS) == 2 and len(INCLUDES) == 1
    for block in WORKFLOWS:
        workflow = yaml.safe_load(block)
        workflow["on"] = workflow.pop(True)
        assert schema_errors("github-workflows", workflow) == []
        assert "pull_request_target" not in block and not FOREIGN.search(block)
        for job in workflow["jobs"].values():
            assert "write-all" not in job["permissions"] and "contents" in job["permissions"]
            for step in job["steps"]:
                if step.get("uses", "").startswith("OWNER/assay@"):
                    assert set(step.get("with", {})) <= set(ACTION["inputs"])
    (include,) = yaml.safe_load(INCLUDES[0])["include"]
    assert set(include["inputs"]) <= set(SPEC["spec"]["inputs"])


def test_every_input_and_output_is_documented() -> None:
    text = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    for name in (*ACTION["inputs"], *ACTION["outputs"], *SPEC["spec"]["inputs"]):
        assert f"`{name}`" in text, name


# install.sh


def test_what_is_installed_is_the_assay_of_the_scripts(repository: Any) -> None:
    python = repository.path.parent / "tools/python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$STUB_CALLS"\n')
    python.chmod(0o755)
    assert repository.script("install.sh", ASSAY_EXTRAS="compile,lm-eval").returncode == 0
    arguments = repository.calls.read_text().split("\n")
    assert arguments[-4:] == ["--constraint", f"{ROOT}/constraints.txt", f"{ROOT}[compile,lm-eval]", ""]
    repository.calls.unlink()
    assert repository.script("install.sh", ASSAY_EXTRAS="none").returncode == 0 and not repository.calls.exists()
    wrong = repository.script("install.sh", ASSAY_EXTRAS="compile] -r /etc/passwd #[")
    assert wrong.returncode == 2 and "write them like compile,cpu" in wrong.stderr and not repository.calls.exists()
