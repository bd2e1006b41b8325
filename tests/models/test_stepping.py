"""A layer stopped at its Linears computes every product once, and goes on with the weights it finds then."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from assay.models.architectures import ARCHITECTURES
from assay.models.checkpoint import Checkpoint
from assay.models.decoder import Decoder
from assay.models.stepping import SteppedLayer

SHAPES = ((2, 24), (2, 24), (1, 24))


class Walk:
    """A family's first layer, with batches of hidden states and what the layer is called with."""

    def __init__(self, directory: Path) -> None:
        self.decoder = Decoder(Checkpoint(directory))
        row = self.decoder.architecture
        self.groups = [[row.module_path(name) for name in group] for group in self.decoder.checkpoint.shape.groups(0)]
        self.layer = self.decoder.layer(0)
        generator = torch.Generator().manual_seed(0)
        self.batches = [torch.randn(*shape, 64, generator=generator) for shape in SHAPES]
        self.calls = [self.decoder.layer_arguments(*shape)[0] for shape in SHAPES]

    def plain(self, layer: nn.Module) -> list[Tensor]:
        return [layer(batch, **call) for batch, call in zip(self.batches, self.calls, strict=True)]

    def stepped(self, stops: list[str]) -> SteppedLayer:
        return SteppedLayer(self.layer, stops, self.batches, self.calls)


@pytest.fixture(params=[row.model_type for row in ARCHITECTURES.values()])
def walk(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Any:
    with torch.no_grad():
        yield Walk(tiny_model(request.param))


def count_calls(layer: nn.Module) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_every_linear_runs_once_a_batch_and_the_output_is_that_of_a_plain_forward(walk: Walk) -> None:
    expected, calls = walk.plain(copy.deepcopy(walk.layer)), count_calls(walk.layer)
    stepped = walk.stepped([group[0] for group in walk.groups])
    assert not calls
    for position, group in enumerate(walk.groups):
        assert set(calls) == {name for earlier in walk.groups[:position] for name in earlier}
        for (rows, length), found in zip(SHAPES, stepped.inputs(group[0]), strict=True):
            assert found.shape[1] == walk.layer.get_submodule(group[0]).in_features
            assert found.shape[0] < rows * length if ".experts." in group[0] else found.shape[0] == rows * length
        stepped.resume()
    assert calls == {name: len(SHAPES) for group in walk.groups for name in group}
    for found, wanted in zip(stepped.outputs(), expected, strict=True):
        assert torch.equal(found, wanted)


def test_weights_changed_while_it_waits_are_the_ones_that_count(walk: Walk) -> None:
    changed, originals = copy.deepcopy(walk.layer), copy.deepcopy(walk.layer)
    for group in walk.groups:
        for name in group:
            changed.get_submodule(name).weight.mul_(-0.5)
    seen: dict[str, list[Tensor]] = {group[0]: [] for group in walk.groups}
    for name, kept in seen.items():
        changed.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, kept=kept: kept.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
        )
    expected = walk.plain(changed)
    stepped = walk.stepped([group[0] for group in walk.groups])
    for group in walk.groups:
        # What a Linear is about to read has passed through the changed ones before it.
        for found, wanted in zip(stepped.inputs(group[0]), seen[group[0]], strict=True):
            assert torch.equal(found, wanted)
        for name in group:
            linear = walk.layer.get_submodule(name)
            linear.weight.data = linear.weight * -0.5
        stepped.resume()
    for found, wanted, old in zip(stepped.outputs(), expected, walk.plain(originals), strict=True):
        assert torch.equal(found, wanted)
        assert not torch.allclose(found, old)


@pytest.mark.parametrize("chosen", [[], [-1], [1, 2]], ids=str)
def test_fewer_stops_change_nothing(walk: Walk, chosen: list[int]) -> None:
    stops = [walk.groups[position][0] for position in chosen]
    expected = walk.plain(copy.deepcopy(walk.layer))
    stepped = walk.stepped(stops)
    for _ in stops:
        stepped.resume()
    for found, wanted in zip(stepped.outputs(), expected, strict=True):
        assert torch.equal(found, wanted)


def test_afterwards_the_layer_runs_freely_again(walk: Walk) -> None:
    stepped = walk.stepped([walk.groups[-1][0]])
    stepped.resume()
    outputs = stepped.outputs()
    for again in (walk.plain(walk.layer), walk.stepped([]).outputs()):
        for found, wanted in zip(again, outputs, strict=True):
            assert torch.equal(found, wanted)


def test_asking_for_another_linear_than_the_one_reached_is_a_defect(walk: Walk) -> None:
    first, last = walk.groups[0][0], walk.groups[-1][0]
    stepped = walk.stepped([first, last])
    with pytest.raises(RuntimeError, match=f"expected the layer to reach {last}, but it reached {first}"):
        stepped.inputs(last)
    with pytest.raises(RuntimeError, match=f"expected the layer to reach the end, but it reached {first}"):
        stepped.outputs()
    stepped.resume()
    stepped.resume()
    with pytest.raises(RuntimeError, match=f"expected the layer to reach {last}, but it reached the end"):
        stepped.inputs(last)
    assert len(stepped.outputs()) == len(SHAPES)


def test_an_error_in_the_layer_comes_out_as_it_is(walk: Walk) -> None:
    walk.batches[0] = torch.zeros(2, 24, 63)
    with pytest.raises(RuntimeError, match="63"):
        walk.stepped([walk.groups[-1][0]])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_expert_without_tokens_is_reached_all_the_same(
    make_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """Of two opposite pairs of experts each token picks one of each pair: never the fifth, to which the router gives zero."""
    with torch.no_grad():
        walk = Walk(make_model(tmp_path, family, num_experts=5, num_local_experts=5))
        router = walk.layer.get_submodule("mlp.gate").weight
        router.copy_(torch.stack([router[0], -router[0], router[2], -router[2], torch.zeros(64)]))
        expected = walk.plain(copy.deepcopy(walk.layer))
        stepped = walk.stepped([group[0] for group in walk.groups])
        tokens = {}
        for group in walk.groups:
            tokens[group[0]] = [len(one) for one in stepped.inputs(group[0])]
            stepped.resume()
        assert tokens["mlp.experts.4.gate_proj"] == tokens["mlp.experts.4.down_proj"] == [0, 0, 0]
        everywhere = [tokens[f"mlp.experts.{expert}.gate_proj"] for expert in range(5)]
        assert [sum(batch) for batch in zip(*everywhere, strict=True)] == [2 * rows * length for rows, length in SHAPES]
        for found, wanted in zip(stepped.outputs(), expected, strict=True):
            assert torch.equal(found, wanted)
