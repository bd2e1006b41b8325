"""Assay compiles language models for serving and proves that they are still good.

What a server's start-up needs of it is here: `assay.pull` and `assay.verify`. Importing this imports nothing else.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from assay.pulling import Pulled
    from assay.registry.inspection import DirectoryFacts

__all__ = ["__version__", "pull", "verify"]
__version__ = "0.1.0"


def pull(
    reference: str,
    destination: str | os.PathLike[str],
    *,
    registry: str | os.PathLike[str] = "artifacts/store",
    stack: str | None = None,
    any_host: bool = False,
    force: bool = False,
    policy: str | os.PathLike[str] | None = None,
) -> Pulled:
    """Pull a published artifact into a directory, verified: the directory has all of it or is not there.

        pulled = assay.pull("m@sha256:…", "/models/m", registry="/mnt/store", stack="vllm")
        os.execvp(pulled.serving.command[0], pulled.serving.command)

    reference: NAME:TAG, NAME@sha256:… or sha256:…  destination: absent, empty, or holding this artifact already, which is then left as it
    is.  stack: write what a serving stack needs to DESTINATION.STACK, too.  any_host: pull what this machine cannot run.  force: replace
    what is there.  policy: a trust policy file that the artifact has to meet.
    Raises UsageError, NotSupportedError (this machine, or the stack), IntegrityError, AssayError (all in assay.errors).
    """
    from pathlib import Path

    from assay.pulling import pull_for

    return pull_for(
        registry if isinstance(registry, str) else Path(registry),
        reference,
        Path(destination),
        stack=stack,
        any_host=any_host,
        force=force,
        policy=None if policy is None else Path(policy),
    )


def verify(directory: str | os.PathLike[str], digest: str) -> DirectoryFacts:
    """Hash every file of an artifact directory; IntegrityError unless all of it is what the digest names.

        assay.verify("/models/m", "sha256:…")

    digest: of the artifact's manifest, as `assay pull` and `assay publish` print it, or its bundle digest.
    """
    from pathlib import Path

    from assay.registry.inspection import verify_directory

    return verify_directory(Path(directory), digest)
