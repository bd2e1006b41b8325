"""TensorRT-LLM: `trtllm-serve` on the artifact's directory, by its PyTorch backend.

The key/value cache's type is no option of the command; it is in a file of options. Source: TensorRT-LLM (2026)
`commands/common_llm_options.py`, `commands/serve.py`.
"""

from __future__ import annotations

import yaml

from assay.serving import Served, ServingFiles
from assay.serving.vllm import OFFLINE

_OPTIONS = "options.yaml"


def serving_files(served: Served) -> ServingFiles:
    """A file of options where the key/value cache is quantized; else nothing beside the artifact."""
    files = {_OPTIONS: yaml.safe_dump({"kv_cache_config": {"dtype": "fp8"}}).encode()} if served.quantized_cache else {}
    options = ("--extra_llm_api_options", str(served.output / _OPTIONS)) if files else ()
    command = ("trtllm-serve", served.at, "--backend", "pytorch", "--port", str(served.port), *options)
    note = (
        f"clients call the model by the path {served.at}: not every release of trtllm-serve can give it another name."
    )
    return ServingFiles(command, files, environment=OFFLINE, notes=(note,))
