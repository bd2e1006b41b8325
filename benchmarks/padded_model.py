"""A Llama with zeros around it, so that every size is a multiple of 128: nearly the same function, for formats with blocks of 128 channels.

    .venv/bin/python benchmarks/padded_model.py MODEL DIRECTORY

More channels would change a norm's mean: its weights shrink by as much, which bfloat16 rounds. The padded model is its own yardstick.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from assay.files import read_json
from assay.models.checkpoint import SINGLE

BLOCK = 128


def padded_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same model in sizes that blocks divide: more channels, and more groups of attention heads."""
    hidden, kv_heads = config["hidden_size"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] // kv_heads
    kv_heads = next(heads for heads in count(kv_heads) if heads * head_size % BLOCK == 0)
    # transformers wants whole channels for every head, although head_dim says how many there are.
    padded = _up(hidden, math.lcm(BLOCK, queries * kv_heads))
    return config | {
        "hidden_size": padded,
        "intermediate_size": _up(config["intermediate_size"]),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": queries * kv_heads,
        "head_dim": head_size,
        "rms_norm_eps": config["rms_norm_eps"] * hidden / padded,
    }


def pad_tensors(tensors: dict[str, Tensor], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Tensor]:
    """A Llama's tensors in the sizes of `after`."""
    hidden = after["hidden_size"]
    shrunken = (before["hidden_size"] / hidden) ** 0.5
    rows = {
        "q_proj": after["num_attention_heads"] * after["head_dim"],
        "k_proj": after["num_key_value_heads"] * after["head_dim"],
        "v_proj": after["num_key_value_heads"] * after["head_dim"],
        "gate_proj": after["intermediate_size"],
        "up_proj": after["intermediate_size"],
        "o_proj": hidden,
        "down_proj": hidden,
    }
    columns = {"o_proj": rows["q_proj"], "down_proj": rows["gate_proj"]}
    padded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 1:
            padded[name] = pad(tensor.float() * shrunken, (0, hidden - len(tensor)), value=1.0).to(tensor.dtype)
            continue
        module = name.removesuffix(".weight").rpartition(".")[2]
        width, height = columns.get(module, hidden), rows.get(module, len(tensor))
        padded[name] = pad(tensor, (0, width - tensor.shape[1], 0, height - len(tensor)))
    return padded


def _up(size: int, whole: int = BLOCK) -> int:
    return -(-size // whole) * whole


def pad_model(source: Path, destination: Path) -> None:
    shutil.copytree(source, destination)
    before = read_json(source / "config.json")
    after = padded_config(before)
    (destination / "config.json").write_text(json.dumps(after, indent=2))
    with torch.no_grad():
        save_file(pad_tensors(load_file(source / SINGLE), before, after), destination / SINGLE, {"format": "pt"})


if __name__ == "__main__":
    pad_model(Path(sys.argv[1]), Path(sys.argv[2]))
