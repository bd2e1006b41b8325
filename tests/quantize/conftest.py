"""The methods once more, as slow as they are plain: float64, one group and one column at a time."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from assay.quantize.schemes import WeightScheme

Matrix = NDArray[np.float64]
SPANS = [1.0 - step / 40 for step in range(25)]


def bfloat16(value: float) -> float:
    """The nearest value of which 16 bits of a float32 are enough, ties to the even one."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + ((bits >> 16) & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


@dataclass
class NaiveGrid:
    """scales and zero_points: [out, groups]; columns of a group lie side by side."""

    bits: int
    scales: Matrix
    zero_points: Matrix

    def at(self, row: int, column: int, columns: int) -> tuple[float, float]:
        group = column // (columns // self.scales.shape[1])
        return self.scales[row, group], self.zero_points[row, group]

    def code(self, value: float, row: int, column: int, columns: int) -> float:
        scale, zero_point = self.at(row, column, columns)
        return min(max(round(value / scale) + zero_point, 0), 2**self.bits - 1)

    def value(self, code: float, row: int, column: int, columns: int) -> float:
        scale, zero_point = self.at(row, column, columns)
        return (code - zero_point) * scale


class Naive:
    """Plain loops over float64."""

    @staticmethod
    def grid(weight: Matrix, scheme: WeightScheme, method: str, power: Matrix | None) -> NaiveGrid:
        rows, columns = weight.shape
        bits, symmetric, group = scheme.bits, scheme.symmetric, scheme.group_size or columns
        levels = 2**bits - 1
        grid = NaiveGrid(bits, np.zeros((rows, columns // group)), np.zeros((rows, columns // group)))
        for row in range(rows):
            for index in range(columns // group):
                part = weight[row, index * group : (index + 1) * group]
                importance = np.ones(group)
                if method == "activation_weighted":
                    assert power is not None
                    importance = power[index * group : (index + 1) * group]
                best = np.inf
                smallest, largest = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
                trials = [(1, span) for span in (SPANS if method != "minmax" else SPANS[:1])]
                if symmetric and bits == 4 and method != "minmax":
                    trials += [(-sign, span) for sign, span in trials]
                for sign, span in trials:
                    low, high = smallest * span, largest * span
                    if symmetric:
                        scale = sign * (bfloat16(max(high, -low) / (levels / 2)) or 2.0**-24)
                        zero_point = 2 ** (bits - 1)
                    else:
                        scale = bfloat16((high - low) / levels) or 2.0**-24
                        zero_point = min(max(round(-low / scale), 0), levels)
                    codes = np.minimum(np.maximum(np.rint(part / scale) + zero_point, 0), levels)
                    loss = float((importance * ((codes - zero_point) * scale - part) ** 2).sum())
                    if loss < best:
                        best = loss
                        grid.scales[row, index], grid.zero_points[row, index] = scale, zero_point
        return grid

    @staticmethod
    def round_to_nearest(weight: Matrix, grid: NaiveGrid) -> Matrix:
        rows, columns = weight.shape
        return np.array(
            [[grid.code(weight[row, column], row, column, columns) for column in range(columns)] for row in range(rows)]
        )

    @staticmethod
    def values(codes: Matrix, grid: NaiveGrid) -> Matrix:
        rows, columns = codes.shape
        return np.array(
            [[grid.value(codes[row, column], row, column, columns) for column in range(columns)] for row in range(rows)]
        )

    @staticmethod
    def gptq(weight: Matrix, grid: NaiveGrid, gram: Matrix, damping: float) -> tuple[Matrix, Matrix, list[int]]:
        """Codes, the values that were rounded to them in units of the scale, and the order of the columns.

        The inverse Hessian is explicit, and each column is eliminated from it once it is fixed.
        """
        rows, columns = weight.shape
        power = gram.diagonal().copy()
        order = sorted(range(columns), key=lambda column: -power[column])
        hessian = gram.copy()
        for column in range(columns):
            if power[column] == 0:
                hessian[column, column] = 1.0
        alive = power[power > 0]
        hessian += np.eye(columns) * damping * (alive.mean() if len(alive) else 1.0)
        inverse = np.linalg.inv(hessian)
        remaining = np.where(power == 0, 0.0, weight)
        codes, rounded = np.zeros((rows, columns)), np.zeros((rows, columns))
        for step, column in enumerate(order):
            later = order[step + 1 :]
            for row in range(rows):
                value = remaining[row, column]
                codes[row, column] = grid.code(value, row, column, columns)
                rounded[row, column] = value / grid.at(row, column, columns)[0]
                error = value - grid.value(codes[row, column], row, column, columns)
                remaining[row, later] -= error / inverse[column, column] * inverse[column, later]
            inverse = inverse - np.outer(inverse[:, column], inverse[column, :]) / inverse[column, column]
        return codes, rounded, order

    @staticmethod
    def differ_only_at_ties(found: Matrix, codes: Matrix, rounded: Matrix, order: list[int]) -> bool:
        """Rows may part ways only where the value to round lay halfway between two codes."""
        for row in range(len(codes)):
            parted = [column for column in order if found[row, column] != codes[row, column]]
            if parted and abs(rounded[row, parted[0]] % 1.0 - 0.5) > 1e-3:
                return False
        return True


@pytest.fixture(scope="session")
def naive() -> type[Naive]:
    return Naive
