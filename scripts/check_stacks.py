"""Check what is written for KServe, Truss and BentoML with their own packages, each in an environment of its own.

    .venv/bin/python scripts/check_stacks.py [--kserve VENV] [--truss VENV] [--bentoml VENV --model DIRECTORY]

They cannot live with the packages that Assay is pinned to: pip install kserve (0.21), truss (0.18.36), bentoml (1.4.40) with
onnxruntime-genai. KServe's service is held against the types of its API client, Truss's config is loaded by TrussConfig, and BentoML
serves DIRECTORY, an artifact for onnxruntime-genai, and answers over HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from assay.files import readable_json
from assay.serving.make import Options, Serving, make_serving

PROMPT = "The capital of France is"
PORT = 8793
KSERVE = """
import re, sys, yaml, kserve.models, kubernetes.client.models as kubernetes
PLAIN = {"str": str, "int": int, "bool": bool, "float": float, "object": object}
def check(value, kind, where):
    if found := re.fullmatch(r"[Ll]ist\\[(.*)\\]", kind):
        for index, item in enumerate(value):
            check(item, found[1], f"{where}[{index}]")
    elif found := re.fullmatch(r"[Dd]ict[(\\[]str, (.*)[)\\]]", kind):
        for key, item in value.items():
            check(item, found[1], f"{where}.{key}")
    elif kind in PLAIN:
        assert isinstance(value, PLAIN[kind]), (where, value, kind)
    else:
        known = getattr(kserve.models, kind, None) or getattr(kubernetes, kind)
        names = {key: name for name, key in known.attribute_map.items()}
        assert set(value) <= set(names), (where, set(value) - set(names))
        for key, item in value.items():
            check(item, known.openapi_types[names[key]], f"{where}.{key}")
        known(**{names[key]: item for key, item in value.items()})
check(yaml.safe_load(open(sys.argv[1])), "V1beta1InferenceService", "")
"""
TRUSS = """
import sys
from pathlib import Path
from truss.base.truss_config import TrussConfig
config = TrussConfig.from_yaml(Path(sys.argv[1]))
assert config.docker_server.start_command.startswith("vllm serve ") and config.weights.root[0].source == "s3://bucket/m"
"""


def checkpoint(directory: Path) -> Path:
    """A directory with a checkpoint's manifest and configuration, and no weights to speak of."""
    manifest = {
        "version": 1,
        "name": "m",
        "target": "compressed-tensors",
        "precision": "bfloat16",
        "scheme": "FP8_DYNAMIC",
    }
    files = {"manifest.json": manifest, "config.json": {"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}}
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(readable_json(content))
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def check(package: str, environment: Path, code: str, file: str) -> None:
    """Run code of ours in an environment, on what is written for a stack; ends here when it fails."""
    with tempfile.TemporaryDirectory() as place:
        made = make_serving(checkpoint(Path(place) / "m"), package, options=Options(storage="s3://bucket/m"))
        subprocess.run([environment / "bin/python", "-c", code, made.directory / file], check=True)
    print(f"{package}: {file} is of the form that the package takes")


def serve(environment: Path, model: Path) -> None:
    """Start BentoML on an artifact, ask it which bytes answer, and for a text."""
    with tempfile.TemporaryDirectory() as place:
        made = make_serving(model, "bentoml", Path(place) / "service", Options(port=PORT))
        path = {
            "PATH": f"{environment.resolve()}/bin:{os.environ['PATH']}",
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": place,
        }
        with subprocess.Popen([made.directory / "serve.sh"], env=os.environ | path, start_new_session=True) as server:
            try:
                text = answered(server, made)
            finally:
                os.killpg(server.pid, signal.SIGTERM)
    print(f"bentoml: served {made.name}@{made.digest}, which continued {PROMPT!r} with {text!r}")


def answered(server: subprocess.Popen[bytes], made: Serving) -> str:
    """What the server says to the prompt."""
    for _ in range(120):
        try:
            about = json.loads(post("about", {}))
            break
        except (urllib.error.URLError, OSError):
            if server.poll() is not None:
                sys.exit(f"bentoml ended with {server.returncode}")
            time.sleep(1)
    else:
        sys.exit("bentoml did not come up within two minutes")
    if about != {"name": made.name, "digest": made.digest}:
        sys.exit(f"bentoml serves {about}")
    return post("generate", {"prompt": PROMPT, "max_tokens": 12}).decode()


def post(name: str, body: dict[str, object]) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/{name}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for package in ("kserve", "truss", "bentoml"):
        parser.add_argument(f"--{package}", type=Path, metavar="VENV")
    parser.add_argument("--model", type=Path, metavar="DIRECTORY")
    arguments = parser.parse_args()
    if arguments.kserve:
        check("kserve", arguments.kserve, KSERVE, "inferenceservice.yaml")
    if arguments.truss:
        check("truss", arguments.truss, TRUSS, "config.yaml")
    if arguments.bentoml:
        if arguments.model is None:
            parser.error("--bentoml needs --model DIRECTORY")
        serve(arguments.bentoml, arguments.model)


if __name__ == "__main__":
    main()
