"""Encoders compiled for ONNX Runtime, run by ONNX Runtime on the CPU: token ids in, one vector of numbers a text out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from assay.artifact import refuse_code
from assay.errors import AssayError, IntegrityError, NotSupportedError, UsageError
from assay.files import read_json
from assay_evals.runtimes.base import runtime_version

_OUTPUTS = {"embedding": "sentence_embedding", "classification": "logits"}


class OnnxRuntimeEncoder:
    """One loaded model directory (encoder.json, model.onnx, tokenizer.json)."""

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        """threads: to compute with; ONNX Runtime takes as many as there are cores by itself."""
        self.name = runtime_version("onnxruntime")
        try:
            refuse_code(directory)
            settings = read_json(directory / "encoder.json")
            self._output = _OUTPUTS[settings["task"]]
            self.task = str(settings["task"])
            self.max_tokens = int(settings["max_tokens"])
            self.labels = tuple(map(str, settings.get("labels", ())))
            self._pad = int(settings["pad_token_id"])
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            # What a text becomes is not what the file's author padded and cut texts to.
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads or 0
            providers = ["CPUExecutionProvider"]
            self._session = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=providers)
            self._inputs = {value.name for value in self._session.get_inputs()}
        except (IntegrityError, NotSupportedError):
            raise
        except Exception as error:
            # Any kind: the libraries below raise bare Exceptions for files that they cannot read.
            raise AssayError(f"{directory}: onnxruntime cannot load it: {error}") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def compute(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        longest = max(map(len, batch), default=0)
        if not batch or min(map(len, batch)) < 1 or longest > self.max_tokens:
            raise UsageError(f"a text of {longest} tokens; the encoder takes 1 to {self.max_tokens}. Shorten it.")
        tokens = np.full((len(batch), longest), self._pad, dtype=np.int64)
        mask = np.zeros_like(tokens)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(tokens)}
        wanted = {name: value for name, value in given.items() if name in self._inputs}
        return np.asarray(self._session.run([self._output], wanted)[0], dtype=np.float32)
