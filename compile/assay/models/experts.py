"""A mixture of experts as Linears: transformers computes all experts of a layer from two fused tensors, Assay quantizes each Linear.

Every expert is called for every batch, in order, with no tokens too: who follows a layer's Linears one by one meets the same ones
whatever the router decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated feed-forward network."""

    def __init__(self, hidden: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.activation = activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SeparateExperts(nn.ModuleList):
    """Stands in for transformers' fused experts: called alike, gives the same."""

    @classmethod
    def like(cls, fused: Any) -> SeparateExperts:
        """Experts of the sizes and with the activation of transformers' module, whose parameters are `gate_up_proj` [experts,
        2 · inner, hidden] and `down_proj`; on the same device, their weights not set.
        """
        count, _, hidden = fused.gate_up_proj.shape
        inner = fused.down_proj.shape[2]
        with torch.device(fused.down_proj.device):
            return cls(Expert(hidden, inner, fused.act_fn) for _ in range(count))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, hidden].  top_k_index, top_k_weights: [tokens, k], which experts a token goes to, and their shares."""
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, choice = torch.where(top_k_index == number)
            share = top_k_weights[token, choice, None]
            result.index_add_(0, token, expert(hidden_states[token]) * share)
        return result
