"""How far quantized models are from the float model, and how long and how much memory quantizing takes.

    .venv/bin/python benchmarks/quantizers.py [--model DIRECTORY --calibration TEXT --evaluation TEXT] [--jobs rtn,gptq,…]

Without a model it takes the demo's with its channels shuffled (shuffled_model.py), because its weights lie on a 4-bit grid already, and
the two parts of Python's documentation.

Every job quantizes the same model on the same calibration tokens in a fresh process, jobs in turn, --rounds times; the divergence
is measured in float32 with the dequantized weights put into the model. Prints one JSON line per job and round.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCHEMES = ("W4A16", "W4A16_ASYM")
JOBS = {
    "rtn": {"method": "rtn", "range": "minmax"},
    "rtn-weighted": {"method": "rtn", "range": "activation_weighted"},
    "gptq": {"method": "gptq", "correction": 0.0},
    "gptq-corrected": {"method": "gptq"},
    "gptq-quarter": {"method": "gptq", "correction": 0.25},
    "gptq-three-quarters": {"method": "gptq", "correction": 0.75},
}


def plain_text(path: Path) -> str:
    """WikiText's tokenized joins undone."""
    text = path.read_text(encoding="utf-8")
    for joined, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(joined, plain)
    return text


def run_job(arguments: argparse.Namespace) -> None:
    """Quantize once and measure, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from assay.host import cores
    from assay.models.checkpoint import Checkpoint
    from assay.progress import Progress
    from assay.quantize.model import quantize_model
    from assay.quantize.store import LayerStore
    from assay.recipe import Gptq, Rtn
    from assay_evals.quality.divergence import divergence

    torch.set_num_threads(cores())
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def windows(path: Path, count: int) -> torch.Tensor:
        ids = tokenizer(plain_text(path), return_tensors="pt", verbose=False).input_ids[0]
        return ids[: count * arguments.length].view(count, arguments.length)

    job = JOBS[arguments.job] | {"scheme": arguments.scheme, "group_size": arguments.group_size}
    settings = (Gptq if job["method"] == "gptq" else Rtn).model_validate(job)
    with tempfile.TemporaryDirectory() as directory:
        store = LayerStore(Path(directory))
        checkpoint = Checkpoint(arguments.model)
        tokens = windows(arguments.calibration, arguments.samples)
        started = time.perf_counter()
        quantize_model(checkpoint, tokens, settings, store, Progress())
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        models = [AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval() for _ in range(2)]
        for index in range(checkpoint.shape.layers + 1):
            for name, module in (store.read(index) if store.holds(index) else {}).items():
                models[1].get_submodule(name).weight.data = module.weight.dequantize()
    if arguments.keep:
        models[1].save_pretrained(arguments.keep / f"{arguments.job}-{arguments.scheme}")
        tokenizer.save_pretrained(arguments.keep / f"{arguments.job}-{arguments.scheme}")
    kl: list[float] = []
    agreed: list[int] = []
    with torch.inference_mode():
        for window in windows(arguments.evaluation, arguments.windows):
            before, after = (model(window[None]).logits[0].numpy() for model in models)
            found = divergence(before, after, tuple(window.tolist()))
            kl += found.kl
            agreed += found.agreed
    result = {"job": arguments.job, "scheme": arguments.scheme, "group_size": arguments.group_size}
    result |= {"kl_mean": sum(kl) / len(kl), "top1_agreement": sum(agreed) / len(agreed)}
    print(json.dumps(result | {"seconds": round(seconds, 1), "peak_memory_bytes": peak}), flush=True)


def demo_inputs(directory: Path) -> list[str]:
    """Arguments for the demo's model with its channels shuffled, and the two parts of Python's documentation as files."""
    from shuffled_model import write_shuffled_model

    from assay.text import python_docs

    write_shuffled_model(directory / "model")
    arguments = ["--model", str(directory / "model")]
    for part in ("calibration", "evaluation"):
        path = directory / f"{part}.txt"
        path.write_text("\n".join(str(document.content) for document in python_docs(part)), encoding="utf-8")
        arguments += [f"--{part}", str(path)]
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--evaluation", type=Path)
    parser.add_argument("--jobs", default="rtn,rtn-weighted,gptq,gptq-corrected")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="directory to save the dequantized models in, for other yardsticks")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--scheme", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        run_job(arguments)
        return
    with tempfile.TemporaryDirectory() as directory:
        given = [*sys.argv[1:], *(demo_inputs(Path(directory)) if arguments.model is None else ())]
        run_all(arguments, given)


def run_all(arguments: argparse.Namespace, given: list[str]) -> None:
    """Each job in a fresh process, one after the other."""
    for _ in range(arguments.rounds):
        for scheme in arguments.schemes.split(","):
            for job in arguments.jobs.split(","):
                subprocess.run([sys.executable, __file__, *given, "--job", job, "--scheme", scheme], check=True)


if __name__ == "__main__":
    main()
