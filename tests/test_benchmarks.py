"""What the benchmarks rest on: the shuffled model is the same function with other weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shuffled_model import shuffle_channels
from transformers import AutoModelForCausalLM

from assay.files import read_json


def test_a_shuffled_model_computes_the_same(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    source = make_model(tmp_path / "model", "llama", dtype="float32", num_attention_heads=8)
    tokens = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    tensors = load_file(source / "model.safetensors")
    shuffled = shuffle_channels(tensors, read_json(source / "config.json"), seed=1)
    assert {name: tensor.shape for name, tensor in shuffled.items()} == {name: tensors[name].shape for name in tensors}
    assert all(
        not torch.equal(shuffled[name], tensors[name]) for name in tensors if "weight" in name and "norm" not in name
    )
    save_file(shuffled, source / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
