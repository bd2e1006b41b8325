"""How far quantized models are from the float model, and how long and how much memory quantizing takes.

    .venv/bin/python benchmarks/quantizers.py [--model DIRECTORY --calibration TEXT --evaluation TEXT] [--held-out TEXT]
        [--jobs rtn,gptq,…] [--schemes W4A16,…] [--peer PYTHON [--peer-jobs gptq-W4A16,…]] [--export compressed-tensors]
    .venv/bin/python benchmarks/quantizers.py --model DIRECTORY --evaluation TEXT [--held-out TEXT] --measure DIRECTORY…

Without a model it takes the demo's with its channels shuffled (shuffled_model.py), because its weights lie on a 4-bit grid already, and
the two parts of Python's documentation.

Every job quantizes the same model on the same calibration tokens in a fresh process, --rounds times, and ends as a Hugging Face
directory; all directories are measured alike, in float32. --peer names the Python of an environment with llm-compressor, whose jobs
(llm_compressor_job.py) then take turns with Assay's. Prints one JSON line per job and round. --measure only measures directories.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay_evals.speed.worker import peak_memory_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from assay.models.checkpoint import Checkpoint
    from assay.quantize.store import QuantizedLayer
    from assay.recipe import Gptq, Rtn

    Logits = Callable[[Tensor], NDArray[np.float32]]

SCHEMES = ("W4A16", "W4A16_ASYM")
GROUPED = ("W4A16", "W4A16_ASYM", "W8A16")
JOBS = {
    "rtn": {"method": "rtn", "range": "minmax"},
    "rtn-weighted": {"method": "rtn", "range": "activation_weighted"},
    "gptq": {"method": "gptq", "correction": 0.0},
    "gptq-corrected": {"method": "gptq"},
    "gptq-quarter": {"method": "gptq", "correction": 0.25},
    "gptq-three-quarters": {"method": "gptq", "correction": 0.75},
    "gptq-smoothquant": {"method": "gptq", "transform": "smoothquant"},
    "awq": {"method": "rtn", "transform": "awq"},
    "awq-gptq": {"method": "gptq", "transform": "awq"},
}
PEER_JOBS = ("gptq-W4A16", "gptq-W4A16_ASYM")
UNPACKED = ("int-quantized", "float-quantized", "naive-quantized")
PEER_SCRIPT = Path(__file__).with_name("llm_compressor_job.py")


@dataclass(frozen=True)
class Turn:
    """One job to run: the peer's have no scheme of their own, their name says it."""

    by: str
    job: str
    scheme: str | None = None

    @property
    def directory(self) -> str:
        return f"{self.by}-{self.job}" + (f"-{self.scheme}" if self.scheme else "")


def turns(arguments: argparse.Namespace) -> list[Turn]:
    """Assay's jobs and the peer's in turn, so that a slow minute of the machine falls on both."""
    ours = [Turn("assay", job, scheme) for scheme in arguments.schemes for job in arguments.jobs]
    peers = [Turn("llm-compressor", job) for job in arguments.peer_jobs] if arguments.peer else []
    return [turn for pair in zip_longest(ours, peers) for turn in pair if turn is not None]


def main() -> None:
    arguments = parse(sys.argv[1:])
    if arguments.job:
        run_job(arguments)
    elif arguments.measure:
        for directory, found in zip(arguments.measure, measure(arguments.measure, arguments), strict=True):
            print(json.dumps({"directory": str(directory)} | found), flush=True)
    else:
        with tempfile.TemporaryDirectory() as directory:
            if arguments.model is None:
                take_demo_inputs(arguments, Path(directory))
            run_all(arguments, Path(directory))


def run_all(arguments: argparse.Namespace, workspace: Path) -> None:
    """Each job in a fresh process, one after the other, each measured before the next."""
    tokens = workspace / "calibration.safetensors"
    write_tokens(tokens, arguments)
    for number in range(arguments.rounds):
        for turn in turns(arguments):
            result = {"by": turn.by, "job": turn.job, "scheme": turn.scheme, "round": number}
            result |= {"group_size": arguments.group_size, "samples": arguments.samples}
            if turn.scheme is None:
                result["dtype"] = arguments.peer_dtype
            with tempfile.TemporaryDirectory(dir=workspace) as directory:
                destination = (arguments.keep or Path(directory)) / turn.directory
                cost = run_turn(turn, tokens, destination, arguments)
                print(json.dumps(result | measure([destination], arguments)[0] | cost), flush=True)


def run_turn(turn: Turn, tokens: Path, destination: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Quantize into the directory; seconds of quantizing alone, by the clock and of the processor, peak memory of the process."""
    from assay.host import cores

    model, group_size = str(arguments.model), str(arguments.group_size)
    if turn.scheme is None:
        command = [str(arguments.peer), str(PEER_SCRIPT), model, str(tokens), turn.job, str(destination)]
        command += ["--group-size", group_size, "--dtype", arguments.peer_dtype]
    else:
        command = [sys.executable, __file__, "--model", model, "--job", turn.job, "--scheme", turn.scheme]
        command += ["--group-size", group_size, "--export", arguments.export]
        command += ["--tokens", str(tokens), "--output", str(destination)]
    settings = {"OMP_NUM_THREADS": str(cores()), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | settings)
    return json.loads(finished.stdout.splitlines()[-1])


def run_job(arguments: argparse.Namespace) -> None:
    """Quantize once, in this process, and write what came of it."""
    import torch
    from safetensors.torch import load_file

    from assay.host import cores
    from assay.models.checkpoint import Checkpoint
    from assay.progress import Progress
    from assay.quantize.model import quantize_model
    from assay.quantize.store import LayerStore
    from assay.recipe import Gptq, Rtn

    torch.set_num_threads(cores())
    job = JOBS[arguments.job] | {"scheme": arguments.scheme}
    if arguments.scheme in GROUPED:
        job["group_size"] = arguments.group_size
    settings = (Gptq if job["method"] == "gptq" else Rtn).model_validate(job)
    with tempfile.TemporaryDirectory() as directory:
        store = LayerStore(Path(directory))
        checkpoint = Checkpoint(arguments.model)
        tokens = load_file(arguments.tokens)["tokens"]
        started, worked = time.perf_counter(), time.process_time()
        quantize_model(checkpoint, tokens, settings, store, Progress())
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
        peak = peak_memory_bytes()
        quantized = store.read_all(checkpoint.shape.layers + 1)
        EXPORTS[arguments.export](checkpoint, quantized, settings, arguments.output)
    cost = {"seconds": round(seconds, 1), "cpu_seconds": round(worked, 1), "peak_memory_bytes": peak}
    print(json.dumps(cost), flush=True)


def write_dequantized(
    checkpoint: Checkpoint, quantized: QuantizedLayer, settings: Rtn | Gptq, destination: Path
) -> None:
    """The model in float32 with the dequantized weights in it, which says nothing of quantized activations."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if "A16" not in settings.scheme:
        raise SystemExit(
            f"{settings.scheme} quantizes activations, which weights cannot show: --export compressed-tensors."
        )
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    for name, module in quantized.modules.items():
        model.get_submodule(name).weight.data = module.weight.dequantize()
    for name, value in quantized.tensors.items():
        model.get_parameter(name).data = value.float()
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(checkpoint.directory).save_pretrained(destination)


def write_compressed_tensors(
    checkpoint: Checkpoint, quantized: QuantizedLayer, settings: Rtn | Gptq, destination: Path
) -> None:
    """The checkpoint as `assay compile` writes it."""
    from assay.recipe import Recipe
    from assay.targets.compressed_tensors import build_candidate

    # Of a recipe the target reads only how to quantize.
    recipe = Recipe.model_construct(quantize=settings)
    build_candidate(checkpoint, quantized, recipe, checkpoint.directory, destination)


EXPORTS = {"dequantized": write_dequantized, "compressed-tensors": write_compressed_tensors}


def measure(directories: list[Path], arguments: argparse.Namespace) -> list[dict[str, float]]:
    """The yardstick: KL(float ‖ quantized) per token and how often both put the same token first."""
    import torch

    from assay.host import cores

    torch.set_num_threads(cores())
    before, after = load(arguments.model), [load(directory) for directory in directories]

    def compare(text: Path) -> list[tuple[float, float]]:
        return divergences(before, after, windows(arguments.model, text, arguments.windows, arguments.length))

    rows = [{"kl_mean": kl, "top1_agreement": agreed} for kl, agreed in compare(arguments.evaluation)]
    if arguments.held_out:
        for row, (kl, agreed) in zip(rows, compare(arguments.held_out), strict=True):
            row |= {"kl_held_out": kl, "top1_agreement_held_out": agreed}
    return rows


def divergences(before: Logits, after: list[Logits], tokens: Tensor) -> list[tuple[float, float]]:
    """Mean KL in nats and top-1 agreement over all windows, of each model."""
    from assay_evals.quality.divergence import divergence

    kl: list[list[float]] = [[] for _ in after]
    agreed: list[list[int]] = [[] for _ in after]
    for window in tokens:
        expected = before(window)
        for index, model in enumerate(after):
            found = divergence(expected, model(window), tuple(window.tolist()))
            kl[index] += found.kl
            agreed[index] += found.agreed
    return [(sum(one) / len(one), sum(same) / len(same)) for one, same in zip(kl, agreed, strict=True)]


def load(directory: Path) -> Logits:
    """A Hugging Face directory's float32 logits of a window, with activations quantized as the checkpoint says.

    By transformers alone where it can run the checkpoint in float32, else by Assay's oracle. Where both can, they agree to the last bit.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from assay_evals.runtimes.transformers_oracle import TransformersRuntime

    if not transformers_runs(directory):
        runtime = TransformersRuntime(directory)
        return lambda window: runtime.logits(window.tolist())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    quantize_ragged_groups(model)

    def logits(window: Tensor) -> NDArray[np.float32]:
        with torch.inference_mode():
            return model(window[None]).logits[0].float().numpy()

    return logits


def transformers_runs(directory: Path) -> bool:
    """Not so for packed weights: 5.23 cannot read packed zero points, and unpacks 4-bit floats to bfloat16 only."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    return config.get("quantization_config", {"format": "int-quantized"})["format"] in UNPACKED


def quantize_ragged_groups(model: Any) -> None:
    """Quantize inputs whose width is no multiple of the group size with a shorter last group; compressed-tensors raises for them.

    That is what FP8_BLOCK (groups of 128) does with 576 channels in kernels that mask the last block.
    """
    import torch
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    def hook(module: Any, inputs: tuple[Tensor, ...]) -> Tensor:
        arguments, width = module.quantization_scheme.input_activations, inputs[0].shape[-1]
        padded = torch.nn.functional.pad(inputs[0], (0, -width % arguments.group_size))
        return forward_quantize(module, padded, "input", arguments)[..., :width]

    for module in model.modules():
        arguments = getattr(getattr(module, "quantization_scheme", None), "input_activations", None)
        if arguments and arguments.dynamic and arguments.group_size and module.in_features % arguments.group_size:
            # The weights are decompressed all the same; only the inputs' quantization is taken over.
            module.quantization_enabled = False
            module.register_forward_pre_hook(hook)


def windows(model: Path, text: Path, count: int, length: int) -> Tensor:
    """int64 [samples, length], the beginning of a text: `count` windows, or as many as it fills."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(plain_text(text), return_tensors="pt", verbose=False).input_ids[0]
    count = min(count, len(ids) // length)
    if count == 0:
        raise SystemExit(f"{text}: {len(ids)} tokens do not fill a window of {length}.")
    return ids[: count * length].view(count, length)


def write_tokens(path: Path, arguments: argparse.Namespace) -> None:
    """The calibration tokens as every job gets them."""
    from safetensors.torch import save_file

    tokens = windows(arguments.model, arguments.calibration, arguments.samples, arguments.length)
    if len(tokens) < arguments.samples:
        raise SystemExit(f"{arguments.calibration}: only {len(tokens)} windows of {arguments.length} tokens.")
    save_file({"tokens": tokens.contiguous()}, path)


def plain_text(path: Path) -> str:
    """WikiText's tokenized joins undone; of JSON lines every row's `text`, or its `context` and `continuation`, between empty lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return "\n\n".join(_texts(text))
    for joined, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(joined, plain)
    return text


def _texts(lines: str) -> Iterator[str]:
    for line in filter(None, lines.split("\n")):
        row = json.loads(line)
        yield row["text"] if "text" in row else f"{row['context']} {row['continuation']}"


def take_demo_inputs(arguments: argparse.Namespace, directory: Path) -> None:
    """The demo's model with its channels shuffled, and the two parts of Python's documentation as files."""
    from shuffled_model import write_shuffled_model

    from assay.text import python_docs

    arguments.model = directory / "model"
    write_shuffled_model(arguments.model)
    for part in ("calibration", "evaluation"):
        path = directory / f"{part}.txt"
        path.write_text("\n".join(str(document.content) for document in python_docs(part)), encoding="utf-8")
        setattr(arguments, part, path)


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--held-out", type=Path, help="a second text to measure on: plain, or JSON lines")
    parser.add_argument("--jobs", type=_names, default="rtn,rtn-weighted,gptq,gptq-corrected")
    parser.add_argument("--schemes", type=_names, default=",".join(SCHEMES))
    parser.add_argument("--peer", type=Path, help="the Python of an environment with llm-compressor")
    parser.add_argument("--peer-jobs", type=_names, default=",".join(PEER_JOBS))
    parser.add_argument(
        "--peer-dtype", choices=("auto", "float32"), default="auto", help="auto: as the weights are stored"
    )
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--export", choices=EXPORTS, default="dequantized", help="what Assay's jobs are measured from")
    parser.add_argument("--keep", type=Path, help="directory to keep the models in, for other yardsticks")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measure", type=Path, nargs="+", help="only measure these directories")
    for hidden in ("--job", "--scheme"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--tokens", "--output"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if unknown := sorted(set(arguments.jobs) - set(JOBS)):
        parser.error(f"--jobs: {', '.join(unknown)} unknown; there are {', '.join(JOBS)}.")
    if arguments.peer and not arguments.peer.is_file():
        parser.error(f"--peer: {arguments.peer} is no file; give the python of an environment with llmcompressor.")
    if arguments.measure and not (arguments.model and arguments.evaluation):
        parser.error("--measure needs --model and --evaluation.")
    if (
        arguments.model
        and not (arguments.measure or arguments.job)
        and not (arguments.calibration and arguments.evaluation)
    ):
        parser.error("--model needs --calibration and --evaluation.")
    return arguments


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    main()
