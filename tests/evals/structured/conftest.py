"""Runtimes that write what they are told to, over a real tokenizer; and outputs made to order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from assay_evals.runtimes.base import Generated, Pick


class Scripted:
    """Scores by a script: for each prompt what it wants to write, best first; it goes on with the first that fits what was written.

    Where several texts fit, the next token of each gets a score, the earlier the higher.
    """

    name, context_length = "scripted 1", 100_000

    def __init__(self, tokenizer: Any, scripts: dict[str, list[str]]) -> None:
        self._tokenizer, self._scripts = tokenizer, scripts
        self.ends = frozenset([tokenizer.eos_token_id])

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens)

    def generate(self, prompt: list[int], new_tokens: int, *, stops: bool = False) -> Generated:
        def greedy(scores: NDArray[np.float32]) -> int | None:
            token = int(scores.argmax())
            return None if stops and token in self.ends else token

        return self.generate_picked(prompt, new_tokens, greedy)

    def generate_picked(self, prompt: list[int], new_tokens: int, pick: Pick) -> Generated:
        wanted = [[*self.encode(text), *self.ends] for text in self._scripts[self.decode(prompt)]]
        written: list[int] = []
        while len(written) < new_tokens:
            # Not evenly zero: what fits no script is not a tie.
            scores = np.linspace(0, -1, len(self._tokenizer), dtype=np.float32)
            for rank, tokens in enumerate(wanted):
                if tokens[: len(written)] == written and len(tokens) > len(written):
                    scores[tokens[len(written)]] = max(scores[tokens[len(written)]], 100 - rank)
            token = pick(scores)
            if token is None:
                break
            written.append(token)
        return Generated(tuple(written), tuple(0.01 * (index + 1) for index in range(len(written))))

    logits = decode_logits = None


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model("llama"))


@pytest.fixture(scope="session")
def scripted(tokenizer: Any) -> Callable[[dict[str, list[str]]], Scripted]:
    return lambda scripts: Scripted(tokenizer, scripts)
