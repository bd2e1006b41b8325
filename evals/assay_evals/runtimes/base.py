"""What evaluation needs of a runtime: logits for scoring, step-wise generation with timestamps, its own tokenizer; of an encoder's, vectors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from assay.errors import NotSupportedError, UsageError


@dataclass(frozen=True)
class Generated:
    """New token ids, and for each the seconds from the request to it."""

    tokens: tuple[int, ...]
    token_seconds: tuple[float, ...]


# Picks the next token by its scores, float32 [vocabulary]; None ends the text.
Pick = Callable[[NDArray[np.float32]], int | None]


class Turns(Protocol):
    """A request in flight, computed a token at a time."""

    def step(self) -> int | None:
        """Compute the next token, the first from the whole prompt; None when the text has ended instead."""
        ...


class Runtime(Protocol):
    """A model loaded for one runtime on this machine.  ends: the tokens that end its text."""

    name: str
    context_length: int
    ends: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Token ids by the tokenizer that this runtime serves with."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids."""
        ...

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Scores of the next token after every prefix: float32 [len(tokens), vocabulary]."""
        ...

    def decode_logits(self, tokens: list[int], start: int) -> NDArray[np.float32]:
        """The scores after each token from `start` on, fed one at a time after the others: float32 [len(tokens) − start, vocabulary]."""
        ...

    def generate(self, prompt: list[int], new_tokens: int, *, stops: bool = False, cached: int = 0) -> Generated:
        """Exactly `new_tokens` greedy tokens after the prompt, each with its time.

        stops: only those before the end of text.  cached: how many of the prompt's first tokens an earlier request, which went on
        differently after them, left in the cache before the time starts.
        """
        ...

    def begin(self, prompt: list[int], new_tokens: int, *, stops: bool) -> Turns:
        """A greedy request that is still to be computed.  stops: at the end of its text."""
        ...

    def generate_picked(self, prompt: list[int], new_tokens: int, pick: Pick) -> Generated:
        """At most `new_tokens` tokens after the prompt, each picked by its scores and fed back alone, as when served."""
        ...


class EncoderRuntime(Protocol):
    """An encoder loaded for one runtime on this machine.

    task: what its vectors are, `embedding` or `classification`.  labels: a classifier's classes, in the order of their numbers.
    """

    name: str
    task: str
    max_tokens: int
    labels: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids, its own special tokens included, by the tokenizer that this runtime serves with."""
        ...

    def compute(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Embeddings or class scores of texts, padded to the longest: float32 [len(batch), width]."""
        ...


_RUNTIMES = {
    "onnxruntime-genai": "assay_evals.runtimes.onnxruntime_genai:OnnxRuntimeGenaiRuntime",
    "transformers": "assay_evals.runtimes.transformers_oracle:TransformersRuntime",
}
# How requests share a runtime; the others compute one at a time.
SHARED = {"onnxruntime-genai": "a generator for each request, one token in turn"}
_ENCODERS = {"onnxruntime": "assay_evals.runtimes.onnxruntime:OnnxRuntimeEncoder"}


def open_runtime(name: str, directory: Path, *, threads: int | None = None) -> Runtime:
    """Load a model directory into a runtime; UsageError names what to install when the runtime is absent.

    threads: how many to compute with, for scoring; as many as it serves with, unless given.
    """
    check_runtime(name, directory)
    return cast(Runtime, _open(_RUNTIMES, name, directory, threads))


def open_encoder(name: str, directory: Path, *, threads: int | None = None) -> EncoderRuntime:
    """Load an encoder's directory, as `open_runtime` does a decoder's."""
    check_runtime(name, directory, _ENCODERS)
    return cast(EncoderRuntime, _open(_ENCODERS, name, directory, threads))


def _open(table: dict[str, str], name: str, directory: Path, threads: int | None) -> Any:
    module, _, attribute = table[name].partition(":")
    try:
        opener = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UsageError(f"the runtime {name} is not installed ({error}): pip install 'assay[compile,cpu]'.") from error
    return opener(directory, threads)


def check_runtime(name: str, directory: Path, table: dict[str, str] = _RUNTIMES) -> None:
    """NotSupportedError when this release cannot load a directory for such a runtime.  table: of decoders' runtimes, unless given."""
    if name not in table:
        kind = " for decoders" if name in _ENCODERS else " for encoders" if name in _RUNTIMES else ""
        raise NotSupportedError(f"{directory}: there is no runtime {name}{kind}; this release has {', '.join(table)}.")


def runtime_version(name: str) -> str:
    """The runtime with its version, as evidence names it, without loading anything."""
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError as error:
        raise UsageError(f"the runtime {name} is not installed: pip install 'assay[compile,cpu]'.") from error


def end_tokens(declared: int | list[int] | None) -> frozenset[int]:
    """The tokens that end a text, as a model's configuration has them: one, several, or none."""
    return frozenset([] if declared is None else declared if isinstance(declared, list) else [declared])


def check_length(tokens: int, new_tokens: int, context_length: int) -> None:
    """UsageError when a request cannot fit the model's context."""
    if not tokens:
        raise UsageError("the prompt has no tokens; give it some text.")
    if tokens + new_tokens > context_length:
        raise UsageError(
            f"{tokens} prompt tokens and {new_tokens} new ones exceed the model's context of {context_length}; shorten the prompt "
            "or ask for fewer tokens."
        )


@dataclass(frozen=True)
class Continuation:
    """A prompt continued by an artifact, and how fast; None where too few tokens came to tell."""

    prompt: str
    text: str
    time_to_first_token_seconds: float | None
    decode_tokens_per_second: float | None


def generate_text(name: str, directory: Path, prompt: str, new_tokens: int) -> Continuation:
    """Continue a prompt greedily on a runtime, for some tokens or until the model ends its text."""
    runtime = open_runtime(name, directory)
    generated = runtime.generate(runtime.encode(prompt), new_tokens, stops=True)
    seconds = generated.token_seconds
    rate = (len(seconds) - 1) / (seconds[-1] - seconds[0]) if len(seconds) > 1 else None
    text = runtime.decode(list(generated.tokens)) if generated.tokens else ""
    return Continuation(prompt, text, seconds[0] if seconds else None, rate)
