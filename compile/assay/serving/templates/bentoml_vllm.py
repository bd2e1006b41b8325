"""A BentoML service that serves the artifact that serving.json names by vLLM, whose OpenAI API is passed through."""

import json
from pathlib import Path

import bentoml

HERE = Path(__file__).parent
ABOUT = json.loads((HERE / "serving.json").read_bytes())
SERVER = json.loads((HERE / "server.json").read_bytes())


@bentoml.service(
    labels={"model": ABOUT["name"], "digest": ABOUT["digest"]},
    cmd=SERVER["command"],
    http={"proxy_port": SERVER["port"]},
    workers=1,
)
class Model:
    """Everything below /v1 is vLLM's."""
