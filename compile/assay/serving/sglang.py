"""SGLang: the artifact's directory, and a command that forbids pickle. Source: SGLang's `srt/server_args.py` (2026)."""

from __future__ import annotations

from assay.serving import Served, ServingFiles
from assay.serving.vllm import OFFLINE


def serving_files(served: Served) -> ServingFiles:
    """Nothing beside the artifact."""
    cache = ("--kv-cache-dtype", "fp8_e4m3") if served.quantized_cache else ()
    command = (
        *("python", "-m", "sglang.launch_server", "--model-path", served.at, "--served-model-name", served.name),
        *("--load-format", "safetensors", *cache, "--port", str(served.port)),
    )
    return ServingFiles(command, environment=OFFLINE)
