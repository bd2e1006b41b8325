"""How far the candidate's next-token distributions are from the baseline's, online: no logits are kept.

KL(baseline ‖ candidate) = Σ_v p_B(v) (ln p_B(v) − ln p_Q(v)) over the full vocabulary, in nats, in float32 from float32 logits.
Source of the definitions: llama.cpp's perplexity tool; here without its 16-bit intermediate, which has a noise floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Divergence:
    """Per scored position: KL in nats, whether both put the same token first; mean negative log-likelihoods in nats."""

    kl: tuple[float, ...]
    agreed: tuple[int, ...]
    nll_baseline: float
    nll_candidate: float


def divergence(baseline: NDArray[np.float32], candidate: NDArray[np.float32], tokens: tuple[int, ...]) -> Divergence:
    """Compare logits [len(tokens), vocabulary] of one window; position i is scored against token i + 1."""
    following = torch.tensor(tokens[1:])
    kl, agreed, nll_baseline, nll_candidate = [], [], [], []
    with torch.inference_mode():
        for start in range(0, len(following), _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, len(following)))
            p = torch.log_softmax(torch.from_numpy(baseline[rows]), dim=-1)
            q = torch.log_softmax(torch.from_numpy(candidate[rows]), dim=-1)
            agreed.append(p.argmax(-1) == q.argmax(-1))
            nll_baseline.append(-p.gather(1, following[rows, None])[:, 0])
            nll_candidate.append(-q.gather(1, following[rows, None])[:, 0])
            kl.append((p - q).mul_(p.exp_()).sum(-1))
        return Divergence(
            kl=tuple(round(value, 7) for value in torch.cat(kl).tolist()),
            agreed=tuple(torch.cat(agreed).int().tolist()),
            nll_baseline=float(torch.cat(nll_baseline).double().mean()),
            nll_candidate=float(torch.cat(nll_candidate).double().mean()),
        )
