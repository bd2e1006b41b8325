"""The whole job as one sentence: resolve, build, evaluate, judge, report, publish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from assay.build import build_baseline, build_candidate
from assay.conclusion import ARTIFACT, EVIDENCE, REPORT, conclude, publish_run
from assay.errors import AssayError
from assay.files import point_link
from assay.job import resolve
from assay.recipe import Recipe
from assay.registry.open import check_registry
from assay.registry.publish import Receipt
from assay.registry.signing import load_signer
from assay.workspace import Workspace
from assay_evals.evaluate import check_evaluation, evaluate
from assay_evals.verdict import Verdict


@dataclass(frozen=True)
class Outcome:
    """What a run ended with.

    receipt: None unless published.  refused: why it was not, where publishing was asked for.  exit_code: of the verdict, or of what
    kept a PASS from being published.
    """

    run: Path
    verdict: Verdict
    receipt: Receipt | None
    refused: str | None
    exit_code: int

    @property
    def report(self) -> Path:
        return self.run / REPORT


def compile_recipe(
    recipe: Recipe, base: Path, workspace: Workspace, *, fresh_evidence: bool = False, publishing: bool = True
) -> Outcome:
    """Run a recipe to its verdict, and publish on PASS.

    base: the directory that the recipe's relative paths start from.  fresh_evidence: measure again although cached.
    publishing: False leaves the result in the run directory, whatever the recipe says.
    """
    goal = recipe.publish if publishing else None
    with workspace.run(recipe.name) as run:
        signer = None
        if goal is not None:
            check_registry(goal.registry)
            signer = load_signer(goal.key)
        job = resolve(recipe, base, workspace)
        check_evaluation(job)
        build_baseline(job, workspace)
        candidate = build_candidate(job, workspace)
        evidence = evaluate(job, workspace, run / EVIDENCE, fresh=fresh_evidence)
        point_link(run / ARTIFACT, candidate)
        verdict = conclude(run, evidence)
        if goal is None:
            return Outcome(run, verdict, None, None, verdict.exit_code)
        try:
            receipt = publish_run(run, goal.registry, goal.tags, signer=signer)
            return Outcome(run, verdict, receipt, None, verdict.exit_code)
        except AssayError as error:
            # The verdict stands and has to be seen, whatever became of the publish.
            return Outcome(run, verdict, None, str(error), error.exit_code)
