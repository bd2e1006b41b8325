"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a value of the recipe.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the result.")]
WorkspaceOption = Annotated[Path, typer.Option("--workspace", help="Directory for the cache and the runs.")]
RegistryOption = Annotated[
    str,
    typer.Option(
        "--registry",
        metavar="ADDRESS",
        help="A directory, or an address: oci://HOST/PATH, s3://BUCKET/PREFIX, hf://ORG.",
    ),
]
ReferenceArgument = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="NAME:TAG, NAME@sha256:…, or sha256:…; also with an address in front: oci://HOST/PATH/NAME:TAG.",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="FILE",
        help="Sign with this private key (PEM); env:NAME for one in a variable; sigstore in CI.",
    ),
]
PasswordOption = Annotated[
    str | None,
    typer.Option(
        "--password-env",
        metavar="NAME",
        help="Variable with the key's password; unless given, ASSAY_KEY_PASSWORD, or you are asked.",
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", metavar="FILE", help="Trust policy (YAML) that must be met: see docs/trust.md."),
]
StackOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="STACK",
        help="vllm, sglang, tensorrt-llm, onnxruntime-genai, triton, kserve, truss, bentoml or compose.",
    ),
]
DEFAULT_WORKSPACE = Path("artifacts")
DEFAULT_REGISTRY = "artifacts/store"
