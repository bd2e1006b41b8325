"""Encoders compiled for ONNX Runtime compute what the quantizer's numbers say, and are the same bytes each time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from pydantic import TypeAdapter
from tiny_encoders import save_encoder

from assay.models.checkpoint import Checkpoint
from assay.models.encoders import encoder_shape
from assay.progress import Progress
from assay.quantize.activations import quantize_inputs
from assay.quantize.model import quantize_model
from assay.quantize.store import LayerStore, QuantizedLayer
from assay.recipe import OnnxRuntime, Quantize, Recipe
from assay.targets import onnxruntime as target

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


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return Encoders(tmp_path_factory.mktemp("encoders"))


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
    """Largest difference in units of the largest number; of hidden states where there is a token."""
    shown = [one * mask[..., None].numpy() if one.ndim == 3 else one for one in found]
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in zip(shown, expected, strict=True))


def quantize(checkpoint: Checkpoint, directory: Path, scheme: str, group_size: int | None, **more: Any) -> Any:
    values = {"method": "rtn", "scheme": scheme, "group_size": group_size} | more
    recipe = Recipe.model_construct(
        quantize=TypeAdapter(Quantize).validate_python(values), target=OnnxRuntime(format="onnxruntime")
    )
    store = LayerStore(directory)
    tokens = torch.randint(3, 512, (8, 32), generator=torch.Generator().manual_seed(1))
    quantize_model(checkpoint, tokens, recipe.quantize, store, Progress())
    return recipe, store.read_all(checkpoint.shape.layers + 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_baseline_computes_what_transformers_does(encoders: Encoders, name: str) -> None:
    checkpoint, baseline = encoders(name)
    inputs = texts()
    assert difference(run(baseline, inputs), reference(checkpoint, None, inputs), inputs["attention_mask"]) < 1e-4


@pytest.mark.parametrize(("scheme", "group_size"), SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_candidate_computes_what_its_numbers_say(
    encoders: Encoders, tmp_path: Path, name: str, scheme: str, group_size: int | None
) -> None:
    checkpoint, baseline = encoders(name)
    recipe, quantized = quantize(checkpoint, tmp_path / "layers", scheme, group_size)
    realization = target.build_candidate(checkpoint, quantized, recipe, baseline, tmp_path / "out")
    assert {row["scheme"] for row in realization.layers} == {scheme}
    inputs = texts()
    mask, found = inputs["attention_mask"], run(tmp_path / "out", inputs)
    error = difference(found, reference(checkpoint, quantized, inputs), mask)
    print(name, scheme, error, difference(found, reference(checkpoint, None, inputs), mask))
