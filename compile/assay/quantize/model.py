"""Quantize a whole decoder, layer by layer, each on the inputs that the quantized layers before it produce.

For every group of Linears that share an input, two things are accumulated over the calibration tokens: the Gram matrix X̃ᵀX̃ of
the inputs in the quantized model, and, where earlier errors are to be corrected, the drift (X − X̃)ᵀX̃ against the float model. The
drift is a regression with far fewer unknowns than there are tokens: the first eighth of every text gives it (docs/benchmarks.md),
so the float model is run on those alone (an encoder on all of it, as what comes later changes what is first). From them come the range
weights, the GPTQ factor, the correction and the reported error; no other forward pass is needed.

Each finished layer is written, whole and synced, before the next begins: a killed job resumes there and ends with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from assay.host import map_large_tensors, memory_bytes
from assay.models.architectures import DecoderShape
from assay.models.checkpoint import Checkpoint
from assay.models.decoder import Decoder
from assay.models.folds import layer_folds
from assay.models.stepping import SteppedLayer
from assay.progress import Progress
from assay.quantize.activations import calibrate
from assay.quantize.correction import corrected
from assay.quantize.gptq import factorize, gptq, output_error
from assay.quantize.kv_cache import CacheRange
from assay.quantize.layer import LoadedLayer, quantizing
from assay.quantize.ranges import find_grid
from assay.quantize.schemes import ActivationScheme, WeightScheme, assign_schemes
from assay.quantize.spill import MEMORY_SHARE, Spill, activation_bytes
from assay.quantize.statistics import Compared, Statistics, accumulate, check_inputs
from assay.quantize.store import LayerStore, QuantizedLayer, QuantizedModule
from assay.quantize.transforms import Surveyed, Transformed, find_factors, fold_into
from assay.quantize.weights import Grid
from assay.recipe import Gptq, Quantize

_TOKENS_PER_BATCH = 1024
COMPARED_SHARE = 0.125
SURVEYED_SHARE = 0.25
WALKED_SHARE = 0.125
FEWEST_TOKENS_WALKED = 4096
FEWEST_TOKENS_PER_INPUT = 0.5


@dataclass
class _Streams:
    """Hidden states of the calibration batches: in the quantized model, and of the first ones in the float model for the drift.

    length: tokens of a text.  keep: what puts tensors that outlive a step out of the way.  surveyed: batches that factors are chosen by.
    """

    quantized: list[Tensor]
    original: list[Tensor] | None
    length: int
    keep: Spill | None
    surveyed: int


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
                seen = quantizing(activations, input_scale)
            statistics = accumulate(inputs, compared, seen)
            few = expert and statistics.tokens < FEWEST_TOKENS_PER_INPUT * inputs[0].shape[1]
            if few:
                notes.append(
                    f"{', '.join(names)}: of the calibration text, {statistics.tokens} tokens went to this expert, too few for "
                    f"{inputs[0].shape[1]} inputs: rounded to nearest, ranges by squared error of the weights."
                )
            else:
                check_inputs(names[0], inputs)
            goal = torch.cat([weights[name] for name in names])
            if statistics.drift is not None:
                pull = statistics.drift.pull(goal)
                goal = corrected(goal, statistics.drift.gram, pull, self.correction)
                # Of wide layers each of these matrices is near a gigabyte.
                statistics = replace(statistics, drift=None)
            goals = dict(zip(names, goal.split([len(weights[name]) for name in names]), strict=True))
            result |= self._alike(goals, statistics, input_scale, few)
        return {name: result[name] for name in weights}, notes

    def _alike(
        self, goals: Mapping[str, Tensor], statistics: Statistics, input_scale: Tensor | None, few: bool
    ) -> dict[str, QuantizedModule]:
        """Quantize Linears that multiply the same numbers. few: they saw too few tokens for statistics to mean anything."""
        by_scheme: dict[WeightScheme, list[str]] = {}
        for name in goals:
            by_scheme.setdefault(self.schemes[name], []).append(name)
        factor = None
        if isinstance(self.settings, Gptq) and not few:
            factor = factorize(statistics.gram, self.settings.damping)
        power = statistics.gram.diagonal() / max(1, statistics.tokens)
        method = "mse" if few and self.settings.range == "activation_weighted" else self.settings.range
        result: dict[str, QuantizedModule] = {}
        for scheme, names in by_scheme.items():
            goal, rows = torch.cat([goals[name] for name in names]), [len(goals[name]) for name in names]
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
        layer = LoadedLayer.of(decoder, index)
        prefix, notes = layer.prefix, list[str]()
        groups = layer.groups(self.schemes)
        stops = [layer.path(group[0]) for group in groups]
        original, held = None, [layer.module]
        if streams.original is not None:
            held.append(layer.float_twin(share=self.settings.transform == "none"))
            original = SteppedLayer(held[-1], stops, streams.original, calls(index, streams.original), streams.keep)
        transformed = Transformed()
        if self.settings.transform != "none":
            few = streams.quantized[: streams.surveyed]
            transformed = self.transform(layer, few, calls(index, few), streams.keep)
        arguments, cache = calls(index, streams.quantized), None
        if self.settings.kv_cache is not None:
            cache = CacheRange()
            arguments = [given | {"past_key_values": cache} for given in arguments]
        layer.quantize_inputs(self.schemes)
        quantized = SteppedLayer(layer.module, stops, streams.quantized, arguments, streams.keep)
        modules: dict[str, QuantizedModule] = {}
        for group, stop in zip(groups, stops, strict=True):
            weights = {f"{prefix}.{name}": layer.linear(name).weight for name in group}
            expert, compared = layer.is_expert(group[0]), None
            # A router decides which tokens an expert sees: the two models may differ in them, and no drift is measured.
            if original is not None and not expert:
                compared = compare(original, stop, layer.linear(group[0]), len(group) == 1, streams.length)
                compared = replace(compared, columns=transformed.columns.get(group[0]))
            done, fallback = self.group(weights, quantized.inputs(stop), compared, expert)
            for name in group:
                layer.put(name, done[f"{prefix}.{name}"])
            modules |= done
            notes += fallback
            del weights
            quantized.resume()
            if original and not (compared and compared.of_outputs):
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

    def transform(
        self, layer: LoadedLayer, batches: list[Tensor], arguments: list[dict[str, Any]], keep: Spill | None
    ) -> Transformed:
        """Move factors per channel into a layer."""
        shape = self.checkpoint.shape
        groups = shape.groups(layer.index)
        survey: dict[str, Surveyed] = {}
        stops = [layer.path(group[0]) for group in groups]
        stepped = SteppedLayer(layer.module, stops, batches, arguments, keep)
        for group, stop in zip(groups, stops, strict=True):
            found = Surveyed.of(stepped.inputs(stop), layer.is_expert(group[0]))
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


def compare(original: SteppedLayer, stop: str, linear: nn.Linear, alone: bool, length: int) -> Compared:
    """What the float model, which waits before a Linear, has there: its inputs, or its outputs where they are fewer."""
    if not alone or linear.out_features >= linear.in_features:
        return Compared(original.inputs(stop), length)
    outputs = original.through(stop)
    bias = cast(Tensor | None, linear.bias)
    if bias is not None:
        outputs = [output - bias for output in outputs]
    return Compared(outputs, length, of_outputs=True)


Calls = Callable[[int, list[Tensor]], list[dict[str, Any]]]


def quantize_model(
    checkpoint: Checkpoint, tokens: Tensor, settings: Quantize, store: LayerStore, progress: Progress
) -> None:
    """Quantize every assigned Linear into the store; layers that it holds already are only run, not quantized again.

    tokens: int64 [samples, length] of calibration text.
    """
    map_large_tensors()
    decoder = Decoder(checkpoint)
    quantizer = _Quantizer(checkpoint, settings)
    walked = walked_samples(settings, checkpoint.shape, *tokens.shape)
    layers, head = decoder.layer_count, decoder.architecture.head
    total = layers + (head in quantizer.schemes)
    finished = next((index for index in range(total) if not store.holds(index)), total)
    if finished == total:
        return
    with torch.no_grad(), progress.stage("quantize", total, finished) as advance:
        keep = _spill(walked * tokens.shape[1], settings, checkpoint, store, progress)
        streams = _embedded(decoder, tokens, walked, quantizer, keep)
        shapes = {(len(batch), batch.shape[1]) for batch in (*streams.quantized, *(streams.original or ()))}
        arguments = {shape: decoder.layer_arguments(*shape) for shape in shapes}

        def calls(index: int, batches: list[Tensor]) -> list[dict[str, Any]]:
            return [arguments[len(batch), batch.shape[1]][index] for batch in batches]

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
            compared = Compared(originals, streams.length) if streams.original is not None else None
            done, notes = quantizer.group({head: checkpoint.weight(head)}, inputs, compared)
            store.write(layers, QuantizedLayer(done, notes=tuple(notes)))
            advance()


def _embedded(decoder: Decoder, tokens: Tensor, walked: int, quantizer: _Quantizer, keep: Spill | None) -> _Streams:
    """The first texts, as many as are walked, before the first layer."""
    samples, length = tokens.shape
    together = max(1, _TOKENS_PER_BATCH // length)
    surveyed = math.ceil(SURVEYED_SHARE * math.ceil(samples / together))
    streams = _Streams(list(decoder.embed(tokens[:walked]).split(together)), None, length, keep, surveyed)
    if quantizer.correction:
        first = math.ceil(compared_share(decoder.checkpoint.shape) * length)
        streams.original = [batch[:, :first].clone() for batch in streams.quantized]
    if keep:
        for batch in (*streams.quantized, *(streams.original or ())):
            keep(batch)
    return streams


def _rerun(decoder: Decoder, index: int, done: QuantizedLayer, streams: _Streams, calls: Calls) -> None:
    """Move the streams past a layer that an earlier run finished: the same products on the same numbers."""
    layer = LoadedLayer.of(decoder, index)
    if streams.original is not None:
        arguments = calls(index, streams.original)
        streams.original = SteppedLayer(layer.module, (), streams.original, arguments, streams.keep).outputs()
    state = layer.module.state_dict()
    for name, value in done.tensors.items():
        if (path := layer.path(name.removeprefix(f"{layer.prefix}."))) in state:
            state[path].copy_(value)
    for name, module in done.modules.items():
        layer.put(name.removeprefix(f"{layer.prefix}."), module)
    layer.quantize_inputs({name: module.weight.scheme for name, module in done.modules.items()})
    arguments = calls(index, streams.quantized)
    streams.quantized = SteppedLayer(layer.module, (), streams.quantized, arguments, streams.keep).outputs()


def walked_samples(settings: Quantize, shape: DecoderShape, samples: int, length: int) -> int:
    """How many of the calibration texts run through the model.

    Rounding to nearest asks of a layer's inputs only how large each channel is, which an eighth of the texts tells as well
    (docs/benchmarks.md). Inverted Gram matrices, ranges of activations and routers' choices want all of them.
    """
    schemes = assign_schemes(settings, shape).schemes.values()
    calibrated = any(scheme.activations and scheme.activations.calibrated for scheme in schemes)
    ranges = calibrated or settings.kv_cache is not None or settings.transform == "smoothquant"
    if isinstance(settings, Gptq) or ranges or any(shape.experts):
        return samples
    return min(samples, max(math.ceil(WALKED_SHARE * samples), math.ceil(FEWEST_TOKENS_WALKED / length)))


def compared_share(shape: DecoderShape) -> float:
    """The share of every text that the float model reads for a correction: what comes before does not depend on it, in a decoder."""
    return 1.0 if shape.architecture.bidirectional else COMPARED_SHARE


def walked_models(settings: Quantize, shape: DecoderShape) -> float:
    """How many models that text runs through: with a correction, the float one for a share of it too."""
    return 1 + compared_share(shape) * bool(isinstance(settings, Gptq) and settings.correction)


def held_bytes(settings: Quantize, shape: DecoderShape, tokens: int) -> float:
    """Activations that quantizing a model holds at once: of so many tokens, and for a correction of the float model's share of them."""
    return activation_bytes(
        tokens * walked_models(settings, shape), shape.hidden_size, max(linear.in_features for linear in shape.linears)
    )


def _spill(
    tokens: int, settings: Quantize, checkpoint: Checkpoint, store: LayerStore, progress: Progress
) -> Spill | None:
    held = held_bytes(settings, checkpoint.shape, tokens)
    if held <= MEMORY_SHARE * memory_bytes():
        return None
    progress.note(
        f"quantize: the calibration text's activations, {held / 1e9:.1f} GB, go to the disk of {store.directory}"
    )
    return Spill(store.directory)
