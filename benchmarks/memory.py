"""Whether peak memory grows with a model's layers: quantizes layers of Llama-3-8B's shape with random weights, each count in a fresh process.

    .venv/bin/python benchmarks/memory.py [--layers 2,4,8] [--method rtn|gptq] [--samples 16] [--length 512]

Prints one JSON line for each number of layers: seconds, and the peak resident set of the process. The checkpoint (half a gigabyte a layer and
one for the embedding) is written to a temporary directory first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def write_model(directory: Path, layers: int) -> None:
    """A checkpoint with one shard for each layer, as large ones have."""
    import torch
    from safetensors.torch import save_file

    from assay.models.architectures import decoder_shape

    config = SHAPE | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    shape = decoder_shape(config, str(directory))
    generator = torch.Generator().manual_seed(0)
    placed: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        placed.update(dict.fromkeys(tensors, name))

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(torch.bfloat16)

    ones = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    for index in range(layers):
        prefix = f"model.layers.{index}."
        tensors = {
            f"{linear.name}.weight": weight(linear.out_features, linear.in_features)
            for linear in shape.linears
            if linear.name.startswith(prefix)
        }
        save(
            index,
            tensors
            | {f"{prefix}{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")},
        )
    save(layers, {"model.embed_tokens.weight": weight(shape.vocabulary, shape.hidden_size), "model.norm.weight": ones})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Quantize, in this process."""
    import torch
    from pydantic import TypeAdapter

    from assay.host import cores
    from assay.models.checkpoint import Checkpoint
    from assay.progress import Progress
    from assay.quantize.model import quantize_model
    from assay.quantize.store import LayerStore
    from assay.recipe import Quantize
    from assay_evals.speed.worker import peak_memory_bytes

    torch.set_num_threads(cores())
    settings = TypeAdapter[Quantize](Quantize).validate_python(
        {"method": arguments.method, "scheme": "W4A16", "group_size": 128}
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 128000, (arguments.samples, arguments.length), generator=generator)
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        quantize_model(Checkpoint(model), tokens, settings, LayerStore(Path(directory)), Progress())
        seconds = time.perf_counter() - started
    # Not ru_maxrss, which a process inherits from the one that started it.
    return {"seconds": round(seconds, 1), "peak_memory_bytes": peak_memory_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,4,8")
    parser.add_argument("--method", choices=("rtn", "gptq"), default="gptq")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model:
        print(json.dumps(measure(arguments.model, arguments)), flush=True)
        return
    for layers in map(int, arguments.layers.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            write_model(Path(directory), layers)
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--model", directory],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
        print(json.dumps({"layers": layers, "method": arguments.method} | json.loads(done.stdout)), flush=True)


if __name__ == "__main__":
    main()
