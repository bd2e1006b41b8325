"""Hugging Face directories, run by transformers on the CPU in float32: the oracle, exact and slow.

Quantized checkpoints are dequantized by dequantized.py, so that the model's weights are exactly what the files say. transformers' own
loading is no oracle (5.23 with compressed-tensors 0.20): with `dequantize=True` it multiplies in the scales' bfloat16 and reads
every module by one group's scheme, without it it cannot read packed zero points; AWQ and GPTQ it leaves to another package.

Where a scheme quantizes activations or the key/value cache, so does the oracle, by compressed-tensors' own definition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, DynamicCache
from transformers.utils import logging

from assay.errors import AssayError
from assay.models.dequantized import dequantize
from assay_evals.runtimes.base import Generated, Pick, Turns, check_length, end_tokens, runtime_version


class TransformersRuntime:
    """One loaded Hugging Face directory."""

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = runtime_version("transformers")
        try:
            self._model, self._cache_scales = _load(directory)
            self._model.eval()
            self._tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
            raise AssayError(f"{directory}: transformers cannot load it: {error}") from error
        self.context_length = int(self._model.config.max_position_embeddings)
        self.ends = end_tokens(self._model.generation_config.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        check_length(len(tokens), 0, self.context_length)
        return self._model(torch.tensor([tokens]), past_key_values=self._cache()).logits[0].float().numpy()

    @torch.inference_mode()
    def decode_logits(self, tokens: list[int], start: int) -> NDArray[np.float32]:
        check_length(len(tokens), 0, self.context_length)
        cache = self._cache()
        self._model(torch.tensor([tokens[:start]]), past_key_values=cache, logits_to_keep=1)
        rows: list[torch.Tensor] = []
        for token in tokens[start:]:
            output = self._model(torch.tensor([[token]]), past_key_values=cache)
            rows.append(output.logits[0, -1].float())
        return torch.stack(rows).numpy()

    def generate(self, prompt: list[int], new_tokens: int, *, stops: bool = False, cached: int = 0) -> Generated:
        def greedy(scores: NDArray[np.float32]) -> int | None:
            token = int(scores.argmax())
            return None if stops and token in self.ends else token

        return self._continue(prompt, new_tokens, greedy, cached)

    def begin(self, prompt: list[int], new_tokens: int, *, stops: bool) -> Turns:
        check_length(len(prompt), new_tokens, self.context_length)
        return _OracleTurns(self._next_scores, prompt, self._cache(), self.ends if stops else frozenset())

    def generate_picked(self, prompt: list[int], new_tokens: int, pick: Pick) -> Generated:
        return self._continue(prompt, new_tokens, pick, cached=0)

    @torch.inference_mode()
    def _continue(self, prompt: list[int], new_tokens: int, pick: Pick, cached: int) -> Generated:
        check_length(len(prompt), new_tokens, self.context_length)
        tokens: list[int] = []
        seconds: list[float] = []
        step, cache = prompt[cached:], self._cache()
        if cached:
            self._leave_in_cache(cache, prompt[:cached])
        started = time.perf_counter()
        for _ in range(new_tokens):
            token = pick(self._next_scores(step, cache))
            if token is None:
                break
            tokens.append(token)
            seconds.append(time.perf_counter() - started)
            step = [token]
        return Generated(tuple(tokens), tuple(seconds))

    @torch.inference_mode()
    def _next_scores(self, step: list[int], cache: Any) -> NDArray[np.float32]:
        return self._model(torch.tensor([step]), past_key_values=cache, logits_to_keep=1).logits[0, -1].float().numpy()

    def _leave_in_cache(self, cache: Any, prefix: list[int]) -> None:
        """What an earlier request leaves: it went on after the prefix, so that something has to be forgotten."""
        token = self._model(torch.tensor([prefix]), past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()
        self._model(token.reshape(1, 1), past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)

    def _cache(self) -> Any:
        if self._cache_scales:
            return _QuantizedCache(self._model.config, self._cache_scales)
        return DynamicCache(config=self._model.config)


class _OracleTurns:
    """A request in flight.  next_scores: of the token after others, which go into the cache."""

    def __init__(
        self,
        next_scores: Callable[[list[int], Any], NDArray[np.float32]],
        prompt: list[int],
        cache: Any,
        ends: frozenset[int],
    ) -> None:
        self._next_scores, self._step, self._cache, self._ends = next_scores, prompt, cache, ends

    def step(self) -> int | None:
        token = int(self._next_scores(self._step, self._cache).argmax())
        self._step = [token]
        return None if token in self._ends else token


class _QuantizedCache(DynamicCache):
    """A key/value cache in 8-bit floats. scales: layer → the scales of its keys and of its values."""

    def __init__(self, config: Any, scales: Mapping[int, tuple[float, float]]) -> None:
        super().__init__(config=config)
        self._scales = scales

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored = [
            (states / scale).clamp_(-448, 448).to(torch.float8_e4m3fn).float() * scale
            for states, scale in zip((key_states, value_states), self._scales[layer_idx], strict=True)
        ]
        return super().update(stored[0], stored[1], layer_idx, *args, **kwargs)


def _load(directory: Path) -> tuple[Any, dict[int, tuple[float, float]]]:
    """The model in float32, and the scales of its key/value cache where it is to be quantized."""
    logging.disable_progress_bar()
    config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    source, weights, quantized = directory, None, None
    if quantization := getattr(config, "quantization_config", None):
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            tensors |= load_file(path)
        source, quantized = None, dequantize(directory, quantization, tensors)
        weights = quantized.weights
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
    if quantized is None:
        return model, {}
    quantized.quantize_activations(model)
    return model, quantized.cache_scales
