"""What was pulled is loaded and run by the libraries themselves, as they would be without Assay."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import assay
from assay.files import readable_json
from assay.serving.make import make_serving

MakeRecipe = Callable[..., Path]
PROMPT = "The assert statement"


@pytest.mark.slow
def test_onnxruntime_genai_runs_what_is_written_for_it(genai_model: Callable[[str], Path], tmp_path: Path) -> None:
    """generate.py streams the tokens that our runtime generates."""
    import onnxruntime_genai as og

    from assay_evals.runtimes.base import open_runtime

    artifact = shutil.copytree(genai_model("llama"), tmp_path / "m")
    about = {"version": 1, "name": "m", "target": "onnxruntime-genai", "runtime": "onnxruntime-genai", "layers": []}
    (artifact / "manifest.json").write_bytes(readable_json(about))
    serving = make_serving(artifact, "onnxruntime-genai")
    command = [sys.executable, *serving.command[1:-1], PROMPT, "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    runtime = open_runtime("onnxruntime-genai", artifact)
    tokens = runtime.generate(runtime.encode(PROMPT), 6, stops=True).tokens
    stream = og.Tokenizer(og.Model(str(artifact))).create_stream()
    assert tokens and done.stdout == PROMPT + "".join(map(stream.decode, tokens)) + "\n"


@pytest.mark.slow
def test_transformers_loads_a_pulled_checkpoint_and_generates(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from assay.pipeline import compile_recipe
    from assay.progress import Progress
    from assay.recipe_file import load_recipe
    from assay.workspace import Workspace

    recipe, _ = load_recipe(make_recipe(tmp_path / "job", publish={"registry": str(tmp_path / "store")}))
    outcome = compile_recipe(recipe, tmp_path / "job", Workspace(tmp_path / "work", Progress()))
    assert outcome.receipt is not None
    pulled = assay.pull(outcome.receipt.reference, tmp_path / "m", registry=tmp_path / "store", stack="vllm")
    model = AutoModelForCausalLM.from_pretrained(pulled.directory)
    tokens = AutoTokenizer.from_pretrained(pulled.directory)(PROMPT, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape[1] == tokens["input_ids"].shape[1] + 4
    assert assay.verify(pulled.directory, pulled.digest).digest == pulled.digest
