"""Models compiled for onnxruntime-genai, run by onnxruntime-genai."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
from numpy.typing import NDArray

from assay.artifact import refuse_code
from assay.errors import AssayError, IntegrityError
from assay.files import read_json
from assay_evals.runtimes.base import Generated, Pick, Turns, check_length, end_tokens, runtime_version

# The package loads its names from a compiled module at run time: the type checker cannot see them.
og: Any = onnxruntime_genai


class OnnxRuntimeGenaiRuntime:
    """One loaded model directory (genai_config.json, model.onnx, tokenizer).

    Requests side by side are generators of one model, a token in turn. The package's Engine batches what a graph with contiguous caches has
    by four that start together, and a fifth waits until the longest of them has ended; its continuous batching needs PagedAttention, of
    which onnxruntime has no kernel for CPUs.
    """

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        """threads: of a session; onnxruntime-genai takes half of the processors by itself."""
        og.disable_telemetry_events()
        self.name = runtime_version("onnxruntime-genai")
        try:
            refuse_code(directory)
            config = read_json(directory / "genai_config.json")["model"]
            self.context_length = int(config["context_length"])
            self.ends = end_tokens(config["eos_token_id"])
            loaded = og.Config(str(directory))
            if threads is not None:
                options = {"session_options": {"intra_op_num_threads": threads}}
                loaded.overlay(json.dumps({"model": {"decoder": options}}))
            self._model = og.Model(loaded)
            self._tokenizer = og.Tokenizer(self._model)
        except IntegrityError:
            raise
        except Exception as error:
            raise AssayError(f"{directory}: onnxruntime-genai cannot load it: {error}") from error

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text)]

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(np.array(tokens, dtype=np.int32)))

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        check_length(len(tokens), 0, self.context_length)
        generator = self._generator(len(tokens))
        generator.append_tokens(np.array([tokens], dtype=np.int32))
        return np.asarray(generator.get_output("logits"), dtype=np.float32)[0]

    def decode_logits(self, tokens: list[int], start: int) -> NDArray[np.float32]:
        check_length(len(tokens), 0, self.context_length)
        generator = self._generator(len(tokens))
        generator.append_tokens(np.array([tokens[:start]], dtype=np.int32))
        rows: list[NDArray[np.float32]] = []
        for token in tokens[start:]:
            generator.append_tokens(np.array([[token]], dtype=np.int32))
            rows.append(np.array(generator.get_output("logits"), dtype=np.float32)[0, -1])
        return np.stack(rows)

    def generate(self, prompt: list[int], new_tokens: int, *, stops: bool = False, cached: int = 0) -> Generated:
        check_length(len(prompt), new_tokens, self.context_length)
        length = len(prompt) + new_tokens
        generator = self._generator(length, **({} if stops else {"min_length": length}))
        if cached:
            self._leave_in_cache(generator, prompt[:cached])
        seconds: list[float] = []
        started = time.perf_counter()
        generator.append_tokens(np.array([prompt[cached:]], dtype=np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            seconds.append(time.perf_counter() - started)
            if stops and generator.is_done():
                break
        tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
        # The token that ends the text is no part of the sequence.
        return Generated(tuple(tokens), tuple(seconds[: len(tokens)]))

    def begin(self, prompt: list[int], new_tokens: int, *, stops: bool) -> Turns:
        check_length(len(prompt), new_tokens, self.context_length)
        length = len(prompt) + new_tokens
        return _GeneratorTurns(self._generator(length, **({} if stops else {"min_length": length})), prompt)

    def generate_picked(self, prompt: list[int], new_tokens: int, pick: Pick) -> Generated:
        check_length(len(prompt), new_tokens, self.context_length)
        generator = self._generator(len(prompt) + new_tokens)
        tokens: list[int] = []
        seconds: list[float] = []
        started = time.perf_counter()
        step = prompt
        while len(tokens) < new_tokens:
            generator.append_tokens(np.array([step], dtype=np.int32))
            token = pick(np.asarray(generator.get_logits(), dtype=np.float32)[0, -1])
            if token is None:
                break
            tokens.append(token)
            seconds.append(time.perf_counter() - started)
            step = [token]
        return Generated(tuple(tokens), tuple(seconds))

    @staticmethod
    def _leave_in_cache(generator: Any, prefix: list[int]) -> None:
        """What an earlier request leaves: it went on after the prefix, so that something has to be forgotten."""
        generator.append_tokens(np.array([prefix], dtype=np.int32))
        for _ in range(2):
            # The cache holds a token once the next one is computed from it.
            generator.generate_next_token()
        generator.rewind_to(len(prefix))

    def _generator(self, max_length: int, **options: Any) -> Any:
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length, do_sample=False, **options)
        return og.Generator(self._model, params)


class _GeneratorTurns:
    """A request in flight: a generator with a cache of its own."""

    def __init__(self, generator: Any, prompt: list[int]) -> None:
        self._generator, self._prompt = generator, prompt
        self._length = len(prompt)

    def step(self) -> int | None:
        if self._prompt:
            self._generator.append_tokens(np.array([self._prompt], dtype=np.int32))
            self._prompt = []
        elif self._generator.is_done():
            return None
        self._generator.generate_next_token()
        length, self._length = self._length, int(self._generator.token_count())
        # The token that ends the text is no part of the sequence.
        return int(self._generator.get_next_tokens()[0]) if self._length > length else None
