"""Commands on the life of a published artifact: keys, tags, promotion and rollback, differences, removal."""

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
)
from assay.errors import UsageError
from assay.show import Output


def keygen(
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", help="File for the private key; DEST.pub gets the public.")
    ],
    kind: Annotated[
        str, typer.Option("--type", metavar="[ed25519|ecdsa]", help="Kind of key; ecdsa is on P-256.")
    ] = "ed25519",
    password_env: PasswordOption = None,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Leave the private key unencrypted, for a store of secrets.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a key to sign with. Existing files are never overwritten; a password is never taken from the command line."""
    from assay.registry.keys import read_new_password, write_key_pair
    from assay.show_lifecycle import key_lines

    if kind not in ("ed25519", "ecdsa"):
        raise UsageError(f"--type is {kind!r}; allowed: ed25519, ecdsa.")
    if no_password and password_env:
        raise UsageError("--no-password and --password-env contradict each other: give one of them.")
    password = None if no_password else read_new_password(password_env)
    files = write_key_pair(destination, kind, password)
    Output(json, quiet).told(files, key_lines(files))


def tag(
    reference: ReferenceArgument,
    new: Annotated[str, typer.Argument(metavar="NEWTAG", help="Tag to set, of the same name.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    force: Annotated[bool, typer.Option("--force", help="Move a version tag.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give a published artifact one more tag. A channel is moved by `assay promote` alone."""
    from assay.registry.tags import set_tag
    from assay.show_lifecycle import tagged_lines

    done = set_tag(registry, reference, new, force=force)
    Output(json, quiet).told(done, tagged_lines(done))


def untag(
    reference: Annotated[str, typer.Argument(metavar="NAME:TAG", help="The tag that is to go.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    force: Annotated[bool, typer.Option("--force", help="Also a channel, with which rollback ends.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Take a tag away. The artifact stays, and can be pulled by its digest."""
    from assay.registry.tags import untag as take_away
    from assay.show_lifecycle import tagged_lines

    done = take_away(registry, reference, force=force)
    Output(json, quiet).told(done, tagged_lines(done))


def promote(
    reference: ReferenceArgument,
    channel: Annotated[str, typer.Option("--to", metavar="CHANNEL", help="Channel, such as production.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    policy: PolicyOption = None,
    key: KeyOption = None,
    password_env: PasswordOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Verify an artifact, and move a channel to it, with a signed record of who did so after which checks."""
    from assay.registry.channels import promote as move
    from assay.registry.signing import load_signer
    from assay.show_lifecycle import moved_lines

    done = move(registry, reference, channel, policy=policy, signer=load_signer(key, password_env))
    Output(json, quiet).told(done, moved_lines(done))


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the artifact, without a tag.")],
    channel: Annotated[str, typer.Option("--channel", metavar="CHANNEL", help="Channel, such as production.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    policy: PolicyOption = None,
    key: KeyOption = None,
    password_env: PasswordOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Move a channel back to what was promoted before and still verifies, with a signed record of that."""
    from assay.registry.channels import rollback as move_back
    from assay.registry.signing import load_signer
    from assay.show_lifecycle import moved_lines

    done = move_back(registry, name, channel, policy=policy, signer=load_signer(key, password_env))
    Output(json, quiet).told(done, moved_lines(done))


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="NAME:TAG, NAME@sha256:…, or ADDRESS/NAME:TAG.")],
    after: Annotated[str, typer.Argument(metavar="B", help="What it is compared with.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what changed between two published artifacts: files, recipe, scheme, tools, figures. Exit code 0 in any case."""
    from assay.registry.differences import diff as compare
    from assay.show_lifecycle import difference_lines

    found = compare(registry, before, after)
    Output(json, quiet).told(found, difference_lines(found))


def remove(
    reference: Annotated[str, typer.Argument(metavar="NAME@sha256:DIGEST", help="An artifact without tags.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    force: Annotated[bool, typer.Option("--force", help="Also one that was promoted, which ends its history.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Take an untagged artifact away from a name, so that `assay gc` may collect its blobs."""
    from assay.registry.collecting import remove as take_away
    from assay.show_lifecycle import removed_lines

    done = take_away(registry, reference, force=force)
    Output(json, quiet).told(done, removed_lines(done))


def gc(
    registry: RegistryOption = DEFAULT_REGISTRY,
    grace: Annotated[
        str,
        typer.Option("--grace", metavar="24h", help="Leave younger blobs, of publishes at work: 90s, 30m, 24h, 7d."),
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove the blobs of a registry directory that no tag, no kept digest and nothing said about one leads to."""
    from assay.registry.collecting import collect, seconds_of
    from assay.show_lifecycle import collected_lines

    grace_seconds = seconds_of(grace)
    found = collect(registry, grace_seconds, dry_run=dry_run)
    Output(json, quiet).told(found, collected_lines(found, grace_seconds, dry_run))
