"""A server's entry point: pull exactly these bytes, or find that they are there, and become the server.

ASSAY_REFERENCE=NAME@sha256:…  ASSAY_REGISTRY=ADDRESS  [ASSAY_DIRECTORY=/models/model]  [ASSAY_STACK=vllm]  entrypoint.py [ARGUMENTS…]

ASSAY_REGISTRY is a directory, or an address such as oci://HOST/PATH. ARGUMENTS are added to the server's. A restart with the directory on a
volume hashes what is there and copies nothing.
"""

import os
import sys

import assay
from assay.errors import AssayError


def main() -> None:
    reference, registry = os.environ["ASSAY_REFERENCE"], os.environ["ASSAY_REGISTRY"]
    if "@sha256:" not in reference:
        sys.exit(f"{reference}: a tag can move; deploy a digest, NAME@sha256:…")
    try:
        pulled = assay.pull(
            reference,
            os.environ.get("ASSAY_DIRECTORY", "/models/model"),
            registry=registry,
            stack=os.environ.get("ASSAY_STACK", "vllm"),
        )
    except AssayError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    assert pulled.serving is not None
    command = [*pulled.serving.command, *sys.argv[1:]]
    print(f"serving {pulled.serving.name}@{pulled.digest}: {command}", flush=True)
    os.execvpe(command[0], command, os.environ | pulled.serving.environment)


if __name__ == "__main__":
    main()
