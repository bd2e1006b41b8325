"""Docker Compose: vLLM's image with the artifact's directory mounted, read-only."""

from __future__ import annotations

import os

import yaml

from assay.serving import Served, ServingFiles
from assay.serving.vllm import OFFLINE, serve_command

# The vLLM release whose loaders the checkpoints are checked against.
IMAGE = "vllm/vllm-openai:v0.32.0"
_MOUNTED = "/model"
_FILE = "compose.yaml"
_HEALTHY = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/health', timeout=5)"


def serving_files(served: Served) -> ServingFiles:
    """compose.yaml; the artifact is named relative to it, so that both can be moved together."""
    source = served.at if served.at != str(served.directory) else os.path.relpath(served.directory, served.output)
    # Compose puts variables in the place of $NAME.
    source = source.replace("$", "$$")
    command = serve_command(served, _MOUNTED, host="0.0.0.0")
    service = {
        "image": served.image or IMAGE,
        "entrypoint": list(command[:2]),
        "command": list(command[2:]),
        "environment": OFFLINE,
        "labels": {"dev.assay.digest": served.digest},
        "volumes": [{"type": "bind", "source": source, "target": _MOUNTED, "read_only": True}],
        "ports": [f"{served.port}:{served.port}"],
        "ipc": "host",
        "deploy": {
            "resources": {"reservations": {"devices": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}}
        },
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _HEALTHY.format(port=served.port)],
            "interval": "10s",
            "start_period": "10m",
        },
    }
    content = yaml.safe_dump({"services": {"model": service}}, sort_keys=False)
    command = ("docker", "compose", "--file", str(served.output / _FILE), "up")
    image = service["image"]
    note = f"the image {image} is named by its tag: pin its digest with --image once you have tried it."
    return ServingFiles(
        command, {_FILE: content.encode()}, local=False, notes=() if "@sha256:" in str(image) else (note,)
    )
