"""Second moments of a Linear's calibration inputs, which answer every later question about the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import AssayError

_GRAM_BLOCK = 256
_CONSTANT = 1e-5


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


def check_inputs(name: str, inputs: Sequence[Tensor]) -> None:
    """AssayError for inputs, [tokens, in] each, that say nothing about which weights matter: all zero, or of one direction.

    Directions, not the Gram matrix, tell: a single token of great size, which healthy models have, makes that one look constant.
    """
    total, tokens = torch.zeros(inputs[0].shape[1], dtype=torch.float64), 0
    for batch in inputs:
        sizes = batch.norm(dim=1)
        total += batch.T @ torch.where(sizes > 0, 1 / sizes, 0.0)
        tokens += int((sizes > 0).sum())
    if not tokens or float((total / tokens).square().sum()) > 1 - _CONSTANT:
        what = "the same in every token, but for their size" if tokens else "all zero"
        raise AssayError(
            f"{name}: its inputs on the calibration text are {what}. The text is degenerate (one token repeated?), or the checkpoint is "
            "damaged before this layer. Use more, or more varied, calibration text."
        )
