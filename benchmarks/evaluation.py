"""What judging costs: the divergence beside the forward passes it needs, the gate's arithmetic, and the reports.

    .venv/bin/python benchmarks/evaluation.py [--run RUN] [--windows 12]

RUN: the directory of a finished run (the demo's, if none is named), whose two artifacts are loaded. A window of 512 tokens goes through both,
and the ratio is (passes + divergence + best tokens) / passes. The arithmetic judges 100,000 paired questions and 2,000 windows of 50
tokens, all bootstrap draws included; the reports are those of the run. Prints one JSON object, seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from assay.artifact import read_manifest
from assay.conclusion import ARTIFACT, EVIDENCE
from assay.files import read_json
from assay_evals.evidence import Answer, Cloze, Evidence, Window, read_evidence
from assay_evals.gate import judge
from assay_evals.quality.divergence import divergence
from assay_evals.report import ReportFormat, render_report
from assay_evals.runtimes.base import open_runtime

RUN = Path("artifacts/runs/smollm2-135m-w4a16-ort")
FORMS: tuple[ReportFormat, ...] = ("html", "markdown", "junit")


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(*arguments), time.perf_counter() - started


def divergence_cost(baseline: Path, candidate: Path, windows: int) -> dict[str, float]:
    """Seconds a window for both passes and for what is made of them; the first window warms up."""
    runtimes = [open_runtime(str(read_manifest(candidate)["runtime"]), arm) for arm in (baseline, candidate)]
    random, passes, rest = np.random.default_rng(0), 0.0, 0.0
    for window in range(windows + 1):
        tokens = [int(token) for token in random.integers(100, 30_000, 512)]
        (before, first), (after, second) = (timed(runtime.logits, tokens) for runtime in runtimes)
        _, compared = timed(divergence, before, after, tuple(tokens))
        _, best = timed(lambda before, after: (before.argmax(-1), after.argmax(-1)), before, after)
        if window:
            passes, rest = passes + first + second, rest + compared + best
    return {"passes": passes / windows, "divergence": rest / windows, "ratio": (passes + rest) / passes}


def large(evidence: Evidence) -> Evidence:
    """The same run with 100,000 questions and 100,000 tokens in 2,000 documents."""
    random = np.random.default_rng(0)
    right, turned = random.random(100_000) < 0.5, random.random(100_000) < 0.08
    clozes = tuple(
        Cloze(
            document=f"{number % 2000:04}",
            window=0,
            position=number,
            word="word",
            context="",
            baseline=Answer(correct=bool(before), answer=""),
            candidate=Answer(correct=bool(before != turn), answer=""),
        )
        for number, (before, turn) in enumerate(zip(right, turned, strict=True))
    )
    windows = tuple(
        Window(
            document=f"{number:04}",
            window=0,
            tokens=50,
            kl=tuple(random.lognormal(-4, 1.3, 50).tolist()),
            agreed=tuple((random.random(50) < 0.9).astype(int).tolist()),
            nll_baseline=3.0,
            nll_candidate=3.05,
        )
        for number in range(2000)
    )
    return dataclasses.replace(evidence, windows=windows, clozes=clozes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN)
    parser.add_argument("--windows", type=int, default=12)
    arguments = parser.parse_args()
    candidate, evidence = arguments.run / ARTIFACT, read_evidence(arguments.run / EVIDENCE)
    caches = (path for path in candidate.resolve().parent.glob("baseline-*") if path.is_dir())
    wanted = evidence.header.baseline.bundle_digest
    baseline = next(path for path in caches if read_json(path.with_suffix(".json"))["digest"] == wanted)
    cost = divergence_cost(baseline, candidate, arguments.windows)
    _, judging = timed(judge, large(evidence))
    manifest, verdict = read_manifest(candidate), judge(evidence)
    reports = {form: timed(render_report, form, verdict, evidence, manifest, {})[1] for form in FORMS}
    print(json.dumps({"window": cost, "judging": judging, "reports": reports}))


if __name__ == "__main__":
    main()
