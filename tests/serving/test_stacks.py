"""What holds for every stack, and what each writes, read by the rules of who will read it."""

from __future__ import annotations

import json
import re
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from assay.artifact import directory_digest
from assay.errors import NotSupportedError, UsageError
from assay.registry.inspection import verify_directory
from assay.serving import CHECKPOINTS, STACKS
from assay.serving.compose import IMAGE
from assay.serving.make import Options, Serving, make_serving
from assay.targets import TARGETS

MakeArtifact = Callable[..., Path]
ROOT = Path(__file__).parents[2]
HELD = {"compressed-tensors": "FP8_DYNAMIC", "awq": "W4A16", "gptq": "W4A16", "modelopt": "FP8"}
DIGEST = "sha256:" + "ab" * 32
STORAGE = {"kserve": f"oci+native://registry.example/m@{DIGEST}", "truss": "s3://bucket/m"}
PAIRS = [
    (stack, target)
    for stack, row in STACKS.items()
    for target in row.formats
    if not (stack == "tensorrt-llm" and target in ("awq", "gptq"))
]


def options(stack: str, **changes: Any) -> Options:
    return Options(**({"storage": STORAGE.get(stack)} | changes))


def made(artifact: Path, stack: str, **changes: Any) -> Serving:
    return make_serving(artifact, stack, options=options(stack, **changes))


def everything(serving: Serving) -> str:
    texts = [
        path.read_text() for path in sorted(serving.directory.rglob("*")) if path.is_file() and not path.is_symlink()
    ]
    return "\n".join([*texts, serving.shell_command])


# Every stack


@pytest.mark.parametrize(("stack", "target"), PAIRS)
def test_the_artifact_is_left_as_it_is_and_named_by_its_digest(
    make_artifact: MakeArtifact, stack: str, target: str
) -> None:
    artifact = make_artifact(target=target, scheme=HELD.get(target, "W4A16"))
    before, digest = directory_digest(artifact), verify_directory(artifact).digest
    serving = made(artifact, stack)
    assert directory_digest(artifact) == before
    assert serving.directory == artifact.with_name(f"m.{stack}") and serving.digest == digest
    about = json.loads((serving.directory / "serving.json").read_bytes())
    assert (about["digest"], about["name"], about["command"]) == (digest, "m", list(serving.command))
    assert digest in everything(serving)


@pytest.mark.parametrize(("stack", "target"), PAIRS)
def test_nothing_loads_code_or_pickles_or_says_the_quantization_again(
    make_artifact: MakeArtifact, stack: str, target: str
) -> None:
    text = everything(made(make_artifact(target=target, scheme=HELD.get(target, "W4A16")), stack))
    assert not re.search(r"trust.remote.code(?!\": false)|--quantization|pickle|--load-format[= ]auto", text)
    if target in CHECKPOINTS and stack not in ("tensorrt-llm",):
        assert "safetensors" in text


@pytest.mark.parametrize("stack", [name for name, row in STACKS.items() if "compressed-tensors" in row.formats])
def test_the_cache_is_quantized_where_the_artifact_has_its_scales(make_artifact: MakeArtifact, stack: str) -> None:
    assert "fp8" not in everything(made(make_artifact("plain"), stack)).lower().replace("fp8_dynamic", "")
    assert "fp8" in everything(made(make_artifact("cached", cache=True), stack))


@pytest.mark.parametrize(("stack", "target"), PAIRS)
def test_the_same_again_changes_nothing(make_artifact: MakeArtifact, snapshot: Any, stack: str, target: str) -> None:
    artifact = make_artifact(target=target, scheme=HELD.get(target, "W4A16"))
    first = made(artifact, stack)
    before = snapshot(first.directory)
    second = made(artifact, stack)
    assert (first.created, second.created) == (True, False) and snapshot(first.directory) == before


def test_every_target_of_decoders_has_a_stack_that_serves_it() -> None:
    served = {target for row in STACKS.values() for target in row.formats}
    assert {name for name, row in TARGETS.items() if not row.encoders} <= served


def test_every_stack_is_in_the_help_and_in_the_documents() -> None:
    from assay.commands.options import StackOption

    (option,) = StackOption.__metadata__
    assert set(re.findall(r"[a-z][a-z-]+", option.help)) - {"or"} == set(STACKS)
    sections = re.findall(r"^## ([a-z-]+)$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(STACKS)


def test_the_example_starts_from_the_image_that_is_the_default() -> None:
    assert f"FROM {IMAGE}\n" in (ROOT / "docs/examples/serving/Dockerfile").read_text()


# What cannot be


def test_what_a_stack_cannot_load_names_those_that_can(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(target="onnxruntime-genai", scheme="W4A16")
    with pytest.raises(NotSupportedError) as refused:
        made(artifact, "vllm")
    assert (
        "compiled for onnxruntime-genai, and vllm serves what is compiled for compressed-tensors, awq, gptq and modelopt"
        in str(refused.value)
    )
    assert "can serve this artifact: onnxruntime-genai and bentoml" in str(refused.value)
    assert not artifact.with_name("m.vllm").exists()


def test_what_an_engine_misreads_is_refused_with_the_reason(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(scheme="W8A8")
    with pytest.raises(
        NotSupportedError, match=r"would take the INT8 weights for FP8.*can serve this artifact: vllm, sglang, triton"
    ):
        made(artifact, "tensorrt-llm")
    ragged = make_artifact("ragged", scheme="FP8_BLOCK", shape=(576, 1536))
    with pytest.raises(
        NotSupportedError, match=r"whole blocks of 128.*can serve this artifact: sglang and tensorrt-llm"
    ):
        made(ragged, "vllm")
    assert made(make_artifact("whole", scheme="FP8_BLOCK"), "vllm").created


@pytest.mark.parametrize(
    ("stack", "changes", "message"),
    [
        ("vlm", {}, "no serving stack 'vlm'; there are vllm, sglang"),
        ("vllm", {"storage": "s3://b/m"}, "--storage has no meaning"),
        ("vllm", {"image": "x"}, "--image has no meaning"),
        ("truss", {"modelcar": Path("x")}, "--modelcar has no meaning"),
        ("compose", {"image": "a b"}, "cannot be an image"),
        ("vllm", {"name": "../m"}, "cannot name a served model"),
        ("vllm", {"name": "a\nb"}, "cannot name a served model"),
        ("vllm", {"at": "models/m"}, "absolute path"),
        ("vllm", {"at": "/models\n/m"}, "absolute path"),
        ("kserve", {"storage": None}, "--storage ADDRESS"),
        ("kserve", {"storage": "oci+native://registry.example/m:latest"}, "a tag can move"),
        ("kserve", {"storage": "ftp://registry.example/m"}, "no address that kserve takes"),
        ("kserve", {"storage": "s3://b/m\nspec: {}"}, "no address that kserve takes"),
        ("kserve", {"name": "m_1"}, "cannot name a Kubernetes object"),
        ("truss", {"storage": "oci://registry.example/m"}, "no address that truss takes"),
    ],
)
def test_wrong_options_write_nothing(
    make_artifact: MakeArtifact, stack: str, changes: dict[str, Any], message: str
) -> None:
    artifact = make_artifact()
    with pytest.raises(UsageError, match=re.escape(message)):
        made(artifact, stack, **changes)
    assert [path.name for path in artifact.parent.iterdir()] == ["m"]


def test_other_files_are_kept_unless_given_up(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact, place = make_artifact(), tmp_path / "place"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        make_serving(artifact, "vllm", place)
    assert make_serving(artifact, "vllm", place, force=True).created
    assert sorted(path.name for path in place.iterdir()) == ["serve.sh", "serving.json"]


def test_nothing_is_written_into_the_artifact(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    (tmp_path / "link").symlink_to(artifact)
    for place in (artifact, artifact / "sub", tmp_path / "link/sub"):
        with pytest.raises(UsageError, match="nothing may be added"):
            make_serving(artifact, "vllm", place)


def test_what_asks_for_code_is_not_served(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact()
    (artifact / "config.json").write_text('{"auto_map": {"AutoModel": "m.py"}}')
    with pytest.raises(Exception, match="auto_map makes a runtime load code"):
        made(artifact, "vllm")


# vLLM, SGLang, TensorRT-LLM


def test_vllm_answers_to_the_name_and_to_the_digest(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact()
    serving = made(artifact, "vllm", port=9000)
    names = ("--served-model-name", "m", f"m@{serving.digest}")
    assert serving.command == ("vllm", "serve", str(artifact), *names, "--load-format", "safetensors", "--port", "9000")


def test_the_script_runs_the_command_and_adds_to_it(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """With a program in vLLM's place that tells its arguments, and a directory whose name is no plain word."""
    artifact = make_artifact().rename(tmp_path / "it's a $model")
    serving = made(artifact, "vllm")
    script = serving.directory / "serve.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/vllm"
    program.write_text('#!/bin/sh\nfor word in "$HF_HUB_OFFLINE" "$@"; do printf "%s\\n" "$word"; done\n')
    program.chmod(0o755)
    path = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run([script, "--max-model-len", "8 192"], capture_output=True, text=True, env=path, check=True)
    assert done.stdout.splitlines() == ["1", *serving.command[1:], "--max-model-len", "8 192"]
    shown = subprocess.run(
        ["sh", "-c", f"env {serving.shell_command}"], capture_output=True, text=True, env=path, check=True
    )
    assert shown.stdout.splitlines() == ["1", *serving.command[1:]]


def test_a_server_in_a_container_sees_the_artifact_elsewhere(make_artifact: MakeArtifact) -> None:
    serving = made(make_artifact(), "sglang", at="/models/m")
    assert "/models/m" in serving.command and str(serving.artifact) not in shlex.join(serving.command)


def test_tensorrt_llm_reads_the_type_of_the_cache_from_a_file(make_artifact: MakeArtifact) -> None:
    serving = made(make_artifact(target="modelopt", scheme="FP8", cache=True), "tensorrt-llm")
    file = Path(serving.command[serving.command.index("--extra_llm_api_options") + 1])
    assert yaml.safe_load(file.read_text()) == {"kv_cache_config": {"dtype": "fp8"}}


# Compose, Truss


def test_compose_mounts_the_artifact_read_only_beside_itself(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact()
    serving = made(artifact, "compose", image="vllm/vllm-openai@" + DIGEST)
    (service,) = yaml.safe_load((serving.directory / "compose.yaml").read_text())["services"].values()
    (volume,) = service["volumes"]
    assert (serving.directory / volume["source"]).resolve() == artifact and volume["read_only"] is True
    assert [*service["entrypoint"], *service["command"]][:3] == ["vllm", "serve", volume["target"]]
    assert service["image"].endswith(DIGEST) and service["labels"] == {"dev.assay.digest": serving.digest}


def test_compose_takes_a_path_as_it_is(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    serving = made(make_artifact().rename(tmp_path / "a $HOME: #b"), "compose")
    (service,) = yaml.safe_load((serving.directory / "compose.yaml").read_text())["services"].values()
    assert service["volumes"][0]["source"] == "../a $$HOME: #b"


def test_truss_says_when_its_source_can_change(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact()
    loose = made(artifact, "truss")
    assert any("does not verify what it loads" in note and loose.digest[7:] in note for note in loose.notes)
    fixed = make_serving(
        artifact, "truss", artifact.with_name("fixed"), options("truss", storage=f"s3://b/sha256-{loose.digest[7:]}")
    )
    assert not any("does not verify" in note for note in fixed.notes)
    server = yaml.safe_load((fixed.directory / "config.yaml").read_text())["docker_server"]
    assert shlex.split(server["start_command"])[:3] == ["vllm", "serve", "/models/model"]
