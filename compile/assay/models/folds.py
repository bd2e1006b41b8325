"""Where factors per channel can be moved from a Linear's inputs into the module before it, without changing what a layer computes.

Activation-aware methods (AWQ, SmoothQuant) multiply the input channels of a Linear by factors and divide its weights' columns by
them; the factors cost nothing when the module before can take them over. Which modules can follows from a family's row.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from assay.models.architectures import DecoderShape


@dataclass(frozen=True)
class Fold:
    """A module that can multiply its outputs by factors, and the Linears whose weights' columns are divided by them.

    Names are those of a checkpoint, within the layer.
    source: a norm or a Linear; its last `count` rows take the factors (of fused projections: v of q, k, v; up of gate, up).
    linears: every Linear that reads the source's output.  others: what else reads it and is not quantized, a router: its weight's
    columns are divided too.
    count: how many factors there are.  offset: what a norm adds to its weight before it multiplies.
    head_size, repeats: in grouped-query attention `repeats` consecutive heads of the Linears' inputs come from one head of the
    source and share its factors.
    """

    source: str
    linears: tuple[str, ...]
    count: int
    others: tuple[str, ...] = ()
    offset: float = 0.0
    head_size: int = 1
    repeats: int = 1


def layer_folds(shape: DecoderShape, index: int) -> tuple[Fold, ...]:
    """Every fold of a layer, in order of execution."""
    row, groups = shape.architecture, shape.groups(index)
    attention, feed_forward = groups[: len(row.attention)], groups[len(row.attention) :]
    readers, (output,) = attention
    folds: list[Fold] = []
    if row.attention_norm and index >= row.first_attention_norm:
        folds.append(Fold(row.attention_norm, readers, shape.hidden_size, offset=row.norm_offset))
    repeats = shape.heads // shape.key_value_heads
    values = shape.key_value_heads * shape.head_size
    folds.append(Fold(readers[-1], (output,), values, head_size=shape.head_size, repeats=repeats))
    # An expert has the two groups of a feed-forward network, and all experts read the same norm.
    first, last = feed_forward[::2], feed_forward[1::2]
    if row.feed_forward_norm:
        router = shape.router(index)
        names = tuple(name for group in first for name in group)
        folds.append(
            Fold(row.feed_forward_norm, names, shape.hidden_size, (router,) if router else (), row.norm_offset)
        )
    # Only a gated network's activation lets factors through: it is on the gate's side.
    if row.gated:
        inner = shape.expert_size if shape.experts[index] else shape.inner_size
        folds += [Fold(group[-1], (down,), inner) for group, (down,) in zip(first, last, strict=True)]
    return tuple(folds)
