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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from assay.errors import AssayError
from assay.models.architectures import DecoderShape
from assay.models.checkpoint import Checkpoint
from assay.models.decoder import Decoder
from assay.models.folds import layer_folds
from assay.models.stepping import SteppedLayer
from assay.progress import Progress
from assay.quantize.activations import calibrate, quantize_inputs
from assay.quantize.correction import corrected
from assay.quantize.gptq import factorize, gptq, output_error
from assay.quantize.kv_cache import CacheRange
from assay.quantize.ranges import find_grid
from assay.quantize.schemes import ActivationScheme, WeightScheme, assign_schemes
from assay.quantize.store import LayerStore, QuantizedLayer, QuantizedModule
from assay.quantize.transforms import Surveyed, Transformed, find_factors, fold_into
from assay.quantize.weights import Grid
from assay.recipe import Gptq, Quantize

_TOKENS_PER_BATCH = 2048
_GRAM_BLOCK = 256
_CONSTANT = 1e-5
COMPARED_SHARE = 0.5
SURVEYED_SHARE = 0.25
FEWEST_TOKENS_PER_INPUT = 0.5


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


@dataclass(frozen=True)
class Compared:
    """The float model's inputs of the first batches, [tokens, in] each, and what a transform multiplied their channels by since, [in]."""

    inputs: Sequence[Tensor]
    columns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        return self.inputs[index] if self.columns is None else self.inputs[index] * self.columns


Seen = Callable[[Tensor], Tensor]


def accumulate(quantized: Sequence[Tensor], original: Compared | None, seen: Seen | None = None) -> Statistics:
    """Statistics of inputs [tokens, in], in float32, batch by batch in order.

    seen: what the Linear makes of its inputs before it multiplies.
    """
    features = quantized[0].shape[1]
    gram, moment = torch.zeros(features, features), torch.zeros(features, features)
    drift: Drift | None = None
    for index, raw in enumerate(quantized):
        batch = seen(raw) if seen else raw
        # The Gram matrix is symmetric: only its lower blocks are computed.
        for start in range(0, features, _GRAM_BLOCK):
            stop = start + _GRAM_BLOCK
            gram[start:, start:stop].addmm_(batch[:, start:].T, batch[:, start:stop])
        if original is not None and index < len(original):
            moment.addmm_((original[index] - batch).T, batch)
            if index == len(original) - 1:
                drift = Drift(moment, _mirror_(gram.clone()))
    return Statistics(_mirror_(gram), drift, sum(len(batch) for batch in quantized))


def _mirror_(lower: Tensor) -> Tensor:
    """Copy what is below the diagonal to above it, block by block."""
    for start in range(0, len(lower), _GRAM_BLOCK):
        stop = start + _GRAM_BLOCK
        block = lower[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).T)
        lower[start:stop, stop:].copy_(lower[stop:, start:stop].T)
    return lower


@dataclass
class _Streams:
    """Hidden states of the calibration batches: in the quantized model, and of the first ones in the float model for the drift."""

    quantized: list[Tensor]
    original: list[Tensor] | None


class _Quantizer:
    """One job's decisions, applied group by group."""

    def __init__(self, checkpoint: Checkpoint, settings: Quantize) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.schemes = assign_schemes(settings, checkpoint.shape).schemes
        self.scale_dtype = checkpoint.weight_dtype
        self.correction = settings.correction if isinstance(settings, Gptq) else 0.0

    def group(
        self,
        weights: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        compared: Compared | None,
        expert: bool = False,
    ) -> tuple[dict[str, QuantizedModule], list[str]]:
        """Quantize Linears that share an input. Returns them and notes on fallbacks.

        weights: float32 [out, in] by full name.  inputs: what they are given, [tokens, in] for each batch.  compared: in the float model.
        expert: whether a router decides which tokens they see.
        """
        alike: dict[ActivationScheme | None, list[str]] = {}
        for name in weights:
            alike.setdefault(self.schemes[name].activations, []).append(name)
        result: dict[str, QuantizedModule] = {}
        notes: list[str] = []
        for activations, names in alike.items():
            input_scale, seen = None, None
            if activations is not None:
                if activations.calibrated:
                    input_scale = calibrate(inputs, activations, self.settings.range, self.scale_dtype)
                seen = _quantizing(activations, input_scale)
            statistics = accumulate(inputs, compared, seen)
            few = expert and statistics.tokens < FEWEST_TOKENS_PER_INPUT * inputs[0].shape[1]
            if few:
                notes.append(
                    f"{', '.join(names)}: of the calibration text, {statistics.tokens} tokens went to this expert, too few for "
                    f"{inputs[0].shape[1]} inputs: rounded to nearest, ranges by squared error of the weights."
                )
            else:
                _check_inputs(names[0], statistics.gram)
            result |= self._alike({name: weights[name] for name in names}, statistics, input_scale, few)
        return {name: result[name] for name in weights}, notes

    def _alike(
        self, weights: Mapping[str, Tensor], statistics: Statistics, input_scale: Tensor | None, few: bool
    ) -> dict[str, QuantizedModule]:
        """Quantize Linears that multiply the same numbers. few: they saw too few tokens for statistics to mean anything."""
        by_scheme: dict[WeightScheme, list[str]] = {}
        for name in weights:
            by_scheme.setdefault(self.schemes[name], []).append(name)
        factor = None
        if isinstance(self.settings, Gptq) and not few:
            factor = factorize(statistics.gram, self.settings.damping)
        power = statistics.gram.diagonal() / max(1, statistics.tokens)
        method = "mse" if few and self.settings.range == "activation_weighted" else self.settings.range
        result: dict[str, QuantizedModule] = {}
        for scheme, names in by_scheme.items():
            goal = torch.cat([weights[name] for name in names])
            if statistics.drift is not None:
                goal = corrected(goal, statistics.drift.gram, statistics.drift.moment, self.correction)
            rows = [len(weights[name]) for name in names]
            pieces = [goal] if scheme.shared_by_fused else goal.split(rows)
            grid = Grid.stack([find_grid(piece, scheme, method, power, self.scale_dtype) for piece in pieces])
            rounded = grid.quantize(goal) if factor is None else gptq(goal, grid, factor)
            start = 0
            for name, count in zip(names, rows, strict=True):
                stop = start + count
                part, aim = rounded.rows(start, stop), goal[start:stop]
                scale = output_error(aim, statistics.gram)
                error = output_error(aim - part.dequantize(), statistics.gram) / scale if scale > 0 else 0.0
                result[name] = QuantizedModule(part, error, None if factor is None else factor.damping, input_scale)
                start = stop
        return result

    def layer(self, decoder: Decoder, index: int, streams: _Streams, calls: Calls) -> QuantizedLayer:
        """Quantize one layer and move the streams past it."""
        layer = _Layer.of(decoder, index)
        prefix, notes = layer.prefix, list[str]()
        groups = layer.groups(self.schemes)
        stops = [layer.path(group[0]) for group in groups]
        original, held = None, [layer.module]
        if streams.original is not None:
            held.append(layer.float_twin(share=self.settings.transform == "none"))
            original = SteppedLayer(held[-1], stops, streams.original, calls(index, streams.original))
        transformed = Transformed()
        if self.settings.transform != "none":
            few = streams.quantized[: math.ceil(SURVEYED_SHARE * len(streams.quantized))]
            transformed = self.transform(layer, few, calls(index, few))
        arguments, cache = calls(index, streams.quantized), None
        if self.settings.kv_cache is not None:
            cache = CacheRange()
            arguments = [given | {"past_key_values": cache} for given in arguments]
        layer.quantize_inputs(self.schemes)
        quantized = SteppedLayer(layer.module, stops, streams.quantized, arguments)
        modules: dict[str, QuantizedModule] = {}
        for group, stop in zip(groups, stops, strict=True):
            weights = {f"{prefix}.{name}": layer.linear(name).weight for name in group}
            # A router decides which tokens an expert sees: the two models may differ in them, and no drift is measured.
            expert, columns = layer.is_expert(group[0]), transformed.columns.get(group[0])
            compared = None if original is None or expert else Compared(original.inputs(stop), columns)
            done, fallback = self.group(weights, quantized.inputs(stop), compared, expert)
            for name in group:
                layer.put(name, done[f"{prefix}.{name}"])
            modules |= done
            notes += fallback
            del weights
            quantized.resume()
            if original:
                original.resume()
            # A layer's weights are the most that a job holds: each leaves when all batches are past it.
            for name in group:
                for module in held:
                    module.get_submodule(layer.path(name)).weight = nn.Parameter(torch.empty(0), requires_grad=False)
        streams.quantized = quantized.outputs()
        if original:
            streams.original = original.outputs()
        scales = cache.scales(f"{prefix}.self_attn", self.scale_dtype) if cache else {}
        return QuantizedLayer(modules, transformed.tensors | scales, (*transformed.notes, *notes))

    def transform(self, layer: _Layer, batches: list[Tensor], arguments: list[dict[str, Any]]) -> Transformed:
        """Move factors per channel into a layer."""
        shape = self.checkpoint.shape
        groups = shape.groups(layer.index)
        survey: dict[str, Surveyed] = {}
        stepped = SteppedLayer(layer.module, [layer.path(group[0]) for group in groups], batches, arguments)
        for group in groups:
            found = Surveyed.of(stepped.inputs(layer.path(group[0])), layer.is_expert(group[0]))
            survey |= dict.fromkeys(group, found)
            stepped.resume()
        stepped.outputs()
        schemes = {
            name: self.schemes[full]
            for group in groups
            for name in group
            if (full := f"{layer.prefix}.{name}") in self.schemes
        }
        result = Transformed()
        known = {name for group in groups for name in group}
        for fold in layer_folds(shape, layer.index):
            needed = [*fold.linears, *({fold.source} & known)]
            if left := [name for name in needed if name not in schemes]:
                result.notes.append(
                    f"{layer.prefix}.{fold.source}: {self.settings.transform} was skipped, because {left[0]} is not quantized."
                )
                continue
            weights = {name: layer.linear(name).weight for name in fold.linears}
            factors = find_factors(fold, weights, survey, schemes, settings=self.settings, scale_dtype=self.scale_dtype)
            if factors is not None:
                changed, columns = fold_into(layer.module, shape.architecture, fold, factors, self.scale_dtype)
                result.tensors |= {f"{layer.prefix}.{name}": value for name, value in changed.items()}
                result.columns |= dict.fromkeys(fold.linears, columns)
        return result


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
            originals = [norm(batch).flatten(0, 1) for batch in streams.original or ()]
            compared = Compared(originals) if streams.original is not None else None
            done, notes = quantizer.group({head: checkpoint.weight(head)}, inputs, compared)
            store.write(layers, QuantizedLayer(done, notes=tuple(notes)))
            advance()


def _rerun(decoder: Decoder, index: int, done: QuantizedLayer, streams: _Streams, calls: Calls) -> None:
    """Move the streams past a layer that an earlier run finished: the same products on the same numbers."""
    layer = _Layer.of(decoder, index)
    if streams.original is not None:
        streams.original = SteppedLayer(layer.module, (), streams.original, calls(index, streams.original)).outputs()
    state = layer.module.state_dict()
    for name, value in done.tensors.items():
        if (path := layer.path(name.removeprefix(f"{layer.prefix}."))) in state:
            state[path].copy_(value)
    for name, module in done.modules.items():
        layer.put(name.removeprefix(f"{layer.prefix}."), module)
    layer.quantize_inputs({name: module.weight.scheme for name, module in done.modules.items()})
    streams.quantized = SteppedLayer(layer.module, (), streams.quantized, calls(index, streams.quantized)).outputs()


def _quantizing(activations: ActivationScheme, input_scale: Tensor | None) -> Seen:
    return lambda values: quantize_inputs(values, activations, input_scale)


def _check_inputs(name: str, gram: Tensor) -> None:
    """AssayError for inputs that say nothing about which weights matter."""
    size = float(gram.diagonal().sum(dtype=torch.float64))
    # One vector in every token makes a matrix of rank one: its norm is its trace.
    if size == 0 or float(gram.square().sum(dtype=torch.float64).sqrt()) > (1 - _CONSTANT) * size:
        what = "all zero" if size == 0 else "the same in every token, but for their size"
        raise AssayError(
            f"{name}: its inputs on the calibration text are {what}. The text is degenerate (one token repeated?), or the checkpoint is "
            "damaged before this layer. Use more, or more varied, calibration text."
        )


@dataclass(frozen=True)
class _Layer:
    """A loaded layer, its parts found by the names that checkpoints use."""

    module: nn.Module
    prefix: str
    index: int
    shape: DecoderShape
    seen: dict[str, Seen] = field(default_factory=dict[str, Seen])

    @staticmethod
    def of(decoder: Decoder, index: int) -> _Layer:
        return _Layer(decoder.layer(index), decoder.layer_name(index), index, decoder.checkpoint.shape)

    def float_twin(self, share: bool) -> nn.Module:
        """The layer again. share: its weights have the same memory, so they must be replaced, never written to."""
        shared = {
            id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in self.module.parameters()
        }
        return copy.deepcopy(self.module, dict(shared) if share else {})

    def put(self, name: str, module: QuantizedModule) -> None:
        """Make a Linear compute as its quantized form does."""
        self.linear(name).weight.data = module.weight.dequantize()
        activations = module.weight.scheme.activations
        if activations is not None:
            self.seen[name] = _quantizing(activations, module.input_scale)

    def quantize_inputs(self, schemes: Mapping[str, WeightScheme]) -> None:
        """Let the Linears whose scheme says so quantize their inputs, once they are `put`.

        Asked before the layer runs: PyTorch does not call hooks that are added while it waits in an earlier one.
        """

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor | None]:
            return lambda _module, inputs: self.seen[name](inputs[0]) if name in self.seen else None

        for group in self.groups(schemes):
            for name in group:
                if schemes[f"{self.prefix}.{name}"].activations is not None:
                    self.linear(name).register_forward_pre_hook(hook(name))

    def path(self, name: str) -> str:
        """Where transformers keeps what the checkpoint calls `name`, within the layer."""
        return self.shape.architecture.module_path(name)

    def linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.module.get_submodule(self.path(name)))

    def is_expert(self, name: str) -> bool:
        experts = self.shape.architecture.experts
        return experts is not None and self.path(name).startswith(f"{experts.path}.")

    def groups(self, schemes: Mapping[str, WeightScheme]) -> list[list[str]]:
        """Linears that are to be quantized and share an input, in order of execution."""
        groups = [
            [name for name in group if f"{self.prefix}.{name}" in schemes] for group in self.shape.groups(self.index)
        ]
        return [group for group in groups if group]
