"""A GGUF file as a float checkpoint: dequantized to bfloat16, with its tokenizer, in an ordinary Hugging Face directory.

transformers does the work. What it would convert wrongly without a word is refused: weights that the file lacks, or that the
model has no place for.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from assay.errors import AssayError
from assay.models.gguf_header import GgufHeader, read_gguf_header
from assay.models.source import gguf_configuration


def convert_gguf(path: Path, destination: Path) -> None:
    """Write config.json, model.safetensors (bfloat16) and the tokenizer of a GGUF file.

    AssayError when the file cannot be converted, IntegrityError when it is cut short; then nothing is written.
    """
    header = read_gguf_header(path)
    gguf_configuration(header, str(path))
    with _quiet():
        model, tokenizer = _load(path, header)
        model.save_pretrained(destination)
        tokenizer.save_pretrained(destination)
    for file in destination.iterdir():
        file.chmod(0o644)


def _load(path: Path, header: GgufHeader) -> tuple[Any, Any]:
    """The model, dequantized, and its tokenizer."""
    try:
        # Alone in a directory: transformers would also read a config.json or tokenizer.json that lies beside the file.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / path.name).symlink_to(path.resolve())
            given: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(alone, **given)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                alone,
                **given,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        # Any kind: what transformers raises for broken content depends on what is broken.
        raise AssayError(
            f"{path}: transformers cannot convert this GGUF file ({type(error).__name__}: {error})."
        ) from error
    model, loading = loaded
    misshapen = {name for name, *_ in loading["mismatched_keys"]}
    if wrong := sorted(misshapen | set(loading["missing_keys"])):
        kind = "of another shape than its metadata says" if wrong[0] in misshapen else "not in the file"
        raise AssayError(f"{path}: {len(wrong)} of the model's weights cannot be had; {wrong[0]} is {kind}.")
    held = sum(math.prod(tensor.shape) for tensor in header.tensors)
    if held != (kept := sum(parameter.numel() for parameter in model.parameters())):
        raise AssayError(
            f"{path}: the file holds {held:,} numbers, but the model has a place for {kept:,}: it is of another kind than it "
            "says. Use the original safetensors checkpoint."
        )
    # The weights are plain numbers now, and config.json must not say otherwise.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # How they were loaded here is no fact about the model: the same file has to give the same bytes, online and offline.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    return model, tokenizer


@contextmanager
def _quiet() -> Generator[None]:
    """Keep transformers' progress bars and advice off the terminal; errors are raised, not printed."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
