"""Triton's configuration, parsed by Triton's own message definitions, and a repository from which ONNX Runtime loads."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import IntegrityError, NotSupportedError
from assay.serving.make import Options, make_serving
from assay.serving.pbtxt import Word, write_text

MakeArtifact = Callable[..., Path]


@pytest.fixture(scope="session")
def model_config() -> ModuleType:
    """model_config.proto as tritonclient ships it; its clients, and what they need, are not imported."""
    file = next(file for file in metadata.files("tritonclient") or [] if file.name == "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", Path(str(file.locate())))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def parse(model_config: ModuleType) -> Callable[[str], Any]:
    from google.protobuf import text_format

    return lambda text: text_format.Parse(text, model_config.ModelConfig())


def _config(directory: Path, parse: Callable[[str], Any]) -> Any:
    return parse((directory / "repository/m/config.pbtxt").read_text())


def test_a_checkpoint_is_served_by_vllm(make_artifact: MakeArtifact, parse: Callable[[str], Any]) -> None:
    artifact = make_artifact(cache=True)
    serving = make_serving(artifact, "triton")
    config = _config(serving.directory, parse)
    assert (config.name, config.backend, config.max_batch_size) == ("m", "vllm", 0)
    assert config.model_transaction_policy.decoupled
    assert [(tensor.name, tensor.optional) for tensor in config.input][:2] == [("text_input", False), ("stream", True)]
    assert config.parameters["assay_digest"].string_value == serving.digest
    assert json.loads((serving.directory / "repository/m/1/model.json").read_bytes()) == {
        "model": str(artifact),
        "load_format": "safetensors",
        "trust_remote_code": False,
        "kv_cache_dtype": "fp8",
    }


def test_a_model_of_tensors_is_told_whole(make_artifact: MakeArtifact, parse: Callable[[str], Any]) -> None:
    artifact = make_artifact(target="onnxruntime", scheme="W8A8")
    serving = make_serving(artifact, "triton")
    config = _config(serving.directory, parse)
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 32)
    assert [(tensor.name, list(tensor.dims)) for tensor in (*config.input, *config.output)] == [
        ("input_ids", [-1]),
        ("attention_mask", [-1]),
        ("last_hidden_state", [-1, 384]),
    ]
    model = serving.directory / "repository/m/1/model.onnx"
    assert model.is_dir() and model.resolve() == artifact and (model / "model.onnx").read_bytes() == b"graph"


def test_a_fixed_batch_is_part_of_the_shape(make_artifact: MakeArtifact, parse: Callable[[str], Any]) -> None:
    tensors = [{"name": "x", "dtype": "float16", "shape": [1, "sequence"]}]
    artifact = make_artifact(target="tensorrt", inputs=tensors, outputs=tensors)
    config = _config(make_serving(artifact, "triton").directory, parse)
    assert (
        config.max_batch_size == 0 and list(config.input[0].dims) == [1, -1] and not config.HasField("dynamic_batching")
    )
    assert (artifact.with_name("m.triton") / "repository/m/1/model.plan").read_bytes() == b"engine"


def test_the_pair_can_be_moved(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact(target="onnxruntime")
    make_serving(artifact, "triton")
    (tmp_path / "elsewhere").mkdir()
    for name in ("m", "m.triton"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert (tmp_path / "elsewhere/m.triton/repository/m/1/model.onnx/model.onnx").read_bytes() == b"graph"


def test_a_container_sees_the_artifact_where_it_is_mounted(make_artifact: MakeArtifact) -> None:
    artifact = make_artifact(target="onnxruntime")
    serving = make_serving(artifact, "triton", options=Options(at="/models/m"))
    assert str((serving.directory / "repository/m/1/model.onnx").readlink()) == "/models/m"
    assert not make_serving(artifact, "triton", options=Options(at="/models/m")).created


@pytest.mark.parametrize(
    ("about", "error"),
    [
        ({"inputs": []}, NotSupportedError),
        ({"inputs": [{"name": "x"}]}, IntegrityError),
        ({"inputs": [{"name": "x", "dtype": "complex64", "shape": []}]}, IntegrityError),
        ({"inputs": [{"name": 'x" }\nbackend: "python', "dtype": "int64", "shape": []}]}, IntegrityError),
    ],
)
def test_tensors_that_cannot_be_told(
    make_artifact: MakeArtifact, about: dict[str, Any], error: type[Exception]
) -> None:
    artifact = make_artifact(target="onnxruntime", **about)
    with pytest.raises(error, match=r"manifest\.json"):
        make_serving(artifact, "triton")
    assert not artifact.with_name("m.triton").exists()


@given(st.text(), st.text())
def test_any_text_is_written_so_that_it_is_read_back(parse: Callable[[str], Any], one: str, other: str) -> None:
    try:
        one.encode(), other.encode()
    except UnicodeEncodeError:
        return
    config = parse(write_text({"name": one, "parameters": [{"key": other, "value": {"string_value": one}}]}))
    assert config.name == one and config.parameters[other].string_value == one


def test_values_of_every_kind(parse: Callable[[str], Any]) -> None:
    group = {"count": 2, "kind": Word("KIND_CPU"), "gpus": []}
    config = parse(
        write_text(
            {"max_batch_size": -1, "instance_group": [group, group], "input": [{"optional": True, "dims": [1, 2]}]}
        )
    )
    assert config.max_batch_size == -1 and len(config.instance_group) == 2 and config.instance_group[1].kind == 2
    assert config.input[0].optional and list(config.input[0].dims) == [1, 2]
    with pytest.raises(TypeError, match="no place"):
        write_text({"name": 1.5})


@pytest.mark.slow
def test_onnx_runtime_loads_a_model_with_external_data_through_the_link(
    make_artifact: MakeArtifact, parse: Callable[[str], Any]
) -> None:
    """As Triton's backend does: by the path of model.onnx in the directory of that name. What the manifest leaves out, the graph tells."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime

    artifact = make_artifact(target="onnxruntime", inputs=None, outputs=None)
    with pytest.raises(IntegrityError, match="cannot be read as an ONNX model"):
        make_serving(artifact, "triton")
    shape, kind = ir.Shape([1024]), ir.TensorType(ir.DataType.FLOAT)
    given_value = ir.Value(name="x", shape=shape, type=kind)
    weight = ir.Value(
        name="w", shape=shape, type=kind, const_value=ir.tensor(np.arange(1024, dtype=np.float32), name="w")
    )
    node = ir.node("Add", [given_value, weight])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", shape, kind
    graph = ir.Graph([given_value], [node.outputs[0]], nodes=[node], initializers=[weight], opset_imports={"": 20})
    ir.save(ir.Model(graph, ir_version=10), artifact / "model.onnx", external_data="model.onnx.data")
    directory = make_serving(artifact, "triton").directory
    config = _config(directory, parse)
    told = [(tensor.name, list(tensor.dims), tensor.data_type) for tensor in (*config.input, *config.output)]
    assert told == [("x", [1024], 11), ("y", [1024], 11)], "TYPE_FP32"
    model = directory / "repository/m/1/model.onnx/model.onnx"
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.ones(1024, dtype=np.float32)})
    assert np.array_equal(result, np.arange(1024) + 1)
