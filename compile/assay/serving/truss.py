"""Truss: a config.yaml that mounts the artifact from where it is stored and starts vLLM. Source: the schema in truss 0.18 (TrussConfig).

Truss pulls from no OCI registry: the artifact's files have to lie at an address that it knows, as they are.
"""

from __future__ import annotations

import shlex

import yaml

from assay.serving import Served, ServingFiles
from assay.serving.compose import IMAGE
from assay.serving.storage import checked_storage
from assay.serving.vllm import OFFLINE, serve_command

_MOUNTED = "/models/model"


def serving_files(served: Served) -> ServingFiles:
    """config.yaml of a Truss without a model class: a container with a server of its own."""
    storage, notes = checked_storage("truss", served)
    config = {
        "model_name": served.name,
        "model_metadata": {"assay_digest": served.digest},
        "base_image": {"image": served.image or IMAGE},
        "weights": [{"source": storage, "mount_location": _MOUNTED}],
        "environment_variables": OFFLINE,
        "docker_server": {
            "start_command": shlex.join(serve_command(served, _MOUNTED, host="0.0.0.0")),
            "server_port": served.port,
            "predict_endpoint": "/v1/chat/completions",
            "readiness_endpoint": "/health",
            "liveness_endpoint": "/health",
        },
        "resources": {"accelerator": "H100"},
    }
    notes += ("resources.accelerator is H100: change it to what you have.",)
    files = {"config.yaml": yaml.safe_dump(config, sort_keys=False).encode()}
    return ServingFiles(("truss", "push", str(served.output)), files, local=False, notes=notes)
