"""Commands on a registry: publish, pull, look, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from assay.commands.options import (
    DEFAULT_REGISTRY,
    JsonOption,
    KeyOption,
    PasswordOption,
    PolicyOption,
    QuietOption,
    ReferenceArgument,
    RegistryOption,
    StackOption,
)
from assay.errors import UsageError
from assay.show import Output


def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory (artifacts/runs/NAME).")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    tags: Annotated[list[str] | None, typer.Option("--tag", help="Tag to set (again for more).")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Move a version tag. Never lifts the need for a PASS.")
    ] = False,
    key: KeyOption = None,
    password_env: PasswordOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Publish a run whose verdict is PASS and names exactly its bytes; anything else is refused."""
    from assay.conclusion import publish_run
    from assay.registry.signing import load_signer

    signer = load_signer(key, password_env)
    Output(json, quiet).published(publish_run(run, registry, tuple(tags or ("latest",)), force=force, signer=signer))


def pull(
    reference: ReferenceArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Directory to create.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    stack: StackOption = None,
    any_host: Annotated[
        bool, typer.Option("--any-host", help="Pull what this machine cannot run, too, to hand it on.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what the destination holds.")] = False,
    policy: PolicyOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Pull an artifact. Every byte is verified before anything appears at the destination.

    With --for, what a serving stack needs is written beside it, to DEST.STACK. What this machine cannot run is refused.
    """
    from assay.pulling import pull_for

    Output(json, quiet).pulled(
        pull_for(registry, reference, destination, stack=stack, any_host=any_host, force=force, policy=policy)
    )


def list_(registry: RegistryOption = DEFAULT_REGISTRY, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List what a registry holds."""
    from assay.registry.inspection import list_artifacts

    Output(json, quiet).listed(list_artifacts(registry))


def show(
    reference: ReferenceArgument,
    registry: RegistryOption = DEFAULT_REGISTRY,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show a published artifact: files, facts, and the verdict that let it pass."""
    from assay.registry.inspection import show as show_artifact

    Output(json, quiet).shown(show_artifact(registry, reference))


def verify(
    reference: Annotated[
        str, typer.Argument(metavar="REF|DIRECTORY", help="A published artifact, or a pulled directory.")
    ],
    registry: RegistryOption = DEFAULT_REGISTRY,
    digest: Annotated[
        str | None, typer.Option("--digest", help="What a directory's digest must be, in place of a registry.")
    ] = None,
    policy: PolicyOption = None,
    channel: Annotated[
        str | None,
        typer.Option("--channel", metavar="CHANNEL", help="Of the policy: it must have been promoted into this one."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Recompute every digest of an artifact and its evidence, and check that a PASS names exactly these bytes.

    A pulled directory is looked up in the registry by its bytes, or compared with --digest alone.  Signatures are checked by a policy.
    """
    from assay.registry import inspection

    output = Output(json, quiet)
    if channel and not policy:
        raise UsageError("--channel asks who promoted, which a policy tells: add --policy.")
    if inspection.is_directory(registry, reference):
        if digest and policy:
            raise UsageError(
                "--digest compares bytes alone, without a registry, where signatures are: give --policy or --digest."
            )
        facts = inspection.verify_directory(Path(reference), digest)
        found = None if digest else inspection.verify_pulled(registry, facts, policy, channel)
        output.verified_directory(facts, found)
    else:
        output.verified(inspection.verify(registry, reference, policy, channel))
