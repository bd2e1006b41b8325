"""A JSON Schema enforced while a model writes: llguidance tells at each step which tokens may follow.

It works on the runtime's own scores, so that it is one mechanism for every runtime. onnxruntime-genai has a guidance of its own
(`GeneratorParams.set_guidance`), built on the same library and giving the same tokens; it does not tell what it costs, and transformers
has none.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assay.errors import UsageError

_INSTALL = "pip install 'assay[structured]'"


def enforcing_library() -> str:
    """The library that enforces, with its version; UsageError when it, or the one that validates, is not there."""
    try:
        metadata.version("jsonschema")
        return f"llguidance {metadata.version('llguidance')}"
    except metadata.PackageNotFoundError as error:
        raise UsageError(f"evaluate.structured needs {error.name}, which is not installed: {_INSTALL}.") from error


class SchemaError(Exception):
    """The enforcing library cannot compile a schema; the message is its own."""


class Enforcer:
    """The vocabulary of a model, for which schemas are compiled.  ends: the tokens that end its text."""

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        from llguidance.hf import from_tokenizer

        try:
            self._tokenizer = from_tokenizer(tokenizer, eos_token=sorted(ends))
        except ValueError as error:
            raise UsageError(f"evaluate.structured: llguidance cannot read the model's tokenizer: {error}") from error
        self._ends = frozenset(ends)

    def compile(self, schema: Any) -> Constraint:
        """A schema ready for one text; SchemaError names what the library does not take."""
        return Constraint(self._tokenizer, self._ends, schema)


class Constraint:
    """A schema, and how much of its text has been written.  Picks the likeliest token of those that may follow.

    compile_seconds: from the schema to what may come first, which is what its first use costs.  step_seconds: for each token after the
    first what the constraint took: telling what may follow, picking from it, and taking note of it.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int], schema: Any) -> None:
        from llguidance import LLMatcher

        self._ends = ends
        started = time.perf_counter()
        try:
            # Silent: what is wrong is raised.
            self._matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema), log_level=0)
        except ValueError as error:
            raise SchemaError(_sentence(str(error))) from error
        if self._matcher.is_error():
            raise SchemaError(_sentence(self._matcher.get_error()))
        self._allowed = self._mask()
        self.compile_seconds = time.perf_counter() - started
        self.step_seconds: list[float] = []

    def pick(self, scores: NDArray[np.float32]) -> int | None:
        """The next token by its scores, float32 [vocabulary]; None where the text ends."""
        started = time.perf_counter()
        if self._matcher.is_stopped():
            return None
        allowed = self._mask() if self._allowed is None else self._allowed
        first, self._allowed = self._allowed is not None, None
        count = min(len(scores), len(allowed))
        token = int(np.where(allowed[:count], scores[:count], -np.inf).argmax())
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise SchemaError(_sentence(self._matcher.get_error()))
        if not first:
            self.step_seconds.append(time.perf_counter() - started)
        return None if token in self._ends else token

    def _mask(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little").view(np.bool_)


def _sentence(message: str) -> str:
    """The first line of a message of the library, which goes on with its inner state."""
    return message.strip().split("\n")[0].strip()
