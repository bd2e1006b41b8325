"""Factors per channel that make a layer easier to quantize, moved into the module before each Linear so that they cost nothing.

`awq` (Lin et al. 2023, arXiv 2306.00978): input channels of large activations are scaled up in the weights, so that rounding hurts them less.
`smoothquant` (Xiao et al. 2022, arXiv 2211.10438): outliers of the activations are moved into the weights, so that both fit 8 bits.

Candidates are compared by the squared error of the Linears' outputs. With float activations that is tr(Δ XᵀX Δᵀ), which takes the Gram
matrix of the inputs and no forward pass; with quantized ones the products of a sample of tokens are compared, each token's error relative
to its outputs: a norm follows, to which a token a hundred times as large is worth no more than another. For 8-bit integers the best of
the power laws is the start of a descent on the error's expectation (`_descended`). The winner then has to beat the identity with the
ranges and the rounding that will be used in the end: GPTQ makes up for much of what factors are there for.

Where a factor goes into a norm, the norm's weight is rounded to the checkpoint's dtype first and the factor follows from the rounded weight:
what the layer computes does not change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from assay.models.architectures import Architecture
from assay.models.folding import apply_fold, spread
from assay.models.folds import Fold
from assay.quantize.activations import calibrate, quantize_inputs
from assay.quantize.gptq import Factor, factorize, gptq, output_error
from assay.quantize.ranges import find_grid
from assay.quantize.schemes import WeightScheme
from assay.quantize.statistics import accumulate
from assay.recipe import Gptq, Quantize

_STRENGTHS = tuple(0.05 * step for step in range(1, 21))
_SMOOTHING = tuple(0.1 * step for step in range(1, 10))
# Of AWQ's strengths every fourth is tried, then those around the best.
_STRIDE = 4
_SAMPLED_TOKENS = 512
_SAMPLED_ROWS = 512
_SMALLEST = 1e-5
_STEPS = 60
_STEP_SIZE = 0.1


@dataclass
class Surveyed:
    """What is known of the inputs of Linears that share them, in the float layer.

    gram: XᵀX [in, in], or its diagonal [in] where there are too many Linears to keep matrices (experts).  absmax: [in].
    sample: some of the tokens [tokens, in].
    """

    gram: Tensor
    absmax: Tensor
    sample: Tensor

    @staticmethod
    def of(inputs: Sequence[Tensor], diagonal: bool) -> Surveyed:
        """inputs: float32 [tokens, in] of each batch; every batch may be empty (an expert without tokens)."""
        features = inputs[0].shape[1]
        gram = torch.zeros(features) if diagonal else accumulate(inputs, None).gram
        absmax, sample = torch.zeros(features), list[Tensor]()
        stride = max(1, -(-sum(map(len, inputs)) // _SAMPLED_TOKENS))
        for batch in inputs:
            if len(batch):
                if diagonal:
                    gram += batch.square().sum(0)
                absmax = torch.maximum(absmax, batch.abs().amax(0))
                sample.append(batch[::stride])
        return Surveyed(gram, absmax, torch.cat(sample) if sample else torch.zeros(1, features))

    @property
    def power(self) -> Tensor:
        return self.gram if self.gram.dim() == 1 else self.gram.diagonal()


# The factors of a strength.
_Law = Callable[[float], Tensor]


@dataclass(frozen=True)
class _Reader:
    """One of a fold's Linears: a sample of its rows [rows, in], what it reads, and what a squared error of each sampled token counts."""

    weight: Tensor
    inputs: Surveyed
    scheme: WeightScheme
    importance: Tensor


def find_factors(
    fold: Fold,
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Surveyed],
    schemes: Mapping[str, WeightScheme],
    *,
    settings: Quantize,
    scale_dtype: torch.dtype,
) -> Tensor | None:
    """Factors [count] for the source of a fold, None where nothing beats the identity.

    weights: float32 [out, in] of each of the fold's Linears.
    """
    rows = {name: weights[name][:: -(-len(weights[name]) // _SAMPLED_ROWS)] for name in fold.linears}
    # Readers of the same inputs, q, k and v say, count by their outputs together.
    outputs: dict[int, Tensor] = {}
    for name, weight in rows.items():
        power = (inputs[name].sample @ weight.T).square().sum(1)
        outputs[id(inputs[name])] = outputs.get(id(inputs[name]), torch.zeros(1)) + power
    importance = {
        key: 1 / power.clamp(min=_SMALLEST * float(power.mean()) + _SMALLEST**2) for key, power in outputs.items()
    }
    readers = [
        _Reader(weight, inputs[name], schemes[name], importance[id(inputs[name])]) for name, weight in rows.items()
    ]
    smooth = settings.transform == "smoothquant"
    fixed = settings.strength if smooth and isinstance(settings.strength, float) else None
    if fixed is not None:
        return _smoothing(fold, readers)(fixed)
    identity = torch.ones(fold.count)

    def loss(factors: Tensor, method: str, damping: float | None) -> float:
        columns = spread(fold, factors)
        # Linears that share their inputs share what GPTQ needs of them.
        shared: dict[int, Factor] = {}
        for seen in (reader.inputs for reader in readers):
            if damping is not None and seen.gram.dim() == 2 and id(seen) not in shared:
                shared[id(seen)] = factorize(seen.gram * columns * columns[:, None], damping)
        return sum(_loss(reader, columns, method, shared.get(id(reader.inputs)), scale_dtype) for reader in readers)

    def plain(factors: Tensor) -> float:
        return loss(factors, "minmax", None)

    if smooth:
        best = _least([_smoothing(fold, readers)], _SMOOTHING, 1, plain)
    else:
        best = _least(_activation_aware(fold, readers), _STRENGTHS, _STRIDE, plain)
    if smooth and all(reader.scheme.kind == "int" for reader in readers):
        best = min(best, _descended(fold, readers, best), key=plain)
    damping = settings.damping if isinstance(settings, Gptq) else None
    return best if loss(best, settings.range, damping) < loss(identity, settings.range, damping) else None


def _least(laws: Sequence[_Law], strengths: Sequence[float], stride: int, loss: Callable[[Tensor], float]) -> Tensor:
    """The factors of least loss, of every law and every `stride`-th strength, or of the strengths around that one."""
    tried = [
        (loss(law(strengths[place])), number, place)
        for number, law in enumerate(laws)
        for place in range(stride - 1, len(strengths), stride)
    ]
    _, number, best = min(tried)
    around = range(max(0, best - stride + 1), min(len(strengths), best + stride))
    tried += [(loss(laws[number](strengths[place])), number, place) for place in around if place != best]
    _, number, best = min(tried)
    return laws[number](strengths[best])


def _activation_aware(fold: Fold, readers: Sequence[_Reader]) -> tuple[_Law, _Law]:
    """1 / s for AWQ's rules s = x^r and s = x^r / w^(1 − r): root mean square x, mean relative magnitude w."""
    power = sum((reader.inputs.power for reader in readers), start=torch.zeros(1))
    relative = torch.cat(
        [reader.weight.abs() / reader.weight.abs().amax(1, keepdim=True).clamp_(min=_SMALLEST) for reader in readers]
    )
    inputs = _by_row(fold, power, torch.mean).sqrt().clamp_(min=_SMALLEST)
    weights = _by_row(fold, relative.mean(0), torch.mean).clamp_(min=_SMALLEST)
    return (
        lambda strength: _centred(inputs**strength),
        lambda strength: _centred(inputs**strength / weights ** (1 - strength)),
    )


def _smoothing(fold: Fold, readers: Sequence[_Reader]) -> _Law:
    """1 / s for s = max|x|^α / max|w|^(1 − α)."""
    inputs = torch.stack([reader.inputs.absmax for reader in readers]).amax(0)
    weights = torch.cat([reader.weight for reader in readers]).abs().amax(0)
    inputs, weights = (_by_row(fold, values, torch.amax).clamp_(min=_SMALLEST) for values in (inputs, weights))
    return lambda strength: _centred(inputs**strength / weights ** (1 - strength))


def _descended(fold: Fold, readers: Sequence[_Reader], factors: Tensor) -> Tensor:
    """Factors c that make the expected error of 8-bit integers small, by gradient descent (Adam) in their logarithms.

    A step of a token's grid is max|c x| / 127 and a step of a row's is max|w / c| / 127, and a rounding error has a twelfth of a step's
    square: but for constants, a token expects max|c x|² Σ (w / c)² of its own rounding and Σ max|w / c|² · Σ (c x)² of the weights'.
    """
    logarithms = factors.log()
    mean, variance = torch.zeros_like(logarithms), torch.zeros_like(logarithms)
    power = {id(reader): reader.importance @ reader.inputs.sample.square() for reader in readers}
    best, least = factors, math.inf
    for step in range(_STEPS):
        columns = spread(fold, logarithms.exp())
        total, slope = 0.0, torch.zeros_like(columns)
        for reader in readers:
            tokens, token_places = (reader.inputs.sample.abs() * columns).max(1)
            rows, row_places = (reader.weight.abs() / columns).max(1)
            tokens, rows = tokens.square() * reader.importance, rows.square()
            spent_tokens, spent_rows = tokens.sum(), rows.sum()
            weights = reader.weight.square().sum(0) / columns.square()
            inputs = power[id(reader)] * columns.square()
            total += float(spent_tokens * weights.sum() + spent_rows * inputs.sum())
            slope.index_add_(0, token_places, tokens * weights.sum()).index_add_(0, row_places, -rows * inputs.sum())
            slope += spent_rows * inputs - spent_tokens * weights
        if total < least:
            best, least = logarithms.exp(), total
        slope = 2 * _by_row(fold, slope, torch.sum) / total
        mean, variance = 0.9 * mean + 0.1 * slope, 0.99 * variance + 0.01 * slope.square()
        first, second = mean / (1 - 0.9 ** (step + 1)), variance / (1 - 0.99 ** (step + 1))
        logarithms = logarithms - _STEP_SIZE * (1 - step / _STEPS) * first / (second.sqrt() + 1e-12)
    return best


def _by_row(fold: Fold, columns: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """[in] → [count]: input channels that share a row of the source are one."""
    return reduce(columns.view(-1, fold.repeats, fold.head_size), 1).flatten()


def _centred(scales: Tensor) -> Tensor:
    """Factors 1 / s, with s between reasonable bounds around 1."""
    scales = scales / (scales.max() * scales.min()).sqrt()
    return 1 / scales.clamp_(1e-4, 1e4)


def _loss(reader: _Reader, columns: Tensor, method: str, factor: Factor | None, scale_dtype: torch.dtype) -> float:
    """Squared error of the outputs with the weight's columns divided by `columns` before they are quantized.

    factor: GPTQ's, of the Gram matrix of inputs multiplied by the columns; None: rounding to nearest.
    """
    weight, scheme, inputs = reader.weight, reader.scheme, reader.inputs
    moved = weight / columns
    power = inputs.power * columns.square()
    grid = find_grid(moved, scheme, method, power, scale_dtype)
    quantized = (grid.quantize(moved) if factor is None else gptq(moved, grid, factor)).dequantize()
    if scheme.activations is None:
        difference = quantized * columns - weight
        if inputs.gram.dim() == 1:
            return float((difference.square() * inputs.gram).sum(dtype=torch.float64))
        return output_error(difference, inputs.gram)
    sample = inputs.sample * columns
    scale = calibrate([sample], scheme.activations, "minmax", scale_dtype) if scheme.activations.calibrated else None
    outputs = quantize_inputs(sample, scheme.activations, scale) @ quantized.T
    errors = (outputs - inputs.sample @ weight.T).square().sum(1)
    return float((errors * reader.importance).sum(dtype=torch.float64))


@dataclass
class Transformed:
    """What transforms did to a layer: tensors that changed and are no quantized weights, by full name; what the input channels of Linears
    were multiplied by, by name within the layer; and notes on folds that were skipped.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    columns: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    notes: list[str] = field(default_factory=list[str])


def fold_into(
    layer: nn.Module, row: Architecture, fold: Fold, factors: Tensor, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """Move factors into a layer.

    Returns the tensors that changed and are no quantized weights, by name within the layer, in a dtype; and what the input channels of
    the fold's Linears are multiplied by since, float32 [in].
    """
    source = layer.get_submodule(row.module_path(fold.source))
    if not isinstance(source, nn.Linear):
        before = cast(Tensor, source.weight) + fold.offset
        after = (before * factors - fold.offset).to(dtype).float() + fold.offset
        factors = torch.where((before == 0) | (after == 0), 1.0, after / before)
    apply_fold(layer, row, fold, factors)
    names = [f"{fold.source}.bias", *(f"{name}.weight" for name in fold.others)]
    if not isinstance(source, nn.Linear):
        names.append(f"{fold.source}.weight")
    state = layer.state_dict()
    changed: dict[str, Tensor] = {}
    for name in names:
        if (path := row.module_path(name)) in state:
            changed[name] = state[path].to(dtype)
            state[path].copy_(changed[name])
    return changed, spread(fold, factors)
