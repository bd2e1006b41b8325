"""GPTQ: round the columns of a weight one after another, and let those to come make up for each error.

Source: Frantar et al., "GPTQ", 2022 (arXiv 2210.17323), algorithm 1, with the Cholesky form of the inverse Hessian. Columns go
in order of falling input power ("static order"): the grid is fixed beforehand from the whole weight, so the stored checkpoint
needs no index. Left out on purpose: run-time reordering (g_idx), which costs speed at serving time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay.errors import AssayError
from assay.quantize.numbers import nearest_, shift_of
from assay.quantize.weights import Grid, QuantizedWeight

_BLOCK = 128
_COLUMNS_AT_ONCE = 32
_ERROR_BLOCK = 256
_MAX_DAMPING = 1.0
_FLOAT64_FEATURES = 4096


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Gram matrix, shared by all weights that see the same inputs.

    order: int64 [in], columns by falling power.  upper: float32 [in, in], Cholesky factor of the inverse damped Gram matrix
    in that order.  dead: bool [in], channels whose inputs were always zero.  damping: what it took.
    """

    order: Tensor
    upper: Tensor
    dead: Tensor
    damping: float


def factorize(gram: Tensor, damping: float) -> Factor:
    """Invert and factor a Gram matrix (float32 [in, in]); raises damping tenfold until it succeeds, up to the mean diagonal."""
    dead = gram.diagonal() == 0
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    diagonal = gram.diagonal()[order].to(_working_dtype(len(gram)))
    alive = ~dead[order]
    mean = diagonal[alive].mean() if bool(alive.any()) else torch.ones((), dtype=diagonal.dtype)
    # With the order reversed, H = U Uᵀ for an upper U, and the factor of H⁻¹ is U⁻¹: one factorization, no inverse of H.
    reverse = order.flip(0)
    while damping <= _MAX_DAMPING:
        hessian = gram[reverse[:, None], reverse].to(diagonal.dtype)
        hessian.diagonal().copy_((torch.where(alive, diagonal, 1.0) + damping * mean).flip(0))
        lower, failed = cholesky_(hessian)
        del hessian
        if not failed:
            return Factor(order, invert_lower_(lower).float().flip(0, 1), dead, damping)
        damping *= 10
    raise AssayError(
        "the Gram matrix of a layer's inputs cannot be inverted even with damping 1.0: its calibration inputs are degenerate. "
        "Use more, or more varied, calibration text, or method: rtn."
    )


def _working_dtype(features: int) -> torch.dtype:
    """What a Gram matrix of so many input channels is factored in: float64 where it costs little, else float32."""
    return torch.float64 if features <= _FLOAT64_FEATURES else torch.float32


def cholesky_(matrix: Tensor) -> tuple[Tensor, bool]:
    """The lower Cholesky factor of a symmetric contiguous matrix, in its memory, and whether the matrix is not positive definite."""
    # LAPACK wants columns in a row: seen from the other side, the matrix is the same.
    lower, failed = matrix.T, torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return lower, bool(failed)


def invert_lower_(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix in place, block by block: a third of the work of solving for the identity, and no second matrix."""
    size = len(lower)
    if size <= _BLOCK:
        return lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(size, dtype=lower.dtype), upper=False))
    half = size // 2
    first, second, corner = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower_(first)
    invert_lower_(second)
    corner.copy_((second @ corner @ first).neg_())
    return lower


def gptq(weight: Tensor, grid: Grid, factor: Factor) -> QuantizedWeight:
    """Quantize float32 [out, in] on a fixed grid, each column's error spread over the columns still to come."""
    # Columns are rows here, which lie together in memory.
    columns = weight.T.contiguous()[factor.order]
    columns[factor.dead[factor.order]] = 0.0
    rounding = _Rounding(columns, grid, factor)
    rounding.run(0, len(columns))
    columns[factor.order] = rounding.levels
    return grid.with_levels(columns.T.contiguous())


class _Rounding:
    """columns: float32 [in, out] in the factor's order; each is left holding its error, divided by the factor's diagonal.

    levels: [in, out], what it was rounded to.
    """

    def __init__(self, columns: Tensor, grid: Grid, factor: Factor) -> None:
        self.columns, self.levels, self.upper = columns, torch.empty_like(columns), factor.upper
        self.scheme = grid.scheme
        self.groups = [grid.group(column) for column in factor.order.tolist()]
        self.scales, self.zero_points = grid.scales.T.contiguous(), grid.zero_points.T.contiguous()

    def run(self, start: int, stop: int) -> None:
        """Round columns start to stop. Errors of the first half move the second half in one product."""
        if stop - start <= _COLUMNS_AT_ONCE:
            self._one_by_one(start, stop)
            return
        middle = (start + stop) // 2
        self.run(start, middle)
        moved, by = self.columns[middle:stop], self.upper[start:middle, middle:stop]
        moved.addmm_(by.T, self.columns[start:middle], alpha=-1)
        self.run(middle, stop)

    def _one_by_one(self, start: int, stop: int) -> None:
        scheme, upper, columns = self.scheme, self.upper[start:stop, start:stop], self.columns[start:stop]
        diagonal = upper.diagonal().tolist()
        for index, (column, level) in enumerate(zip(columns, self.levels[start:stop], strict=True)):
            group = self.groups[start + index]
            scale = self.scales[group]
            shift = shift_of(scheme, self.zero_points[group])
            nearest_(torch.div(column, scale, out=level), scheme.kind, scheme.bits, shift)
            column.addcmul_(level, scale, value=-1).div_(diagonal[index])
            columns[index + 1 :].addr_(upper[index, index + 1 :], column, alpha=-1)


def output_error(difference: Tensor, gram: Tensor) -> float:
    """Squared output error of a weight difference over the calibration inputs: tr(Δ XᵀX Δᵀ).  Δ: [out, in], gram: [in, in], symmetric."""
    total = 0.0
    for start in range(0, len(gram), _ERROR_BLOCK):
        stop = start + _ERROR_BLOCK
        block = difference[:, start:stop]
        product = block @ gram[start:stop, start:stop]
        # What lies below the diagonal counts for what lies above it too.
        product.addmm_(difference[:, stop:], gram[stop:, start:stop], alpha=2)
        total += float(product.mul_(block).sum(dtype=torch.float64))
    return total
