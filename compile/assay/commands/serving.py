"""Commands on what is served: an artifact directory, an endpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from assay.commands.options import JsonOption, QuietOption, StackOption
from assay.errors import UsageError
from assay.show import Output


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


def serving(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIRECTORY", exists=True, file_okay=False, help="An artifact, e.g. a pulled one."),
    ],
    stack: StackOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where the files go; DIRECTORY.STACK, unless given."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What clients call the model; its own name, unless given.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Where the server sees DIRECTORY, such as in a container."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65534, help="What the server listens on.")] = 8000,
    storage: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="kserve, truss: where the cluster finds the files, such as s3://…"),
    ] = None,
    modelcar: Annotated[
        Path | None,
        typer.Option(metavar="LAYOUT", help="kserve: write the artifact as a container image, too, to an OCI layout."),
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="truss, compose: container image to start.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what the output holds.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write what a serving stack needs to serve an artifact, beside it, and show the command that starts the server.

    The artifact itself is hashed and left as it is. What a stack cannot serve is refused, with the stacks that can.
    """
    from assay.serving.make import Options, make_serving

    if stack is None:
        raise UsageError("say which stack is to serve it: --for vllm, for example (assay serving --help lists them).")
    options = Options(name=name, at=at, storage=storage, image=image, modelcar=modelcar, port=port)
    Output(json, quiet).served(make_serving(directory, stack, output, options, force=force))


def bench(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIRECTORY]", exists=True, file_okay=False, help="An artifact, loaded on its own runtime."
        ),
    ] = None,
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
    form: Annotated[
        Literal["table", "markdown"],
        typer.Option("--format", help="table, or markdown (for a step summary).", rich_help_panel="Result"),
    ] = "table",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Load-test an artifact on its own runtime, or an OpenAI-compatible endpoint: throughput, latencies and goodput, with intervals.

    Exit code 1 when more requests fail, or fewer meet the objectives, than was asked; 4 when the runtime crashes, or the endpoint is down, or
    either stops answering.
    Ctrl-C keeps what was measured and says that it is partial.
    """
    from assay_evals.load.objectives import read_asked
    from assay_evals.load.result import conclude, read_measured, write_result
    from assay_evals.load.session import measure, read_settings

    shown = Output(json, quiet)
    asked = read_asked(slo, max_error_rate, min_goodput, price_per_hour, currency)
    if earlier is not None and (endpoint is not None or directory is not None):
        raise UsageError(
            "--from judges an earlier result, DIRECTORY and --endpoint measure a new one: give one of them."
        )
    if earlier is not None:
        measured = read_measured(earlier)
    else:
        settings = read_settings(
            directory=directory,
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
    shown.benched(result, form)
    if result.interrupted:
        # Not a typer.Exit, of which `main` would say that the same command goes on from there.
        sys.exit(result.exit_code)
    raise typer.Exit(result.exit_code)
