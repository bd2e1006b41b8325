"""One arm of one speed block, in a fresh process: load, warm up each shape, time each request, report as JSON.

Run as `python -m assay_evals.speed.worker`; reads a Workload as JSON from standard input, writes one line to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from assay_evals.runtimes.base import open_runtime

_WARM_UP_TOKENS = 4


def peak_memory_bytes() -> int:
    """Peak resident set of this process so far (Linux VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    workload = json.load(sys.stdin)
    started = time.perf_counter()
    runtime = open_runtime(workload["runtime"], Path(workload["directory"]))
    load_seconds = time.perf_counter() - started
    generations: list[dict[str, object]] = []
    for request in workload["requests"]:
        prompt, new_tokens = request["prompt"], request["new_tokens"]
        runtime.generate(prompt[::-1], min(_WARM_UP_TOKENS, runtime.context_length - len(prompt)))
        seconds = runtime.generate(prompt, new_tokens).token_seconds
        generations.append({"prompt_tokens": len(prompt), "token_seconds": seconds})
    report = {"load_seconds": load_seconds, "peak_memory_bytes": peak_memory_bytes(), "generations": generations}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
