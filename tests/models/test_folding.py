"""Factors that a family's row says can be folded away leave every layer's output as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from assay.models.architectures import ARCHITECTURES
from assay.models.checkpoint import Checkpoint
from assay.models.decoder import Decoder
from assay.models.folding import apply_fold, spread
from assay.models.folds import Fold, layer_folds

pytestmark = pytest.mark.slow

MODELS: dict[str, tuple[str, dict[str, Any]]] = {row.model_type: (row.model_type, {}) for row in ARCHITECTURES.values()}
MODELS |= {
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama, no grouped queries": ("llama", {"num_key_value_heads": 4}),
    "qwen3_moe, biases, one dense layer": ("qwen3_moe", {"mlp_only_layers": [1], "attention_bias": True}),
    "granite, biases everywhere": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "phi3, one head of keys and values": ("phi3", {"num_key_value_heads": 1}),
}


class Layers:
    """The layers of a tiny model, with an input and what they make of it."""

    def __init__(self, directory: Path) -> None:
        self.decoder = Decoder(Checkpoint(directory))
        self.row, self.shape = self.decoder.architecture, self.decoder.checkpoint.shape
        self.arguments = self.decoder.layer_arguments(2, 32)
        self.generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(2, 32, 64, generator=self.generator)

    def run(self, index: int, layer: torch.nn.Module) -> Tensor:
        return layer(self.hidden, **self.arguments[index])

    def factors(self, fold: Fold) -> Tensor:
        """Between a half and four."""
        return torch.exp2(3 * torch.rand(fold.count, generator=self.generator) - 1)


@pytest.fixture
def layers(varied_model: Callable[[str, dict[str, Any]], Path], request: pytest.FixtureRequest) -> Any:
    with torch.no_grad():
        yield Layers(varied_model(*MODELS[request.param]))


everywhere = pytest.mark.parametrize("layers", MODELS, indirect=True)


@everywhere
def test_folding_changes_weights_and_not_the_output(layers: Layers) -> None:
    for index in range(layers.shape.layers):
        plain, together = layers.decoder.layer(index), layers.decoder.layer(index)
        expected = layers.run(index, plain)
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max())}
        for fold in layer_folds(layers.shape, index):
            layer, factors = copy.deepcopy(plain), layers.factors(fold)
            apply_fold(layer, layers.row, fold, factors)
            apply_fold(together, layers.row, fold, factors)
            for name in (fold.source, *fold.linears, *fold.others):
                path = layers.row.module_path(name)
                assert not torch.equal(layer.get_submodule(path).weight, plain.get_submodule(path).weight)
            torch.testing.assert_close(layers.run(index, layer), expected, **tolerance)
        torch.testing.assert_close(layers.run(index, together), expected, **tolerance)


@everywhere
def test_every_reader_counts(layers: Layers) -> None:
    """The output stays only if nothing that reads the source is left out of the fold."""
    for fold in layer_folds(layers.shape, 0):
        for name in (*fold.linears[-1:], *fold.others):
            layer, factors = layers.decoder.layer(0), layers.factors(fold)
            expected = layers.run(0, layer)
            apply_fold(layer, layers.row, fold, factors)
            layer.get_submodule(layers.row.module_path(name)).weight.mul_(spread(fold, factors))
            assert not torch.allclose(layers.run(0, layer), expected, rtol=1e-3, atol=1e-3)


@everywhere
def test_every_linear_has_a_fold_but_those_behind_no_module(layers: Layers) -> None:
    row = layers.row
    for index in range(layers.shape.layers):
        groups, folds = layers.shape.groups(index), layer_folds(layers.shape, index)
        missing = {name for group in groups for name in group} - {name for fold in folds for name in fold.linears}
        first, *_ = groups
        assert missing == (set() if row.attention_norm else {*first, *row.feed_forward[0]})
        for fold in folds:
            for name in fold.linears:
                assert len(spread(fold, layers.factors(fold))) == layers.shape.sizes[f"{row.layers}.{index}.{name}"][1]


@pytest.mark.parametrize("layers", ["llama"], indirect=True)
def test_heads_that_read_the_same_values_share_their_factors(layers: Layers) -> None:
    _, values, *_ = layer_folds(layers.shape, 0)
    assert (values.source, values.count, values.head_size, values.repeats) == ("self_attn.v_proj", 32, 16, 2)
    factors = torch.arange(32.0)
    first, second = factors[:16], factors[16:]
    assert torch.equal(spread(values, factors), torch.cat([first, first, second, second]))
