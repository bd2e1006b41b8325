"""A GGUF file as a float checkpoint: dequantized to bfloat16, with its tokenizer, in an ordinary Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from assay.errors import AssayError
from assay.models.gguf_header import read_gguf_header


def convert_gguf(path: Path, destination: Path) -> None:
    """Write config.json, model.safetensors (bfloat16) and the tokenizer of a GGUF file; transformers does the dequantizing."""
    read_gguf_header(path)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    except (ValueError, KeyError, OSError, NotImplementedError, RuntimeError) as error:
        raise AssayError(f"{path}: transformers cannot convert this GGUF file: {error}") from error
    finally:
        logging.enable_progress_bar()
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
