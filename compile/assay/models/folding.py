"""Move factors per channel from the inputs of Linears into the module before them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from assay.models.architectures import Architecture
from assay.models.folds import Fold


def spread(fold: Fold, factors: Tensor) -> Tensor:
    """One factor per input channel of the fold's Linears, from one per row of its source: [count] → [in]."""
    return factors.view(-1, 1, fold.head_size).expand(-1, fold.repeats, -1).flatten()


@torch.no_grad()
def apply_fold(layer: nn.Module, row: Architecture, fold: Fold, factors: Tensor) -> None:
    """Multiply what the fold's source puts out by the factors and divide what its readers multiply it by: the layer's output stays.

    factors: positive float32 [count].
    """

    def named(name: str) -> nn.Linear:
        return cast(nn.Linear, layer.get_submodule(row.module_path(name)))

    source = named(fold.source)
    for parameter, offset in ((source.weight, fold.offset), (getattr(source, "bias", None), 0.0)):
        if parameter is not None:
            rows = parameter[-fold.count :]
            by_row = factors.view(-1, *[1] * (parameter.dim() - 1))
            rows.add_(offset).mul_(by_row).sub_(offset)
    columns = spread(fold, factors)
    for name in (*fold.linears, *fold.others):
        named(name).weight.div_(columns)
