"""The scripts with the real assay on a tiny model: what they read in its output is there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_verdict_digest_and_reports_of_a_real_run(repository: Any, make_recipe: Callable[..., Path]) -> None:
    store = repository.path.parent / "store"
    publish = {"registry": str(store), "tags": ["latest"]}
    recipe = make_recipe(repository.path / "recipes", name="tiny", publish=publish)
    repository.commit()
    repository.environment["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        repository.environment[name] = "1"
    one = {"ASSAY_RECIPES": "recipes/recipe.yaml"}

    asked = repository.on_github(
        GITHUB_EVENT_NAME="pull_request", GITHUB_REF="refs/pull/7/merge", ASSAY_SET="gate.kl_divergence.max=1e-9", **one
    )
    assert asked.returncode == 1, asked.stdout + asked.stderr
    assert repository.output()["verdict"] == "FAIL" and repository.output()["digest"] == ""
    assert "FAIL: tiny" in repository.summary.read_text() and not store.exists()

    pushed = repository.on_github(**one)
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    output = repository.output()
    assert output["verdict"] == "PASS" and output["digest"].startswith("sha256:")
    index = json.loads((store / "index.json").read_bytes())
    assert output["digest"] in {entry["digest"] for entry in index["manifests"]}
    collected = Path(output["report"]).parent
    written = ["junit.xml", "log.txt", "report.html", "report.md", "section.md", "verdict.json"]
    assert sorted(path.name for path in collected.iterdir()) == written
    assert json.loads((collected / "verdict.json").read_bytes())["verdict"] == "PASS"

    recipe.write_text(recipe.read_text().replace('"rtn"', '"rnt"'))
    repository.commit()
    wrong = repository.on_github(**one)
    assert wrong.returncode == 2 and "quantize.method is 'rnt' (did you mean 'rtn'?)" in repository.summary.read_text()
