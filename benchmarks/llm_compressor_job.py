"""One job of the peer llm-compressor (0.14), for benchmarks/quantizers.py: quantize a model and save it.

    OTHER/bin/python benchmarks/llm_compressor_job.py MODEL TOKENS PRESET OUTPUT [--group-size 64] [--dtype float32]

Run by the Python of an environment of its own, which has llmcompressor and knows nothing of Assay. TOKENS is a .safetensors file with
one tensor (or a .pt file) of int64 token ids [samples, length]. Saves a compressed-tensors checkpoint in OUTPUT and prints one JSON line:
the seconds of `oneshot` alone, by the clock and of the processor, and the peak memory of the process up to then. Everything is at
llm-compressor's defaults, except that groups of 4-bit integers are --group-size wide, lm_head is left alone, and the samples are not
shuffled.

A processor without bfloat16 instructions runs a bfloat16 model some 20 times slower than a float32 one.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LEFT_ALONE = ["lm_head"]
PLAIN = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "MXFP4", "NVFP4A16", "NVFP4")


def in_groups(preset: str, group_size: int) -> dict[str, QuantizationScheme]:
    """The preset with the benchmark's group size, which a preset's name alone cannot say."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights = QuantizationArgs.model_validate(scheme.weights.model_dump() | {"group_size": group_size})
    return {"group_0": scheme}


def recipe(preset: str, group_size: int) -> list:
    match preset:
        case "gptq-W4A16" | "gptq-W4A16_ASYM":
            return [GPTQModifier(config_groups=in_groups(preset.removeprefix("gptq-"), group_size), ignore=LEFT_ALONE)]
        case "awq-W4A16_ASYM":
            groups = in_groups("W4A16_ASYM", group_size)
            return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=LEFT_ALONE)]
        case "W8A8":
            gptq = GPTQModifier(targets="Linear", scheme="W8A8", ignore=LEFT_ALONE)
            return [SmoothQuantModifier(smoothing_strength=0.8), gptq]
        case _:
            return [QuantizationModifier(targets="Linear", scheme=preset, ignore=LEFT_ALONE)]


def read_tokens(path: Path) -> torch.Tensor:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    (tokens,) = load_file(path).values()
    return tokens


def peak_memory_bytes() -> int:
    """Of this process since its exec. getrusage's ru_maxrss would begin with what the process that started this one held."""
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(kibibytes) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("preset", choices=("gptq-W4A16", "gptq-W4A16_ASYM", "awq-W4A16_ASYM", "W8A8", *PLAIN))
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--dtype", choices=("auto", "float32"), default="auto", help="of the weights: as stored, or float32"
    )
    arguments = parser.parse_args()
    if not torch.accelerator.is_available():
        # AWQ pins what it caches, which torch refuses without an accelerator.
        torch.Tensor.pin_memory = lambda self, *_: self
    tokens = read_tokens(arguments.tokens)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    modifiers = recipe(arguments.preset, arguments.group_size)
    started, worked = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        recipe=modifiers,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=tokens.shape[0],
        shuffle_calibration_samples=False,
    )
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    peak = peak_memory_bytes()
    model.save_pretrained(arguments.output, save_compressed=True)
    tokenizer.save_pretrained(arguments.output)
    cost = {"seconds": round(seconds, 1), "cpu_seconds": round(worked, 1), "peak_memory_bytes": peak}
    print(json.dumps(cost), flush=True)


if __name__ == "__main__":
    main()
