"""One arm of one speed block, in a fresh process: load, warm up each shape, time each request, report as JSON.

Run as `python -m assay_evals.speed.worker`; reads a Workload as JSON from standard input, writes one line to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from assay_evals.runtimes.base import EncoderRuntime, Runtime, open_encoder, open_runtime
from assay_evals.speed.energy import Counters, find_counters

# The first is computed from the whole prompt, the second from one token: these are the shapes that there are.
_WARM_UP_TOKENS = 2
REPETITIONS = 10


def peak_memory_bytes() -> int:
    """Peak resident set of this process so far (Linux VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    workload = json.load(sys.stdin)
    counters = find_counters(Path(workload["powercap"]))
    place = (workload["runtime"], Path(workload["directory"]))
    batches = [request["batch"] for request in workload["requests"] if "batch" in request]
    started = time.perf_counter()
    if batches:
        encoder = open_encoder(*place)
        report: dict[str, Any] = {"load_seconds": time.perf_counter() - started, "generations": []}
        report["encodings"] = [_encoding(encoder, batch) for batch in batches]
    else:
        runtime = open_runtime(*place)
        report = {"load_seconds": time.perf_counter() - started} | _generations(runtime, workload["requests"], counters)
    report["peak_memory_bytes"] = peak_memory_bytes()
    sys.stdout.write(json.dumps(report) + "\n")


def _encoding(encoder: EncoderRuntime, batch: list[list[int]]) -> dict[str, Any]:
    encoder.compute([ids[::-1] for ids in batch])
    seconds: list[float] = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        encoder.compute(batch)
        seconds.append(time.perf_counter() - started)
    return {"batch": len(batch), "tokens": len(batch[0]), "seconds": seconds}


def _generations(runtime: Runtime, requests: list[dict[str, Any]], counters: Counters) -> dict[str, Any]:
    report: dict[str, Any] = {"generations": [], "prefix_hits": []}
    for request in requests:
        prompt, new_tokens, prefix_tokens = request["prompt"], request["new_tokens"], request["prefix_tokens"]
        runtime.generate(prompt[::-1], min(_WARM_UP_TOKENS, new_tokens))
        report["generations"].append(_generation(runtime, counters, prompt, new_tokens))
        if prefix_tokens:
            runtime.generate(prompt[::-1], 1, cached=prefix_tokens)
            report["prefix_hits"].append(_prefix_hit(runtime, prompt, prefix_tokens))
    return report


def _generation(runtime: Runtime, counters: Counters, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    before = counters.read()
    generated = runtime.generate(prompt, new_tokens)
    return {
        "prompt_tokens": len(prompt),
        "token_seconds": generated.token_seconds,
        "first_token": generated.tokens[0],
        "joules": counters.joules_since(before),
    }


def _prefix_hit(runtime: Runtime, prompt: list[int], prefix_tokens: int) -> dict[str, Any]:
    generated = runtime.generate(prompt, 1, cached=prefix_tokens)
    return {
        "prompt_tokens": len(prompt),
        "prefix_tokens": prefix_tokens,
        "seconds": generated.token_seconds[0],
        "first_token": generated.tokens[0],
    }


if __name__ == "__main__":
    main()
