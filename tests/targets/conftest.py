"""Baselines and quantized modules of the tiny models, each made once, and the model that every artifact has to equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from assay.models.architectures import ARCHITECTURES
from assay.models.checkpoint import Checkpoint
from assay.models.experts import SeparateExperts
from assay.progress import Progress
from assay.quantize.activations import quantize_inputs
from assay.quantize.model import quantize_model
from assay.quantize.store import LayerStore, QuantizedLayer, QuantizedModule
from assay.recipe import Recipe
from assay.targets import TargetModule, load_target
from assay.targets.realized import Realization

TOKENS = torch.randint(1, 512, (4, 32), generator=torch.Generator().manual_seed(9))


def make_recipe(target: dict[str, Any], **quantize: Any) -> Recipe:
    values = {
        "version": 1,
        "name": "tiny",
        "model": {"source": "./model"},
        "calibration": {"source": "python-docs"},
        "quantize": {"method": "rtn", "range": "mse", "scheme": "W4A16", "group_size": 32} | quantize,
        "target": target,
        "evaluate": {"quality": [{"metric": "kl_divergence"}]},
        "gate": {"kl_divergence": {"max": 0.1}},
    }
    return Recipe.model_validate_json(json.dumps(values))


def with_linears(directory: Path) -> tuple[Any, dict[str, torch.nn.Linear]]:
    """transformers' float32 model, with every expert's Linears in the place of fused ones, and all Linears by the Hub's names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    row = ARCHITECTURES[type(model).__name__]
    for name, module in list(model.named_modules()):
        if row.experts and name.endswith(row.experts.path):
            model.set_submodule(name, SeparateExperts.like(module))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return model, {row.hub_name(name): module for name, module in linears.items()}


class Bench:
    """Everything that goes into an artifact, kept for the whole session."""

    def __init__(self, root: Path, models: Callable[[str], Path], genai_models: Callable[[str], Path]) -> None:
        self._root, self._models, self._genai_models = root, models, genai_models
        self._baselines: dict[tuple[str, str], Path] = {}
        self._quantized: dict[tuple[str, str], QuantizedLayer] = {}
        self._artifacts: dict[tuple[str, str], Path] = {}
        self.names = iter(range(1 << 20))

    def checkpoint(self, family: str) -> Checkpoint:
        """family: or the path of a model's directory."""
        return Checkpoint(Path(family) if "/" in family else self._models(family))

    def target(self, recipe: Recipe) -> TargetModule:
        return load_target(recipe.target.format)

    def fresh(self) -> Path:
        return self._root / f"directory-{next(self.names)}"

    def baseline(self, recipe: Recipe, family: str) -> Path:
        key = (recipe.target.format, family)
        if recipe.target.format == "onnxruntime-genai" and "." not in family:
            return self._genai_models(family)
        if key not in self._baselines:
            directory = self.fresh()
            self.target(recipe).build_baseline(self.checkpoint(family), directory)
            self._baselines[key] = directory
        return self._baselines[key]

    def quantized(self, recipe: Recipe, family: str) -> QuantizedLayer:
        key = (recipe.quantize.model_dump_json(), family)
        if key not in self._quantized:
            store = LayerStore(self.fresh())
            checkpoint = self.checkpoint(family)
            quantize_model(checkpoint, TOKENS, recipe.quantize, store, Progress())
            self._quantized[key] = store.read_all(checkpoint.shape.layers + 1)
        return self._quantized[key]

    def modules(self, recipe: Recipe, family: str) -> dict[str, QuantizedModule]:
        return dict(self.quantized(recipe, family).modules)

    def build(
        self, recipe: Recipe, family: str, modules: dict[str, QuantizedModule] | None = None
    ) -> tuple[Path, Realization]:
        directory = self.fresh()
        chosen = self.quantized(recipe, family) if modules is None else QuantizedLayer(modules)
        baseline = self.baseline(recipe, family)
        checkpoint = self.checkpoint(family)
        return directory, self.target(recipe).build_candidate(checkpoint, chosen, recipe, baseline, directory)

    def artifact(self, recipe: Recipe, family: str) -> Path:
        """What `build` makes of it; made once, never to be written to."""
        key = (recipe.model_dump_json(), family)
        if key not in self._artifacts:
            self._artifacts[key] = self.build(recipe, family)[0]
        return self._artifacts[key]

    def expected_logits(self, recipe: Recipe, family: str, tokens: list[int]) -> NDArray[np.float32]:
        """What transformers' float32 model says with the quantizer's numbers as its weights."""
        model, linears = with_linears(self._models(family))
        for name, module in self.modules(recipe, family).items():
            # A new parameter: the head of a tied model shares the embedding's, which stays as it is.
            linears[name].weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()

    def simulated_logits(self, recipe: Recipe, family: str, tokens: list[int]) -> NDArray[np.float32]:
        """The same where activations are quantized, too: by our own rule."""
        model, linears = with_linears(self._models(family))
        for name, module in self.modules(recipe, family).items():
            linears[name].weight.data = module.weight.dequantize()
            linears[name].register_forward_pre_hook(
                lambda _, inputs, scheme=module.weight.scheme.activations, scale=module.input_scale: quantize_inputs(
                    inputs[0], scheme, scale
                )
            )
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.fixture(scope="session")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[[str], Path],
    make_model: Callable[..., Path],
    genai_model: Callable[[str], Path],
) -> Bench:
    root = tmp_path_factory.mktemp("targets")

    def models(name: str) -> Path:
        """ "llama", or "llama.float16" for another dtype of the weights."""
        family, _, dtype = name.partition(".")
        if not dtype:
            return tiny_model(family)
        path = root / name
        return path if path.is_dir() else make_model(path, family, dtype=dtype)

    return Bench(root, models, genai_model)


@pytest.fixture(scope="session")
def recipe_for() -> Callable[..., Recipe]:
    """A recipe for a target's settings; every other argument is one of `quantize`."""
    return make_recipe
