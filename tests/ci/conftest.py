"""A throwaway git repository, the scripts of the CI integrations, and an `assay` that ends as its recipe says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Its output has the form of the real one, which test_real.py holds against it.
STUB = r"""#!/usr/bin/env bash
for recipe; do :; done
printf '%s\n' "$*" >>"$STUB_CALLS"
value() { sed -n "s/^$1: //p" "$recipe"; }
run=artifacts/runs/$(value name)
value says
if [ -n "$(value verdict)" ]; then
  mkdir -p "$run"
  printf '<html>%s</html>' "$(value verdict)" >"$run/report.html"
  printf '## %s: %s\n' "$(value verdict)" "$(value name)" >"$run/report.md"
  head -c "$(value bytes || true)" /dev/zero 2>/dev/null | tr '\0' x >>"$run/report.md"
  printf '<testsuites/>' >"$run/junit.xml"
  printf '{}' >"$run/verdict.json"
  printf 'verdict    %s\n           A reason.\nreport     %s/report.html\n' "$(value verdict)" "$run"
  case " $* " in
    *' --no-publish '*) echo 'published  no: it was not asked for' ;;
    *) printf 'published  store x:latest\ndigest     sha256:%064d\n' "$(value code)" ;;
  esac
else
  echo "$recipe:3: unknown key 'qantize' <b>|</b>" >&2
fi
exit "$(value code)"
"""


class Repository:
    """A git repository with two recipes on `main`, and the environment in which the scripts run."""

    def __init__(self, place: Path) -> None:
        self.path = place / "repository"
        self.calls = place / "calls"
        self.summary, self.outputs = place / "summary.md", place / "output"
        tools = place / "tools"
        tools.mkdir()
        (tools / "assay").write_text(STUB)
        (tools / "assay").chmod(0o755)
        self.environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(place),
            "STUB_CALLS": str(self.calls),
            "ASSAY_OUTPUT": str(place / "collected"),
            "GIT_CONFIG_NOSYSTEM": "1",
        }
        self.collected = place / "collected"
        self.base = ""

    def create(self) -> Repository:
        self.git("init", "-q", "--template=", "-b", "main", str(self.path), cwd=self.path.parent)
        self.git("config", "user.email", "ci@example.com")
        self.git("config", "user.name", "ci")
        self.recipe("recipes/a.yaml", name="a", verdict="PASS", code=0)
        self.recipe("recipes/deep/b.yaml", name="b", verdict="PASS", code=0)
        self.base = self.commit()
        return self

    def git(self, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            ["git", *arguments],
            cwd=cwd or self.path,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def write(self, name: str, content: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def recipe(self, path: str, **values: object) -> None:
        """A recipe for the stub: how it ends, and what it says before."""
        self.write(path, "".join(f"{name}: {value}\n" for name, value in values.items()))

    def commit(self) -> str:
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "change")
        return self.git("rev-parse", "HEAD")

    def script(self, name: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts in the repository, with nothing of this machine's CI in its environment."""
        return subprocess.run(
            [str(ROOT / "scripts/ci" / name)],
            cwd=cwd or self.path,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def on_github(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """run.sh, as GitHub's runner starts it for a push to the default branch unless told otherwise."""
        self.summary.write_text("")
        self.outputs.write_text("")
        shutil.rmtree(self.collected, ignore_errors=True)
        runner = {
            "GITHUB_ACTIONS": "true",
            "GITHUB_EVENT_NAME": "push",
            "GITHUB_REF": "refs/heads/main",
            "GITHUB_REF_PROTECTED": "false",
            "GITHUB_SHA": self.base,
            "GITHUB_RUN_ID": "12",
            "GITHUB_SERVER_URL": "https://github.example",
            "GITHUB_REPOSITORY": "org/models",
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_OUTPUT": str(self.outputs),
            "ASSAY_DEFAULT_BRANCH": "main",
            "ASSAY_BASE": self.base,
        }
        return self.script("run.sh", **(runner | environment))

    def output(self) -> dict[str, str]:
        """What later steps see."""
        return dict(line.split("=", 1) for line in self.outputs.read_text().splitlines())

    def compiled(self) -> list[str]:
        """The arguments of every call of assay."""
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("ci")).create()


@pytest.fixture
def repository(made: Repository, tmp_path: Path) -> Repository:
    own = Repository(tmp_path)
    shutil.copytree(made.path, own.path)
    own.base = made.base
    return own
