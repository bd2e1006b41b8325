"""KServe: an InferenceService for its Hugging Face runtime, which serves by vLLM. Source: KServe 0.20, `v1beta1`, huggingfaceserver.

`--dtype` is said because the runtime would otherwise compute in float16 on a GPU, whatever the checkpoint is. KServe mounts container
images with the files below models/ (assay.serving.modelcar makes one), not ModelPacks.
"""

from __future__ import annotations

import re

import yaml

from assay.errors import UsageError
from assay.serving import Served, ServingFiles
from assay.serving.storage import checked_storage
from assay.serving.vllm import engine_arguments

_FILE = "inferenceservice.yaml"
# A Kubernetes name (RFC 1035 label); KServe adds up to 13 characters to it.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")


def serving_files(served: Served) -> ServingFiles:
    """inferenceservice.yaml."""
    storage, notes = checked_storage("kserve", served)
    if not _NAME.fullmatch(served.name):
        raise UsageError(
            f"{served.name!r} cannot name a Kubernetes object: a-z, 0-9 and dashes, at most 50, a letter first. Give one with --name."
        )
    options = engine_arguments(served)
    engine = [f"{option}={value}" for option, value in zip(options[::2], options[1::2], strict=True)]
    dtype = served.manifest.get("precision")
    model = {
        "modelFormat": {"name": "huggingface"},
        "storageUri": storage,
        "args": [
            f"--model_name={served.name}",
            "--backend=vllm",
            *([f"--dtype={dtype}"] if dtype in ("bfloat16", "float16", "float32") else []),
            *engine,
        ],
        "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
        "resources": {"limits": {"nvidia.com/gpu": "1"}, "requests": {"nvidia.com/gpu": "1"}},
    }
    service = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": served.name, "annotations": {"dev.assay.digest": served.digest}},
        "spec": {"predictor": {"model": model}},
    }
    files = {_FILE: yaml.safe_dump(service, sort_keys=False).encode()}
    notes += (
        "where vLLM does not know the model's architecture, KServe's runtime falls back to transformers: read its log.",
    )
    return ServingFiles(("kubectl", "apply", "-f", str(served.output / _FILE)), files, local=False, notes=notes)
