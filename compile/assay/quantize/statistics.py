"""Second moments of a Linear's calibration inputs, which answer every later question about the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import AssayError

_GRAM_BLOCK = 128
_CONSTANT = 1e-5


@dataclass(frozen=True)
class Drift:
    """How far a Linear's inputs X̃ in the quantized model are from those of the float model, X, over the tokens that both ran.

    gram: X̃ᵀX̃ [in, in].  moment: (X − X̃)ᵀX̃ [in, in], or, of_outputs, (WX)ᵀX̃ [out, in].
    """

    gram: Tensor
    moment: Tensor
    of_outputs: bool = False

    def pull(self, weight: Tensor) -> Tensor:
        """W(X − X̃)ᵀX̃ [out, in], for float32 [out, in]."""
        return self.moment - weight @ self.gram if self.of_outputs else weight @ self.moment


@dataclass(frozen=True)
class Statistics:
    """Second moments of a Linear's calibration inputs: gram = X̃ᵀX̃ [in, in] over all tokens, and the drift where it is measured."""

    gram: Tensor
    drift: Drift | None
    tokens: int


@dataclass(frozen=True)
class Compared:
    """What the float model gives a Linear, or makes of it, for the first tokens of every text: [tokens, features] for each batch.

    length: tokens of a whole text.  of_outputs: these are outputs, without the bias, not inputs.  columns: what a transform multiplied
    the inputs' channels by since, [in].
    """

    values: Sequence[Tensor]
    length: int
    of_outputs: bool = False
    columns: Tensor | None = None

    def rows(self, features: int) -> int:
        """Of the drift's moment."""
        return self.values[0].shape[1] if self.of_outputs else features

    def split(self, index: int, batch: Tensor) -> tuple[Tensor, Tensor]:
        """A batch of the quantized model, [tokens, in], in the tokens that the float model ran and the others."""
        texts = batch.unflatten(0, (-1, self.length))
        first = len(self.values[index]) // len(texts)
        return texts[:, :first].flatten(0, 1), texts[:, first:].flatten(0, 1)

    def against(self, index: int, batch: Tensor) -> Tensor:
        """What multiplies X̃ = batch, the split's first part, in the drift's moment."""
        values = self.values[index]
        if self.of_outputs:
            return values
        return (values if self.columns is None else values * self.columns) - batch


Seen = Callable[[Tensor], Tensor]


def accumulate(quantized: Sequence[Tensor], original: Compared | None, seen: Seen | None = None) -> Statistics:
    """Statistics of inputs [tokens, in], in float32, batch by batch in order.

    seen: what the Linear makes of its inputs before it multiplies.
    """
    features = quantized[0].shape[1]
    gram, tokens = torch.zeros(features, features), sum(len(batch) for batch in quantized)
    if original is None:
        for batch in quantized:
            _add_gram_(gram, seen(batch) if seen else batch)
        return Statistics(_mirror_(gram), None, tokens)
    shared, moment = torch.zeros(features, features), torch.zeros(original.rows(features), features)
    for index, raw in enumerate(quantized):
        first, others = original.split(index, seen(raw) if seen else raw)
        _add_gram_(shared, first)
        _add_gram_(gram, others)
        moment.addmm_(original.against(index, first).T, first)
    drift = Drift(_mirror_(shared), moment, original.of_outputs)
    return Statistics(_mirror_(gram).add_(shared), drift, tokens)


def _add_gram_(lower: Tensor, batch: Tensor) -> None:
    """Add XᵀX of [tokens, in]. It is symmetric: only its lower blocks are computed."""
    for start in range(0, len(lower), _GRAM_BLOCK):
        stop = start + _GRAM_BLOCK
        lower[start:, start:stop].addmm_(batch[:, start:].T, batch[:, start:stop])


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
        if tokens and float((total / tokens).square().sum()) <= 1 - _CONSTANT:
            return
    what = "the same in every token, but for their size" if tokens else "all zero"
    raise AssayError(
        f"{name}: its inputs on the calibration text are {what}. The text is degenerate (one token repeated?), or the checkpoint is "
        "damaged before this layer. Use more, or more varied, calibration text."
    )
