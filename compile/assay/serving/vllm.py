"""vLLM: the artifact's directory is all that it loads; the command says which bytes clients get, and forbids pickle.

`--load-format auto` falls back to pickled `.bin` files, hence the explicit format. The quantization is in config.json, and a flag that
says it again can only contradict it. Source: vLLM 0.32 `engine/arg_utils.py`.
"""

from __future__ import annotations

from assay.serving import Served, ServingFiles

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def serving_files(served: Served) -> ServingFiles:
    """Nothing beside the artifact."""
    return ServingFiles(serve_command(served, served.at), environment=OFFLINE)


def serve_command(served: Served, directory: str, host: str | None = None) -> tuple[str, ...]:
    """`vllm serve` for a directory; the model answers to its name, and to its name with the digest."""
    names = ("--served-model-name", served.name, served.pinned)
    address = (*(("--host", host) if host else ()), "--port", str(served.port))
    return ("vllm", "serve", directory, *names, *engine_arguments(served), *address)


def engine_arguments(served: Served) -> tuple[str, ...]:
    """How vLLM's engine loads the artifact, wherever it is embedded."""
    cache = ("--kv-cache-dtype", "fp8") if served.quantized_cache else ()
    return ("--load-format", "safetensors", *cache)
