"""Hugging Face directories, run by transformers on the CPU in float32: the oracle, exact and slow.

compressed-tensors checkpoints are loaded by transformers itself, which needs the package compressed-tensors.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from assay.errors import AssayError
from assay_evals.runtimes.base import Generated, check_length, runtime_version


class TransformersRuntime:
    """One loaded Hugging Face directory."""

    def __init__(self, directory: Path) -> None:
        self.name = runtime_version("transformers")
        try:
            self._model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
            ).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise AssayError(f"{directory}: transformers cannot load it: {error}") from error
        self.context_length = int(self._model.config.max_position_embeddings)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        check_length(len(tokens), 0, self.context_length)
        return self._model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()

    @torch.inference_mode()
    def generate(self, prompt: list[int], new_tokens: int) -> Generated:
        check_length(len(prompt), new_tokens, self.context_length)
        tokens: list[int] = []
        seconds: list[float] = []
        step, cache = torch.tensor([prompt]), None
        started = time.perf_counter()
        for _ in range(new_tokens):
            output = self._model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
            tokens.append(token)
            seconds.append(time.perf_counter() - started)
            step = torch.tensor([[token]])
        return Generated(tuple(tokens), tuple(seconds))
