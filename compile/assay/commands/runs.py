"""Commands on finished runs: judge, report, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from assay.commands.options import JsonOption, QuietOption
from assay.show import Output
from assay_evals.report import ReportFormat


def gate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or an evidence directory.")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Judge by the gate of this recipe instead; writes nothing.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Judge the evidence of a run again, without a model; a run directory's verdict and report are written anew."""
    from assay.conclusion import judge_again

    verdict = judge_again(run, recipe)
    Output(json, quiet).judged(verdict)
    raise typer.Exit(verdict.exit_code)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory (artifacts/runs/NAME).")],
    form: Annotated[
        ReportFormat,
        typer.Option("--format", help="html, markdown (for a pull request or a step summary), junit, or json."),
    ] = "markdown",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write instead of standard output.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Print the report of a finished run. Nothing is measured; `assay compile` writes html, markdown and junit beside the evidence."""
    del quiet  # It is the report, and nothing else, in any case.
    from assay.conclusion import report_run

    content = report_run(run, "json" if json else form)
    if output is None:
        sys.stdout.buffer.write(content)
    else:
        from assay.files import write_atomic

        write_atomic(output, content)


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN…", help="Run directories; each is compared with the first.")
    ],
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page, too.")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare finished runs: what each candidate changes against the first one, with intervals that hold together."""
    from assay.conclusion import compare_runs

    found = compare_runs(runs)
    if page is not None:
        from assay.files import write_atomic
        from assay_evals.report.comparison_page import render_comparison

        write_atomic(page, render_comparison(found))
    Output(json, quiet).compared(found)
