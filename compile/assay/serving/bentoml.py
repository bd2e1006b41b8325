"""BentoML: a service.py that loads the artifact's directory. Source: BentoML 1.4, `bentoml.service`, services with a command of their own.

A checkpoint is served by vLLM behind BentoML's proxy, with vLLM's own API; an onnxruntime-genai artifact by a method that streams text.
"""

from __future__ import annotations

from dataclasses import replace

from assay.files import readable_json
from assay.serving import Served, ServingFiles
from assay.serving.template import template
from assay.serving.vllm import OFFLINE, serve_command

_SERVICES = {"onnxruntime-genai": "bentoml_onnxruntime_genai.py"}
_SERVER = "server.json"


def serving_files(served: Served) -> ServingFiles:
    """service.py, which reads serving.json beside it."""
    target = str(served.manifest.get("target"))
    files = {"service.py": template(_SERVICES.get(target, "bentoml_vllm.py"))}
    command = ("bentoml", "serve", "service:Model", "--working-dir", str(served.output), "--port", str(served.port))
    if target in _SERVICES:
        return ServingFiles(command, files)
    behind = replace(served, port=served.port + 1)
    files[_SERVER] = readable_json({"command": list(serve_command(behind, served.at)), "port": behind.port})
    return ServingFiles(command, files, environment=OFFLINE)
