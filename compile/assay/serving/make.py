"""Write a stack's files beside an artifact: whole or not at all, and the same again for the same artifact and options.

models/m              the artifact, untouched
models/m.vllm/        serve.sh        starts the server, with the arguments it is given added
                      serving.json    the digest, the command, the environment, for programs
                      …               what the stack needs beside that
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assay.artifact import read_manifest, refuse_code
from assay.errors import UsageError
from assay.files import atomic_directory, read_json, readable_json
from assay.registry.inspection import verify_directory
from assay.serving import Served, ServingFiles, load_stack, stack_row
from assay.serving.modelcar import Modelcar, write_modelcar
from assay.serving.servable import check_servable

SERVING_JSON = "serving.json"
_SCRIPT = "serve.sh"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
# In the place of digests that are not known yet.
_UNKNOWN = "sha256:" + "0" * 64
_EXECUTABLE, _READABLE = 0o755, 0o644


@dataclass(frozen=True)
class Options:
    """What may be said about serving beside the stack.

    name: what clients call the model; the artifact's own, unless given.  at: its directory as the server sees it.  storage: an address
    that the cluster reaches.  image: of the container.  modelcar: OCI image layout to create with the artifact as an image.
    """

    name: str | None = None
    at: str | None = None
    storage: str | None = None
    image: str | None = None
    modelcar: Path | None = None
    port: int = 8000


@dataclass(frozen=True)
class Serving:
    """A stack's files as they were written.  created: False when they were there already.  command: starts the server."""

    stack: str
    name: str
    digest: str
    artifact: Path
    directory: Path
    files: tuple[str, ...]
    command: tuple[str, ...]
    environment: dict[str, str]
    notes: tuple[str, ...]
    created: bool
    modelcar: Modelcar | None = None

    @property
    def shell_command(self) -> str:
        """The command with its environment, as a shell takes it."""
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.command])


def make_serving(
    artifact: Path,
    stack: str,
    output: Path | None = None,
    options: Options | None = None,
    *,
    digest: str | None = None,
    force: bool = False,
) -> Serving:
    """Write what a stack needs to serve an artifact directory, beside it.

    output: directory to create; the artifact's name with the stack's, unless given.  digest: of the artifact's manifest, when its bytes
    were verified just now; else they are hashed here.  force: replace what the output holds.
    Raises UsageError for wrong options, NotSupportedError when the stack cannot serve it, IntegrityError when it is not an artifact.
    """
    artifact, options = Path(os.path.abspath(artifact)), options or Options()  # noqa: PTH100  (a link stays a link)
    output = output_directory(artifact, stack, output)
    _check_options(stack, options)
    module, served = load_stack(stack), _read(artifact, stack, output, options)
    # What is wrong is said before gigabytes are hashed, and before anything is written.
    module.serving_files(served)
    served = replace(served, digest=digest or verify_directory(artifact).digest)
    modelcar = _modelcar(served, options, force)
    if modelcar is not None:
        served = replace(served, storage=_pinned(options, modelcar.digest))
    made = module.serving_files(served)
    files = _all_files(stack, served, made)
    created = not _holds(output, files, made.links)
    if created:
        check_output(output, force)
        _write(output, files, made)
    return Serving(
        stack=stack,
        name=served.name,
        digest=served.digest,
        artifact=artifact,
        directory=output,
        files=tuple(sorted([*files, *made.links])),
        command=made.command,
        environment=dict(made.environment),
        notes=made.notes,
        created=created,
        modelcar=modelcar,
    )


def _read(artifact: Path, stack: str, output: Path, options: Options) -> Served:
    """An artifact as it will be served, but for the digests that take long to find out."""
    manifest = read_manifest(artifact)
    check_servable(stack, manifest, str(artifact))
    refuse_code(artifact)
    config = artifact / "config.json"
    return Served(
        directory=artifact,
        at=options.at or str(artifact),
        output=output,
        name=_checked_name(options.name or str(manifest.get("name"))),
        digest=_UNKNOWN,
        manifest=manifest,
        config=read_json(config) if config.is_file() else {},
        port=options.port,
        storage=_pinned(options, _UNKNOWN),
        image=options.image,
    )


def output_directory(artifact: Path, stack: str, output: Path | None) -> Path:
    """Where a stack's files go; UsageError when that is in the artifact, whose bytes are signed for as they are."""
    stack_row(stack)
    place = output or artifact.with_name(f"{artifact.name}.{stack}")
    place = Path(os.path.abspath(place))  # noqa: PTH100
    if place.resolve().is_relative_to(artifact.resolve()):
        raise UsageError(f"{place}: is in the artifact, to which nothing may be added. Give a directory beside it.")
    return place


def check_output(output: Path, force: bool) -> None:
    """UsageError unless files can be put there without losing anything that was not given up by `force`."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UsageError(f"{output}: not a directory. Give one that is absent or empty.")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise UsageError(
            f"{output}: holds other files. Choose an absent or empty directory (-o), or use --force to replace it."
        )


def _check_options(stack: str, options: Options) -> None:
    row = stack_row(stack)
    if options.storage is not None and not row.storage:
        raise UsageError(f"{stack} serves the directory itself: --storage has no meaning for it.")
    if options.modelcar is not None and not any(kind.startswith("oci") for kind in row.storage):
        raise UsageError(f"{stack} mounts no images: --modelcar has no meaning for it.")
    if options.image is not None and not row.image:
        raise UsageError(f"{stack} starts no container: --image has no meaning for it.")
    if options.image is not None and not re.fullmatch(r"[A-Za-z0-9][\w.:@/-]*", options.image):
        raise UsageError(f"{options.image!r} cannot be an image.")
    if options.at is not None and (not options.at.startswith("/") or not options.at.isprintable()):
        raise UsageError(f"{options.at!r}: give the absolute path at which the server sees the artifact.")


def _modelcar(served: Served, options: Options, force: bool) -> Modelcar | None:
    """The artifact as an image, where that was asked for; an existing layout is never overwritten."""
    layout = options.modelcar
    if layout is None:
        return None
    if layout.resolve().is_relative_to(served.directory.resolve()):
        raise UsageError(f"{layout}: is in the artifact, to which nothing may be added. Give a directory beside it.")
    check_output(layout, force=False)
    check_output(served.output, force)
    return write_modelcar(served.directory, layout, f"{served.name}-modelcar", served.digest)


def _pinned(options: Options, image: str) -> str | None:
    """The storage's address that was given; of an image that is made now, with the image's digest."""
    if options.modelcar is None or options.storage is None or "@" in options.storage:
        return options.storage
    return f"{options.storage}@{image}"


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a served model: up to 100 letters, digits, dots, dashes and underscores. Give --name."
        )
    return name


def _all_files(stack: str, served: Served, made: ServingFiles) -> dict[str, bytes]:
    about: dict[str, Any] = {
        "version": 1,
        "stack": stack,
        "name": served.name,
        "digest": served.digest,
        "artifact": served.at,
        "command": list(made.command),
        "environment": dict(made.environment),
    }
    files = {SERVING_JSON: readable_json(about), **made.files}
    if made.local:
        files[_SCRIPT] = _script(served, made)
    return files


def _script(served: Served, made: ServingFiles) -> bytes:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in made.environment.items()]
    lines = [
        "#!/bin/sh",
        f"# Serves {served.pinned}; what this is given is added to the command.",
        "set -eu",
        *exports,
        f'exec {shlex.join(made.command)} "$@"',
    ]
    return ("\n".join(lines) + "\n").encode()


def _write(output: Path, files: dict[str, bytes], made: ServingFiles) -> None:
    with atomic_directory(output) as directory:
        for name, content in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(_EXECUTABLE if name == _SCRIPT else _READABLE)
        for name, target in made.links.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target, target_is_directory=True)


def _holds(output: Path, files: dict[str, bytes], links: Any) -> bool:
    """Whether the output has exactly these files and links."""
    if output.is_symlink() or not output.is_dir():
        return False
    found = {
        path.relative_to(output).as_posix(): path
        for path in output.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    return set(found) == {*files, *links} and all(
        str(path.readlink()) == links.get(name) if path.is_symlink() else path.read_bytes() == files.get(name)
        for name, path in found.items()
    )
