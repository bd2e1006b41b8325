"""Pulling for a machine and for a serving stack: what cannot be is refused before anything is copied, and the artifact stays whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import assay
from assay.errors import IntegrityError, NotSupportedError, UsageError

Assay = Callable[..., CompletedProcess[str]]
MakeRun = Callable[..., Path]
CHECKPOINT = {"model.safetensors": b"weights", "config.json": b"{}", "tokenizer.json": b"{}"}
NOWHERE = {"compute_capabilities": ["99.0"]}


@pytest.fixture
def assay_cli(request: pytest.FixtureRequest) -> Assay:
    """The command line, under a name that leaves `assay` to the module."""
    return request.getfixturevalue("assay")


@pytest.fixture
def publish(make_run: MakeRun, tmp_path: Path) -> Callable[..., str]:
    """Publish a small checkpoint to a registry at "store"; keywords are keys of its manifest. Returns its digest."""
    from assay.registry.publish import publish as publish_artifact

    def do(**about: Any) -> str:
        keys = {"target": "compressed-tensors", "scheme": "W8A8", "runtime": "transformers"} | about
        run = make_run(f"run{len(list(tmp_path.iterdir()))}", files=CHECKPOINT, about=keys)
        return publish_artifact(run / "artifact", run, tmp_path / "store", "small", ["latest"]).digest

    return do


def test_a_stack_gets_its_files_beside_the_verified_directory(
    publish: Callable[..., str], assay_cli: Assay, tmp_path: Path
) -> None:
    digest = publish()
    done = assay_cli("pull", "small", "models/m", "--registry", "store", "--for", "vllm", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    start = next(line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("start "))
    assert start.endswith(
        f"vllm serve {tmp_path}/models/m --served-model-name small small@{digest} --load-format safetensors --port 8000"
    )
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["m", "m.vllm"]
    assert assay_cli("verify", "models/m", "--digest", digest, cwd=tmp_path).returncode == 0
    again = assay_cli("pull", "small", "models/m", "--registry", "store", "--for", "vllm", "--json", cwd=tmp_path)
    found = json.loads(again.stdout)
    assert (found["created"], found["serving"]["created"], found["serving"]["digest"]) == (False, False, digest)
    assert found["serving"]["shell_command"] == start


def test_what_a_stack_cannot_serve_is_not_pulled(publish: Callable[..., str], tmp_path: Path) -> None:
    publish(layers=[{"name": "a", "shape": [8, 8], "scheme": "W8A8"}])
    with pytest.raises(NotSupportedError, match="take the INT8 weights for FP8"):
        assay.pull("small", tmp_path / "m", registry=tmp_path / "store", stack="tensorrt-llm")
    with pytest.raises(UsageError, match=r"assay serving .* --for kserve --storage"):
        assay.pull("small", tmp_path / "m", registry=tmp_path / "store", stack="kserve")
    (tmp_path / "m.vllm").mkdir()
    (tmp_path / "m.vllm/notes").touch()
    with pytest.raises(UsageError, match="holds other files"):
        assay.pull("small", tmp_path / "m", registry=tmp_path / "store", stack="vllm")
    assert not (tmp_path / "m").exists()


def test_what_this_machine_cannot_run_is_not_pulled_unless_asked(
    publish: Callable[..., str], assay_cli: Assay, tmp_path: Path
) -> None:
    publish(requires=NOWHERE)
    pull = ("pull", "small", tmp_path / "m", "--registry", tmp_path / "store")
    done = assay_cli(*pull)
    assert (
        done.returncode == 2
        and "small cannot run on this machine: it needs an NVIDIA GPU of compute capability 99.0" in done.stderr
    )
    assert not (tmp_path / "m").exists()
    assert assay_cli(*pull, "--any-host").returncode == 0 and (tmp_path / "m/manifest.json").is_file()
    assert assay_cli(*pull).returncode == 2, "an artifact that lies there already runs no better"


def test_what_was_not_checked_is_said(publish: Callable[..., str], assay_cli: Assay, tmp_path: Path) -> None:
    publish(requires={"packages": {"no-such-runtime": ">=1"}})
    done = assay_cli("pull", "small", tmp_path / "m", "--registry", tmp_path / "store")
    assert done.returncode == 0 and "no-such-runtime is not installed in this environment" in done.stdout


# import assay


def test_a_server_pulls_verifies_and_starts(publish: Callable[..., str], tmp_path: Path) -> None:
    digest = publish()
    pulled = assay.pull(f"small@{digest}", tmp_path / "m", registry=tmp_path / "store", stack="sglang")
    assert (pulled.directory, pulled.digest) == (tmp_path / "m", digest)
    assert pulled.serving is not None and pulled.serving.command[:3] == ("python", "-m", "sglang.launch_server")
    assert assay.verify(pulled.directory, digest).bundle_digest == pulled.receipt.bundle_digest
    (tmp_path / "m/config.json").write_text("{ }")
    with pytest.raises(IntegrityError, match="expected was"):
        assay.verify(pulled.directory, digest)


def test_importing_it_imports_nothing() -> None:
    code = "import sys, assay; print(*(name for name in sys.modules if name.partition('.')[0] not in sys.stdlib_module_names))"
    environment = os.environ | {"PYTHONPATH": str(Path(assay.__file__).parents[1])}
    # -S: without the site packages, whose .pth files import what they like.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["__main__", "assay"]
