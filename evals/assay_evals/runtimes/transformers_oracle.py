"""Hugging Face directories, run by transformers on the CPU in float32: the oracle, exact and slow.

compressed-tensors checkpoints are dequantized by the package compressed-tensors, in float32, so that the model's weights are
exactly what the files say. transformers' own loading is no oracle (5.23 with compressed-tensors 0.20): with `dequantize=True` it
multiplies in the scales' bfloat16 and reads every module by one group's scheme, without it it cannot read packed zero points.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer
from transformers.utils import logging

from assay.errors import AssayError, UsageError
from assay_evals.runtimes.base import Generated, check_length, runtime_version


class TransformersRuntime:
    """One loaded Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self.name = runtime_version("transformers")
        try:
            self._model = _load(directory).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
            raise AssayError(f"{directory}: transformers cannot load it: {error}") from error
        self.context_length = int(self._model.config.max_position_embeddings)
        ends = self._model.generation_config.eos_token_id
        self._ends: set[int] = set(ends) if isinstance(ends, list) else {ends}

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        check_length(len(tokens), 0, self.context_length)
        return self._model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()

    @torch.inference_mode()
    def decode_logits(self, tokens: list[int], start: int) -> NDArray[np.float32]:
        check_length(len(tokens), 0, self.context_length)
        cache = self._model(torch.tensor([tokens[:start]]), use_cache=True, logits_to_keep=1).past_key_values
        rows: list[torch.Tensor] = []
        for token in tokens[start:]:
            output = self._model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1].float())
        return torch.stack(rows).numpy()

    @torch.inference_mode()
    def generate(self, prompt: list[int], new_tokens: int, *, stops: bool = False) -> Generated:
        check_length(len(prompt), new_tokens, self.context_length)
        tokens: list[int] = []
        seconds: list[float] = []
        step, cache = torch.tensor([prompt]), None
        started = time.perf_counter()
        for _ in range(new_tokens):
            output = self._model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
            if stops and token in self._ends:
                break
            tokens.append(token)
            seconds.append(time.perf_counter() - started)
            step = torch.tensor([[token]])
        return Generated(tuple(tokens), tuple(seconds))


def _load(directory: Path) -> Any:
    logging.disable_progress_bar()
    config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    source, weights = directory, None
    if getattr(config, "quantization_config", None) is not None:
        source, weights = None, _dequantized(directory)
        del config.quantization_config
    model, report = family.from_pretrained(
        source,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    # transformers makes up random weights for those that it does not find.
    if lost := sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]):
        raise ValueError(f"its tensors are not the model's: {', '.join(lost[:5])}")
    return model


def _dequantized(directory: Path) -> dict[str, torch.Tensor]:
    """Every weight of a compressed-tensors checkpoint by name, the quantized ones dequantized in float32."""
    try:
        from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
    except ImportError as error:
        raise UsageError(
            f"{directory}: to read it takes the package compressed-tensors ({error}): pip install compressed-tensors."
        ) from error
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    # It multiplies in the scales' dtype, and bfloat16 products are rounded.
    tensors = {name: value.float() if name.endswith(".weight_scale") else value for name, value in tensors.items()}
    return CompressedTensorsDequantizer(directory, dtype=torch.float32).validate(tensors)
