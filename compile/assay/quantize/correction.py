"""Move weights towards those that undo the errors which earlier, already quantized layers left in the inputs.

A layer of the float model computes W·x; the same layer of the quantized model sees x̃. The ridge regression of the float outputs
on x̃ is W·(XᵀX̃)(X̃ᵀX̃ + λI)⁻¹. Here the ridge pulls towards W instead of towards zero. Going all the way fits the noise of the
calibration text; a quarter to half of the way is best (docs/benchmarks.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from assay.errors import AssayError
from assay.quantize.gptq import cholesky_

_RIDGE = 0.3


def corrected(weight: Tensor, gram: Tensor, pull: Tensor, share: float) -> Tensor:
    """float32 [out, in]: `share` of the way from the weight to its regression on the quantized model's inputs.

    gram: X̃ᵀX̃ [in, in]; used up: it is factored in place.  pull: W(X − X̃)ᵀX̃ [out, in], so that the step is
    pull·(gram + λI)⁻¹ and vanishes when nothing drifted.
    """
    ridge = _RIDGE * gram.diagonal().mean()
    if ridge == 0:
        return weight
    # The trace bounds the largest eigenvalue, so the condition is at most in / 0.3 + 1: float32 solves this to a thousandth.
    gram.diagonal().add_(ridge)
    lower, failed = cholesky_(gram)
    if failed:
        raise AssayError(
            "the drift of a layer's inputs from the float model's cannot be regressed: they hold infinities or NaNs. "
            "The checkpoint overflows in float32 before this layer, or is damaged."
        )
    return torch.cholesky_solve(pull.T, lower).T.mul_(share).add_(weight)
