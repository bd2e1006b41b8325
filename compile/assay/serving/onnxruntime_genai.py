"""onnxruntime-genai: a library without a server of its own. What is written loads the artifact with it and nothing else.

Over HTTP the same artifact is served by the stack bentoml.
"""

from __future__ import annotations

from assay.serving import Served, ServingFiles
from assay.serving.template import template

_SCRIPT = "generate.py"


def serving_files(served: Served) -> ServingFiles:
    """A script that continues a prompt, which reads serving.json beside it."""
    files = {_SCRIPT: template("onnxruntime_genai.py")}
    note = "onnxruntime-genai has no server: this continues one prompt. The stack bentoml serves the same artifact over HTTP."
    return ServingFiles(("python", str(served.output / _SCRIPT), "The capital of France is"), files, notes=(note,))
