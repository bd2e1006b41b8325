"""Prompts and what may follow them as tokens, by the rules of lm-evaluation-harness, so that scores can be compared.

Source: lm_eval 0.4.13, api/model.py (TemplateLM._encode_pair and loglikelihood) and models/huggingface.py (tok_encode). One thing is
left out on purpose: what is longer than the model's context is not cut there, but refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Encoder:
    """The tokenizer that the model was made with; both arms are checked to have the same one.

    templated: the text comes from a chat template, which writes the tokens that a text begins with itself.
    """

    tokenizer: Any
    templated: bool = False

    @cached_property
    def beginning(self) -> list[int]:
        """The tokens that the tokenizer puts before every text, such as <s>."""
        bare, whole = (
            self.tokenizer("a", add_special_tokens=special, verbose=False).input_ids for special in (False, True)
        )
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start]
        return []

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text that the model is to go on from; at least one."""
        tokens = list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        beginning = self.beginning
        if not self.templated and tokens[: len(beginning)] != beginning:
            tokens = beginning + tokens
        if tokens:
            return tokens
        first = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if first is None else first]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and continuation, tokenized together and parted where the context alone would end.

        Spaces at the end of the context belong to the continuation: " Paris" is a word's token, " " and "Paris" are rare beside each other.
        """
        bare = context.rstrip()
        if bare:
            context, continuation = bare, context[len(bare) :] + continuation
        before = self.prompt(context)
        if not context:
            return before, list(self.tokenizer(continuation, add_special_tokens=False, verbose=False).input_ids)
        return before, self.prompt(context + continuation)[len(before) :]
