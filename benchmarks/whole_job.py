"""How long a whole compile takes, stage by stage, and how much memory it needs.

    .venv/bin/python benchmarks/whole_job.py [RECIPE]

Runs the recipe (the demo's, if none is named) in an empty workspace and publishes to an empty registry. Memory is the sum of the
resident sets of the process and its children, sampled every 0.1 s: shared pages count more than once, so it is an upper bound.
Prints one JSON object.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

DEMO = Path(__file__).parents[1] / "recipes/smollm2-135m-w4a16-ort.yaml"


def resident_bytes(process: psutil.Process) -> int:
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> None:
    recipe = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO
    with (
        tempfile.TemporaryDirectory() as directory,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        command = [Path(sys.executable).with_name("assay"), "compile", recipe, "--json", "--workspace", directory]
        command += ["--set", f"publish.registry={directory}/store"]
        started, peak = time.perf_counter(), 0
        with subprocess.Popen(command, stdout=out, stderr=err) as job:
            watched = psutil.Process(job.pid)
            while job.poll() is None:
                peak = max(peak, resident_bytes(watched))
                time.sleep(0.1)
        seconds = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        found, notes = json.loads(out.read()), err.read()
    if "verdict" not in found:
        raise SystemExit(found["error"])
    stages = {name: float(took) for name, took in re.findall(r"^\s*(.+): done in ([\d.]+) s$", notes, re.MULTILINE)}
    rows = (*found["verdict"]["gates"], *found["verdict"]["reported"])
    print(
        json.dumps(
            {
                "recipe": recipe.name,
                "verdict": found["verdict"]["verdict"],
                "seconds": round(seconds, 1),
                "stage_seconds": stages,
                "peak_memory_bytes": peak,
                "found": {row["metric"]: [row["difference"], row["interval"]] for row in rows},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
