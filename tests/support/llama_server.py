"""A real OpenAI-compatible server on loopback: llama.cpp's, out of the wheel xllamacpp, in a process of its own.

Run as `python llama_server.py MODEL.gguf SLOTS`: prints its address, and serves until its standard input ends.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTEXT_PER_SLOT = 1024


@contextmanager
def running_llama_server(model: Path, slots: int) -> Iterator[str]:
    """Its address, without /v1; up to `slots` requests are served at once."""
    command = [sys.executable, __file__, str(model), str(slots)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin and process.stdout
        address = process.stdout.readline().strip()
        try:
            assert address.startswith("http://127.0.0.1:"), "the server did not start"
            yield address
        finally:
            process.stdin.close()


def _serve(model: str, slots: int) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.model_alias = model, {"smollm2-135m"}
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.n_parallel, parameters.n_ctx = slots, slots * CONTEXT_PER_SLOT
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.endpoint_metrics = True
    server = xllamacpp.Server(parameters)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
