"""The command line. Each command reads its arguments, makes one call, and shows the result as a table or as JSON.

Heavy modules are imported inside the commands that need them: `assay check` answers before torch could be imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from assay import __version__
from assay.errors import EXIT_INVALID, EXIT_OK, EXIT_USAGE, AssayError, RecipeError, UsageError
from assay.show import Output
from assay_evals.report import ReportFormat

app = typer.Typer(
    name="assay",
    help="Compile language models for serving and prove that they are still good.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 PASS or done, 1 FAIL, 2 usage or recipe error, 3 INCONCLUSIVE, 4 INVALID or a failure of the machine, "
    "5 integrity; 130 interrupted by Ctrl-C.",
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a value of the recipe.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the result.")]
WorkspaceOption = Annotated[Path, typer.Option("--workspace", help="Directory for the cache and the runs.")]
RegistryOption = Annotated[Path, typer.Option("--registry", help="OCI image-layout directory.")]
ReferenceArgument = Annotated[str, typer.Argument(metavar="REF", help="NAME:TAG, NAME@sha256:…, or sha256:…")]
DEFAULT_WORKSPACE = Path("artifacts")
DEFAULT_REGISTRY = Path("artifacts/store")
_EXIT_INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    if version:
        sys.stdout.write(f"assay {__version__}\n")
        raise typer.Exit


@app.command()
def check(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH…", help="Recipe files, or directories searched for *.yaml.")
    ],
    assignments: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check recipes against the schema, themselves, and their model where it is on this machine. Computes nothing."""
    from assay.checking import check_recipes

    result = check_recipes(paths, tuple(assignments or ()))
    Output(json, quiet).checked(result)
    raise typer.Exit(EXIT_OK if result.passed else EXIT_USAGE)


@app.command()
def schema(
    of: Annotated[
        Literal["recipe", "verdict"], typer.Argument(metavar="[recipe|verdict]", help="Of which file.")
    ] = "recipe",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Print the JSON Schema of recipes, for editors, or of verdict.json, for programs that read it."""
    del json, quiet  # It is JSON, and nothing else, in any case.
    from assay.files import readable_json

    if of == "verdict":
        from assay_evals.verdict import verdict_schema

        sys.stdout.buffer.write(readable_json(verdict_schema()))
        return
    from assay.recipe import Recipe

    sys.stdout.buffer.write(readable_json(Recipe.model_json_schema()))


@app.command()
def plan(
    recipe: RecipeArgument,
    assignments: SetOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what compiling a recipe would do: stages, what is cached, time and memory, and what its samples can detect."""
    from assay.plan import plan_recipe
    from assay.recipe_file import load_recipe

    output = Output(json, quiet)
    loaded, document = load_recipe(recipe, tuple(assignments or ()))
    output.planned(plan_recipe(loaded, document, recipe.parent, workspace, output.progress))


@app.command(name="compile")
def compile_(
    recipe: RecipeArgument,
    assignments: SetOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    force: Annotated[bool, typer.Option("--force", help="Build every stage again, whatever is cached.")] = False,
    fresh_evidence: Annotated[
        bool, typer.Option("--fresh-evidence", help="Measure again, whatever is cached.")
    ] = False,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Stop after the verdict and the report.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize, compile, measure against the baseline, judge, report; publish on PASS. Run again, it goes on where it stopped."""
    from assay.compatibility import check_model
    from assay.recipe_file import load_recipe

    output = Output(json, quiet)
    loaded, document = load_recipe(recipe, tuple(assignments or ()))
    check_model(loaded, document, recipe.parent, fetch=True)
    from assay.pipeline import compile_recipe
    from assay.workspace import Workspace

    space = Workspace(workspace, output.progress, force)
    outcome = compile_recipe(
        loaded, recipe.parent, space, fresh_evidence=fresh_evidence or force, publishing=not no_publish
    )
    output.concluded(outcome)
    raise typer.Exit(outcome.exit_code)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory (artifacts/runs/NAME).")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="Tag to set (again for more).")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Move a version tag. Never lifts the need for a PASS.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a run whose verdict is PASS and names exactly its bytes; anything else is refused."""
    from assay.conclusion import publish_run

    Output(json, quiet).published(publish_run(run, registry, tuple(tags or ("latest",)), force=force))


@app.command()
def pull(
    reference: ReferenceArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Directory to create.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    force: Annotated[bool, typer.Option("--force", help="Replace what the destination holds.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Pull an artifact. Every byte is verified before anything appears at the destination."""
    from assay.registry.pull import pull as pull_artifact

    Output(json, quiet).pulled(pull_artifact(registry, reference, destination, force=force))


@app.command(name="list")
def list_(registry: RegistryOption = DEFAULT_REGISTRY, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List what a registry holds."""
    from assay.registry.inspection import list_artifacts

    Output(json, quiet).listed(list_artifacts(registry))


@app.command()
def show(
    reference: ReferenceArgument,
    registry: RegistryOption = DEFAULT_REGISTRY,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show a published artifact: files, facts, and the verdict that let it pass."""
    from assay.registry.inspection import show as show_artifact

    Output(json, quiet).shown(show_artifact(registry, reference))


@app.command()
def verify(
    reference: Annotated[
        str, typer.Argument(metavar="REF|DIRECTORY", help="A published artifact, or a pulled directory.")
    ],
    registry: RegistryOption = DEFAULT_REGISTRY,
    digest: Annotated[
        str | None, typer.Option("--digest", help="What a directory's digest must be, in place of a registry.")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Recompute every digest of an artifact and its evidence, and check that a PASS names exactly these bytes.

    A pulled directory is looked up in the registry by its bytes, or compared with --digest alone.
    """
    from assay.registry import inspection

    output = Output(json, quiet)
    if inspection.is_directory(registry, reference):
        facts = inspection.verify_directory(Path(reference), digest)
        output.verified_directory(facts, None if digest else inspection.verify_pulled(registry, facts))
    else:
        output.verified(inspection.verify(registry, reference))


@app.command()
def generate(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY", exists=True, file_okay=False, help="An artifact directory, e.g. a pulled one."
        ),
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="How many tokens to generate.")] = 40,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Continue a prompt with an artifact on its own runtime, greedily, and time it."""
    from assay.artifact import read_manifest
    from assay_evals.runtimes.base import generate_text

    Output(json, quiet).generated(
        generate_text(str(read_manifest(directory).get("runtime")), directory, prompt, new_tokens)
    )


@app.command()
def bench(
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Base URL of an OpenAI-compatible API, with its /v1.", rich_help_panel="Endpoint"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model to ask for; unless named, the one that the endpoint serves.",
            rich_help_panel="Endpoint",
        ),
    ] = None,
    api: Annotated[
        Literal["completions", "chat"], typer.Option(help="Which API is asked.", rich_help_panel="Endpoint")
    ] = "completions",
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,4", help="Closed loop: levels of requests in flight. Unless --rate: 1.", rich_help_panel="Load"
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="0.5,1,2", help="Open loop: levels of Poisson arrivals per second.", rich_help_panel="Load"
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="Measured requests of each level.", rich_help_panel="Load")
    ] = 100,
    warm_up: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Requests before them. Unless given: a tenth, and at least the concurrency.",
            rich_help_panel="Load",
        ),
    ] = None,
    input_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="About how long prompts are, of Python's documentation. Unless given: 256.",
            rich_help_panel="Requests",
        ),
    ] = None,
    output_tokens: Annotated[
        int, typer.Option(min=1, help="How long answers may get (max_tokens).", rich_help_panel="Requests")
    ] = 128,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE.jsonl",
            help="Prompts, or lists of messages, of a file.",
            rich_help_panel="Requests",
        ),
    ] = None,
    field: Annotated[
        str, typer.Option(metavar="NAME", help="Field of the file's lines that holds them.", rich_help_panel="Requests")
    ] = "prompt",
    body: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="""More fields of each request, such as '{"ignore_eos": true}'; null omits one.""",
            rich_help_panel="Requests",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which a request has failed.", rich_help_panel="Requests")
    ] = 120.0,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable that holds the API key.", rich_help_panel="Endpoint"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts and of the arrivals.", rich_help_panel="Load")] = 0,
    slo: Annotated[
        str | None,
        typer.Option(
            metavar="ttft=0.5,tpot=0.05,e2e=10",
            help="Objectives of a request, in seconds; goodput counts them.",
            rich_help_panel="Judging",
        ),
    ] = None,
    min_goodput: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of requests that must meet every objective.", rich_help_panel="Judging"),
    ] = None,
    max_error_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests that may fail.", rich_help_panel="Judging")
    ] = 0.01,
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0, help="Of all that serves the endpoint; gives the cost of output tokens.", rich_help_panel="Judging"
        ),
    ] = None,
    currency: Annotated[str, typer.Option(help="Of the price.", rich_help_panel="Judging")] = "USD",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="RESULT.json",
            help="Write the result with every request.",
            rich_help_panel="Result",
        ),
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--from",
            exists=True,
            dir_okay=False,
            metavar="RESULT.json",
            help="Judge this again; sends nothing.",
            rich_help_panel="Result",
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Load-test an OpenAI-compatible endpoint: throughput, latencies and goodput at each level, with intervals.

    Exit code 1 when more requests fail, or fewer meet the objectives, than was asked; 4 when the endpoint is down or stops answering.
    Ctrl-C keeps what was measured and says that it is partial.
    """
    from assay_evals.load.objectives import read_asked
    from assay_evals.load.result import conclude, read_measured, write_result
    from assay_evals.load.session import measure, read_settings

    shown = Output(json, quiet)
    asked = read_asked(slo, max_error_rate, min_goodput, price_per_hour, currency)
    if earlier is not None and endpoint is not None:
        raise UsageError("--from judges an earlier result, --endpoint measures a new one: give one of them.")
    if earlier is not None:
        measured = read_measured(earlier)
    else:
        settings = read_settings(
            endpoint=endpoint,
            model=model,
            api=api,
            concurrency=concurrency,
            rate=rate,
            requests=requests,
            warm_up=warm_up,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            prompts=prompts,
            field=field,
            body=body,
            timeout=timeout,
            api_key_env=api_key_env,
            seed=seed,
        )
        measured = measure(settings, shown.progress)
    result = conclude(measured, asked)
    if output is not None:
        write_result(output, result)
    shown.benched(result)
    if result.interrupted:
        # Not a typer.Exit, of which `main` would say that the same command goes on from there.
        sys.exit(result.exit_code)
    raise typer.Exit(result.exit_code)


def main() -> None:
    """Entry point: errors that Assay raises on purpose become one message and their exit code."""
    try:
        code = app(standalone_mode=False) or EXIT_OK
    except AssayError as error:
        _report(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = _EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("assay", "assay_evals"):
            raise
        wanted = UsageError(
            f"this command needs {error.name}, which is not installed: pip install 'assay[compile,cpu]'."
        )
        _report(wanted)
        code = wanted.exit_code
    except Exception as error:
        shown: Any = getattr(error, "show", None)
        if shown is None:
            # A defect of this program, which must not be taken for a FAIL.
            sys.excepthook(type(error), error, error.__traceback__)
            sys.exit(EXIT_INVALID)
        shown()
        code = EXIT_USAGE
    # Typer makes this code of a Ctrl-C during a command.
    if code == _EXIT_INTERRUPTED:
        sys.stderr.write("assay: interrupted; finished work is kept, and the same command goes on from there.\n")
    sys.exit(code)


def _report(error: AssayError) -> None:
    if "--json" in sys.argv:
        from assay.files import readable_json

        body: dict[str, Any] = {"error": str(error), "exit_code": error.exit_code}
        if isinstance(error, RecipeError):
            body["problems"] = [vars(problem) for problem in error.problems]
        sys.stdout.buffer.write(readable_json(body))
        return
    prefix = "" if isinstance(error, RecipeError) else "assay: "
    sys.stderr.write(f"{prefix}{error}\n")


if __name__ == "__main__":
    main()
