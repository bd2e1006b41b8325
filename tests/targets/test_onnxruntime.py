"""Encoders compiled for ONNX Runtime compute what the quantizer's numbers say, and are the same bytes each time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from tiny_encoders import save_encoder

from assay.artifact import directory_digest
from assay.child import run_module
from assay.errors import AssayError
from assay.models.checkpoint import Checkpoint
from assay.models.encoders import encoder_shape
from assay.progress import Progress
from assay.quantize.activations import quantize_inputs
from assay.quantize.model import quantize_model
from assay.quantize.store import LayerStore, QuantizedLayer
from assay.recipe import OnnxRuntime, Quantize, Recipe
from assay.targets import onnxruntime as target
from assay.targets import onnxruntime_export

pytestmark = pytest.mark.slow

FAMILIES = ("BertModel", "RobertaModel", "DistilBertModel", "ModernBertModel", "BertForSequenceClassification")
SCHEMES = (("W8A8", None), ("W8A8_STATIC", None), ("W8A16", 32), ("W4A16", 32), ("W4A16_ASYM", 32))


class Encoders:
    """Tiny encoders and their compiled baselines, each made once."""

    def __init__(self, root: Path) -> None:
        self._root, self._made = root, dict[str, tuple[Checkpoint, Path]]()

    def __call__(self, name: str) -> tuple[Checkpoint, Path]:
        if name not in self._made:
            checkpoint = Checkpoint(save_encoder(self._root / name / "model", name), encoder_shape)
            target.build_baseline(checkpoint, self._root / name / "baseline")
            self._made[name] = (checkpoint, self._root / name / "baseline")
        return self._made[name]


def export_here(what: str, module: str, *arguments: str, seconds: float) -> str:
    """The exporter in this process: a new one for each of many tiny models would mostly import."""
    assert (what, module) == ("transformers' ONNX exporter", onnxruntime_export.__name__) and seconds > 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        onnxruntime_export.main()
    return ""


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoders]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "run_module", export_here)
        yield Encoders(tmp_path_factory.mktemp("encoders"))


def texts() -> dict[str, torch.Tensor]:
    """Three texts of different lengths."""
    tokens = torch.randint(3, 512, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) < torch.tensor([[40], [23], [31]])).long()
    return {"input_ids": tokens * mask + (1 - mask), "attention_mask": mask}


def run(directory: Path, inputs: Mapping[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    given = {name: value.numpy() for name, value in inputs.items()}
    wanted = {one.name for one in session.get_inputs()}
    if "token_type_ids" in wanted:
        given["token_type_ids"] = np.zeros_like(given["input_ids"])
    return session.run(None, given)


def reference(
    checkpoint: Checkpoint, quantized: QuantizedLayer | None, inputs: Mapping[str, torch.Tensor]
) -> list[Any]:
    """What transformers computes with the dequantized weights and with inputs as the schemes quantize them."""
    name = checkpoint.shape.architecture.class_name
    model = getattr(transformers, name).from_pretrained(checkpoint.directory, dtype=torch.float32).eval()
    for module, chosen in quantized.modules.items() if quantized else ():
        linear = model.get_submodule(module)
        linear.weight.data = chosen.weight.dequantize()
        if chosen.weight.scheme.activations is not None:
            linear.register_forward_pre_hook(
                lambda _, given, chosen=chosen: quantize_inputs(
                    given[0], chosen.weight.scheme.activations, chosen.input_scale
                )
            )
    for tensor, value in quantized.tensors.items() if quantized else ():
        model.state_dict()[tensor].copy_(value)
    with torch.no_grad():
        output = model(**inputs)
    if "logits" in output:
        return [output.logits.numpy()]
    hidden, mask = output.last_hidden_state, inputs["attention_mask"][..., None].float()
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return [pooled.numpy(), (hidden * mask).numpy()]


def difference(found: list[Any], expected: list[Any], mask: torch.Tensor) -> float:
    """Root mean square of the difference over that of the numbers; of hidden states where there is a token."""
    tokens = mask[..., None].numpy()
    pairs = [[one * tokens if one.ndim == 3 else one for one in pair] for pair in zip(found, expected, strict=True)]
    return max(float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean())) for a, b in pairs)


def quantize(checkpoint: Checkpoint, directory: Path, scheme: str, group_size: int | None, **more: Any) -> Any:
    values = {"method": "rtn", "scheme": scheme, "group_size": group_size} | more
    recipe = Recipe.model_construct(
        quantize=TypeAdapter(Quantize).validate_json(json.dumps(values)),
        target=OnnxRuntime(format="onnxruntime", accuracy_level=0),
    )
    store = LayerStore(directory)
    tokens = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(1))
    quantize_model(checkpoint, tokens, recipe.quantize, store, Progress())
    return recipe, store.read_all(checkpoint.shape.layers + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_baseline_computes_what_transformers_does(encoders: Encoders, name: str) -> None:
    checkpoint, baseline = encoders(name)
    inputs = texts()
    assert difference(run(baseline, inputs), reference(checkpoint, None, inputs), inputs["attention_mask"]) < 1e-5


# A weight-only scheme is exact but for the order of sums; of quantized inputs a few round to the other side, one level off.
BOUNDS = {"W8A8": 3e-3, "W8A8_STATIC": 3e-3, "W8A16": 1e-5, "W4A16": 1e-5, "W4A16_ASYM": 1e-5}


def assert_told(facts: Mapping[str, Any], directory: Path) -> None:
    """The manifest tells the tensors that ONNX Runtime finds."""
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    types = {"int64": "tensor(int64)", "float32": "tensor(float)"}
    for told, found in ((facts["inputs"], session.get_inputs()), (facts["outputs"], session.get_outputs())):
        assert [(row["name"], types[row["dtype"]], row["shape"]) for row in told] == [
            (one.name, one.type, one.shape) for one in found
        ]
        assert all(row["shape"][0] == "batch" for row in told)


@pytest.mark.parametrize(("scheme", "group_size"), SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_candidate_computes_what_its_numbers_say(
    encoders: Encoders, tmp_path: Path, name: str, scheme: str, group_size: int | None
) -> None:
    checkpoint, baseline = encoders(name)
    recipe, quantized = quantize(checkpoint, tmp_path / "layers", scheme, group_size)
    realization = target.build_candidate(checkpoint, quantized, recipe, baseline, tmp_path / "out")
    assert {row["scheme"] for row in realization.layers} == {scheme}
    assert_told(realization.facts, tmp_path / "out")
    inputs = texts()
    mask, found = inputs["attention_mask"], run(tmp_path / "out", inputs)
    error = difference(found, reference(checkpoint, quantized, inputs), mask)
    assert error < BOUNDS[scheme]
    assert error < 0.5 * difference(found, reference(checkpoint, None, inputs), mask), (
        "nearer to its numbers than to floats"
    )


def test_codes_are_unsigned_where_products_of_bytes_may_saturate(
    encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, baseline = encoders("BertModel")
    outputs: dict[str, list[Any]] = {}
    for scheme in ("W8A8", "W8A8_STATIC"):
        recipe, quantized = quantize(checkpoint, tmp_path / scheme, scheme, None)
        for sets in ([], ["avx512_vnni"]):
            monkeypatch.setattr(target, "cpu_facts", lambda sets=sets: {"instruction_sets": sets})
            out = tmp_path / f"{scheme}{len(sets)}"
            realization = target.build_candidate(checkpoint, quantized, recipe, baseline, out)
            kind = "int8" if sets else "uint8"
            assert realization.facts["weight_codes"].startswith(f"{kind}: ")
            instructions = realization.requires.get("instruction_sets", [])
            assert instructions == (["amx_int8|asimd|avx512_vnni|avx_vnni"] if sets else [])
            codes = [value for value in ir.load(out / "model.onnx").graph.initializers if value.endswith("weight_Q8")]
            values = ir.load(out / "model.onnx").graph.initializers[codes[0]].const_value
            assert values is not None and values.dtype == getattr(ir.DataType, kind.upper())
            outputs[kind] = run(out, texts())
        assert difference(outputs["uint8"], outputs["int8"], texts()["attention_mask"]) < 1e-3


def test_a_text_is_the_same_whatever_its_batch(encoders: Encoders, tmp_path: Path) -> None:
    checkpoint, baseline = encoders("BertModel")
    recipe, quantized = quantize(checkpoint, tmp_path / "layers", "W8A8", None)
    target.build_candidate(checkpoint, quantized, recipe, baseline, tmp_path / "out")
    inputs = texts()
    together = run(tmp_path / "out", inputs)[0]
    alone = run(tmp_path / "out", {name: value[:1] for name, value in inputs.items()})[0]
    np.testing.assert_allclose(together[0], alone[0], atol=5e-3)


def test_what_a_transform_moved_is_in_the_graph(encoders: Encoders, tmp_path: Path) -> None:
    checkpoint, baseline = encoders("BertModel")
    more = {"transform": "smoothquant", "strength": 0.5}
    recipe, quantized = quantize(checkpoint, tmp_path / "layers", "W8A8", None, **more)
    assert quantized.tensors
    target.build_candidate(checkpoint, quantized, recipe, baseline, tmp_path / "out")
    inputs = texts()
    found = run(tmp_path / "out", inputs)
    assert difference(found, reference(checkpoint, quantized, inputs), inputs["attention_mask"]) < BOUNDS["W8A8"]


def test_modules_left_in_floats_stay_so(encoders: Encoders, tmp_path: Path) -> None:
    checkpoint, baseline = encoders("BertModel")
    more = {"overrides": [{"match": "*.output.dense", "scheme": "none"}, {"match": "*.query", "scheme": "W8A8_STATIC"}]}
    recipe, quantized = quantize(checkpoint, tmp_path / "layers", "W8A8", None, **more)
    realization = target.build_candidate(checkpoint, quantized, recipe, baseline, tmp_path / "out")
    kinds = {row["name"].rpartition("layer.0.")[2]: row["scheme"] for row in realization.layers if ".0." in row["name"]}
    assert (kinds["attention.self.query"], kinds["attention.self.key"], kinds["output.dense"]) == (
        "W8A8_STATIC",
        "W8A8",
        "none",
    )
    inputs = texts()
    found = run(tmp_path / "out", inputs)
    assert difference(found, reference(checkpoint, quantized, inputs), inputs["attention_mask"]) < BOUNDS["W8A8"]


def test_two_builds_are_the_same_bytes(encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, baseline = encoders("BertModel")
    # In a process of its own, as a job does it.
    monkeypatch.setattr(target, "run_module", run_module)
    target.build_baseline(checkpoint, tmp_path / "baseline")
    assert directory_digest(tmp_path / "baseline") == directory_digest(baseline)
    assert str(checkpoint.directory.parent).encode() not in (baseline / "model.onnx").read_bytes()
    recipe, quantized = quantize(checkpoint, tmp_path / "layers", "W8A8", None)
    for name in ("one", "two"):
        target.build_candidate(checkpoint, quantized, recipe, baseline, tmp_path / name)
    assert directory_digest(tmp_path / "one") == directory_digest(tmp_path / "two")


def test_pooling_is_as_declared(tmp_path: Path, encoders: Encoders) -> None:
    directory = save_encoder(tmp_path / "cls", pooling="cls")
    target.build_baseline(Checkpoint(directory, encoder_shape), tmp_path / "out")
    embedding, hidden = run(tmp_path / "out", texts())
    expected = hidden[:, 0] / np.linalg.norm(hidden[:, 0], axis=1, keepdims=True)
    np.testing.assert_allclose(embedding, expected, atol=1e-5)


def test_another_graph_than_the_checkpoints_is_not_trusted(encoders: Encoders, tmp_path: Path) -> None:
    checkpoint, baseline = encoders("BertModel")
    other = Checkpoint(save_encoder(tmp_path / "other", hidden_act="relu"), encoder_shape)
    recipe, quantized = quantize(checkpoint, tmp_path / "layers", "W8A8", None)
    changed = shutil.copytree(other.directory, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"] += 0.001
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        AssayError, match=r"made 0 products with the weight of encoder\.layer\.1\.output\.dense, not one"
    ):
        target.build_candidate(Checkpoint(changed, encoder_shape), quantized, recipe, baseline, tmp_path / "out")
