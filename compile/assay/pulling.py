"""Pull what this machine can run, and what a serving stack needs beside it: asked of the manifest before a byte of the model is copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay.errors import UsageError
from assay.registry.pull import PullReceipt, pull
from assay.requirements import check_host

if TYPE_CHECKING:
    from assay.serving.make import Serving


@dataclass(frozen=True)
class Pulled:
    """An artifact on this machine.  serving: what a stack needs beside it, where one was named.

    unchecked: sentences on requirements that could not be held against this machine.
    """

    receipt: PullReceipt
    serving: Serving | None = None
    unchecked: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        """Where the artifact lies."""
        return self.receipt.destination

    @property
    def digest(self) -> str:
        """Of its manifest: what names exactly these bytes."""
        return self.receipt.digest


def pull_for(
    registry: Path | str,
    reference: str,
    destination: Path,
    *,
    stack: str | None = None,
    any_host: bool = False,
    force: bool = False,
    policy: Path | None = None,
) -> Pulled:
    """Pull an artifact, and write what a stack needs to DESTINATION.STACK.

    any_host: pull what this machine cannot run, too.  force: replace what is there.  policy: a trust policy, which is met first.
    Raises what `assay.registry.pull.pull` and `assay.serving.make.make_serving` raise, NotSupportedError when this machine cannot run it.
    """
    unchecked: tuple[str, ...] = ()
    if stack is not None:
        _check_stack(stack, destination, force)

    def accept(manifest: Mapping[str, Any], where: str) -> None:
        nonlocal unchecked
        if not any_host:
            unchecked = check_host(manifest, where)
        if stack is not None:
            from assay.serving.servable import check_servable

            check_servable(stack, manifest, where)

    receipt = pull(registry, reference, destination, force=force, policy=policy, accept=accept)
    if stack is None:
        return Pulled(receipt, None, unchecked)
    from assay.serving.make import make_serving

    serving = make_serving(receipt.destination, stack, digest=receipt.digest, force=force)
    return Pulled(receipt, serving, unchecked)


def _check_stack(stack: str, destination: Path, force: bool) -> None:
    """UsageError for what the pull alone cannot give a stack, or would find in its way at the end."""
    from assay.serving import stack_row
    from assay.serving.make import check_output, output_directory

    if stack_row(stack).storage:
        raise UsageError(
            f"{stack} loads from a storage that has to be named: pull without --for, then "
            f"assay serving {destination} --for {stack} --storage ADDRESS"
        )
    output = output_directory(destination, stack, None)
    if not destination.exists():
        check_output(output, force)
