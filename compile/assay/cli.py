"""The command line. Each command reads its arguments, makes one call, and shows the result as a table or as JSON.

The commands are in `commands/`, a file per subject; here is what they share: their order, errors and exit codes.
Heavy modules are imported inside the commands that need them: `assay check` answers before torch could be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from assay import __version__
from assay.commands import lifecycle, recipes, registry, runs, serving
from assay.errors import EXIT_INVALID, EXIT_OK, EXIT_USAGE, AssayError, RecipeError, UsageError

app = typer.Typer(
    name="assay",
    help="Compile language models for serving and prove that they are still good.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 PASS or done, 1 FAIL, 2 usage or recipe error, 3 INCONCLUSIVE, 4 INVALID or a failure of the machine, "
    "5 integrity or signature; 130 interrupted by Ctrl-C.",
)

_EXIT_INTERRUPTED = 130
# Modules that the extra `evals` brings; every other one comes with the larger extras.
_EVALS = frozenset({"jinja2", "numpy", "scipy"})


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    if version:
        sys.stdout.write(f"assay {__version__}\n")
        raise typer.Exit


_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Recipes": {
        "check": recipes.check,
        "schema": recipes.schema,
        "import": recipes.import_,
        "plan": recipes.plan,
        "compile": recipes.compile_,
    },
    "Runs": {"gate": runs.gate, "report": runs.report, "compare": runs.compare},
    "Registry": {
        "publish": registry.publish,
        "pull": registry.pull,
        "list": registry.list_,
        "show": registry.show,
        "verify": registry.verify,
        "diff": lifecycle.diff,
        "tag": lifecycle.tag,
        "untag": lifecycle.untag,
        "promote": lifecycle.promote,
        "rollback": lifecycle.rollback,
        "remove": lifecycle.remove,
        "gc": lifecycle.gc,
        "keygen": lifecycle.keygen,
    },
    "Serving": {"serving": serving.serving, "generate": serving.generate, "bench": serving.bench},
}
for _panel, _named in _COMMANDS.items():
    for _name, _function in _named.items():
        app.command(_name, rich_help_panel=_panel)(_function)


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
        extra = "evals" if error.name.partition(".")[0] in _EVALS else "compile,cpu"
        wanted = UsageError(f"this command needs {error.name}, which is not installed: pip install 'assay[{extra}]'.")
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
