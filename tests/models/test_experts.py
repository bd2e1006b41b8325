"""Experts as Linears of their own compute what transformers computes from fused tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from assay.models.experts import SeparateExperts

SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 96, "num_attention_heads": 4, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"intermediate_size": 96}),
        ("qwen3_moe", {"moe_intermediate_size": 48}),
        ("mixtral", {"intermediate_size": 96, "hidden_act": "gelu"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 40])
def test_same_as_the_fused_ones(family: str, changes: dict[str, int], tokens: int) -> None:
    config = AutoConfig.for_model(family, **SIZES, **changes, num_local_experts=5)
    fused = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().model.layers[0].mlp.experts
    separate = SeparateExperts.like(fused)
    assert len(separate) == 5
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 64, generator=generator)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(tokens)])
    shares = torch.rand(tokens, 2, generator=generator)
    with torch.no_grad():
        fused.gate_up_proj.normal_(generator=generator)
        fused.down_proj.normal_(generator=generator)
        for expert, gate_up, down in zip(separate, fused.gate_up_proj, fused.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            for linear, weight in ((expert.gate_proj, gate), (expert.up_proj, up), (expert.down_proj, down)):
                linear.weight.copy_(weight)
        found, expected = separate(hidden, chosen, shares), fused(hidden, chosen, shares)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert separate.state_dict().keys() == {
        f"{expert}.{name}.weight" for expert in range(5) for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_fused_experts_without_weights_give_experts_without_weights() -> None:
    config = AutoConfig.for_model("mixtral", **SIZES, intermediate_size=96)
    with torch.device("meta"):
        fused = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    assert {parameter.device.type for parameter in SeparateExperts.like(fused).parameters()} == {"meta"}
