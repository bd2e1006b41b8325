"""Quantize a whole decoder, layer by layer, each on the inputs that the quantized layers before it produce.

For every group of Linears that share an input, two things are accumulated over the calibration tokens: the Gram matrix X̃ᵀX̃ of
the inputs in the quantized model, and, where earlier errors are to be corrected, the drift (X − X̃)ᵀX̃ against the float model. The
drift is a regression with far fewer unknowns than there are tokens: half of the samples give it (docs/benchmarks.md), so the float
model is run on those alone. From them come the range weights, the GPTQ factor, the correction and the reported error; no other
forward pass is needed.

Each finished layer is written, whole and synced, before the next begins: a killed job resumes there and ends with the same bytes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from assay.models.checkpoint import Checkpoint
from assay.models.decoder import Decoder
from assay.models.stepping import SteppedLayer
from assay.progress import Progress
from assay.quantize.correction import corrected
from assay.quantize.gptq import factorize, gptq, output_error
from assay.quantize.ranges import find_grid
from assay.quantize.schemes import WeightScheme, assign_schemes
from assay.quantize.store import LayerStore, QuantizedModule
from assay.recipe import Gptq, Quantize

_TOKENS_PER_BATCH = 2048
_GRAM_BLOCK = 256
COMPARED_SHARE = 0.5


@dataclass(frozen=True)
class Drift:
    """How the inputs of the quantized model left those of the float model: moment = (X − X̃)ᵀX̃ and gram = X̃ᵀX̃ of the same tokens."""

    moment: Tensor
    gram: Tensor


@dataclass(frozen=True)
class Statistics:
    """Second moments of a Linear's calibration inputs: gram = X̃ᵀX̃ [in, in] over all tokens, and the drift where it is measured."""

    gram: Tensor
    drift: Drift | None
    tokens: int


def accumulate(quantized: Sequence[Tensor], original: Sequence[Tensor] | None) -> Statistics:
    """Statistics of inputs [tokens, in], in float32, batch by batch in order.

    original: the float model's inputs of the first batches, or None.
    """
    features = quantized[0].shape[1]
    gram, moment = torch.zeros(features, features), torch.zeros(features, features)
    drift: Drift | None = None
    for index, batch in enumerate(quantized):
        # The Gram matrix is symmetric: only its lower blocks are computed.
        for start in range(0, features, _GRAM_BLOCK):
            stop = start + _GRAM_BLOCK
            gram[start:, start:stop].addmm_(batch[:, start:].T, batch[:, start:stop])
        if original is not None and index < len(original):
            moment.addmm_((original[index] - batch).T, batch)
            if index == len(original) - 1:
                drift = Drift(moment, _symmetric(gram))
    return Statistics(_symmetric(gram), drift, sum(len(batch) for batch in quantized))


def _symmetric(lower: Tensor) -> Tensor:
    """The symmetric matrix whose lower triangle is given."""
    return lower.tril() + lower.tril(-1).T


@dataclass
class _Streams:
    """Hidden states of the calibration batches: in the quantized model, and of the first ones in the float model for the drift."""

    quantized: list[Tensor]
    original: list[Tensor] | None


class _Quantizer:
    """One job's decisions, applied group by group."""

    def __init__(self, checkpoint: Checkpoint, settings: Quantize) -> None:
        self.settings = settings
        self.schemes = assign_schemes(settings, checkpoint.shape).schemes
        self.scale_dtype = checkpoint.weight_dtype
        self.correction = settings.correction if isinstance(settings, Gptq) else 0.0

    def group(self, weights: dict[str, Tensor], statistics: Statistics) -> dict[str, QuantizedModule]:
        """Quantize Linears that share an input; weights: float32 [out, in] by full name."""
        by_scheme: dict[WeightScheme, list[str]] = {}
        for name in weights:
            by_scheme.setdefault(self.schemes[name], []).append(name)
        factor = factorize(statistics.gram, self.settings.damping) if isinstance(self.settings, Gptq) else None
        power = statistics.gram.diagonal() / statistics.tokens
        result: dict[str, QuantizedModule] = {}
        for scheme, names in by_scheme.items():
            goal = torch.cat([weights[name] for name in names])
            if statistics.drift is not None:
                goal = corrected(goal, statistics.drift.gram, statistics.drift.moment, self.correction)
            grid = find_grid(goal, scheme, self.settings.range, power, self.scale_dtype)
            rounded = grid.quantize(goal) if factor is None else gptq(goal, grid, factor)
            start = 0
            for name in names:
                stop = start + len(weights[name])
                part, aim = rounded.rows(start, stop), goal[start:stop]
                scale = output_error(aim, statistics.gram)
                error = output_error(aim - part.dequantize(), statistics.gram) / scale if scale > 0 else 0.0
                result[name] = QuantizedModule(part, error, None if factor is None else factor.damping)
                start = stop
        return {name: result[name] for name in weights}

    def layer(self, decoder: Decoder, index: int, streams: _Streams, calls: Calls) -> dict[str, QuantizedModule]:
        """Quantize one layer and move the streams past it."""
        layer, prefix = decoder.layer(index), decoder.layer_name(index)
        groups = [
            [name for name in group if f"{prefix}.{name}" in self.schemes] for group in decoder.architecture.linears
        ]
        groups = [group for group in groups if group]
        stops = [group[0] for group in groups]
        original = None
        if streams.original is not None:
            original = SteppedLayer(copy.deepcopy(layer), stops, streams.original, calls(index, streams.original))
        quantized = SteppedLayer(layer, stops, streams.quantized, calls(index, streams.quantized))
        modules: dict[str, QuantizedModule] = {}
        for group in groups:
            inputs = quantized.inputs(group[0])
            statistics = accumulate(inputs, original.inputs(group[0]) if original else None)
            done = self.group({f"{prefix}.{name}": _linear(layer, name).weight for name in group}, statistics)
            for name in group:
                _linear(layer, name).weight.data = done[f"{prefix}.{name}"].weight.dequantize()
            modules |= done
            quantized.resume()
            if original:
                original.resume()
        streams.quantized = quantized.outputs()
        if original:
            streams.original = original.outputs()
        return modules


Calls = Callable[[int, list[Tensor]], list[dict[str, Any]]]


def quantize_model(
    checkpoint: Checkpoint, tokens: Tensor, settings: Quantize, store: LayerStore, progress: Progress
) -> None:
    """Quantize every assigned Linear into the store; layers that it holds already are only run, not quantized again.

    tokens: int64 [samples, length] of calibration text.
    """
    decoder = Decoder(checkpoint)
    quantizer = _Quantizer(checkpoint, settings)
    layers, head = decoder.layer_count, decoder.architecture.head
    total = layers + (head in quantizer.schemes)
    finished = next((index for index in range(total) if not store.holds(index)), total)
    if finished == total:
        return
    with torch.no_grad(), progress.stage("quantize", total, finished) as advance:
        batches = list(decoder.embed(tokens).split(max(1, _TOKENS_PER_BATCH // tokens.shape[1])))
        compared = batches[: math.ceil(COMPARED_SHARE * len(batches))]
        streams = _Streams(batches, compared if quantizer.correction else None)
        arguments = {len(batch): decoder.layer_arguments(len(batch), tokens.shape[1]) for batch in batches}

        def calls(index: int, batches: list[Tensor]) -> list[dict[str, Any]]:
            return [arguments[len(batch)][index] for batch in batches]

        for index in range(layers):
            if index < finished:
                _rerun(decoder, index, store.read(index), streams, calls)
            else:
                store.write(index, quantizer.layer(decoder, index, streams, calls))
                advance()
        if head in quantizer.schemes:
            norm = decoder.final_norm()
            inputs = [norm(batch).flatten(0, 1) for batch in streams.quantized]
            originals = [norm(batch).flatten(0, 1) for batch in streams.original] if streams.original else None
            store.write(layers, quantizer.group({head: checkpoint.weight(head)}, accumulate(inputs, originals)))
            advance()


def _rerun(decoder: Decoder, index: int, modules: dict[str, QuantizedModule], streams: _Streams, calls: Calls) -> None:
    """Move the streams past a layer that an earlier run finished: the same products on the same numbers."""
    layer, prefix = decoder.layer(index), decoder.layer_name(index)
    if streams.original is not None:
        streams.original = SteppedLayer(layer, (), streams.original, calls(index, streams.original)).outputs()
    for name, module in modules.items():
        _linear(layer, name.removeprefix(f"{prefix}.")).weight.data = module.weight.dequantize()
    streams.quantized = SteppedLayer(layer, (), streams.quantized, calls(index, streams.quantized)).outputs()


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, layer.get_submodule(name))
