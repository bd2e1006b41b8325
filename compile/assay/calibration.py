"""Calibration tokens: windows of one length, drawn by a seed from the tokenized documents.

Documents (of a large text some, at random) are tokenized as the model would see them (chat messages through its own template),
joined with the end-of-text token, cut into windows, and sampled without replacement. A text too short for the declared samples is
an error, never a silent repeat.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from assay.errors import UsageError
from assay.recipe import Sampling
from assay.text import Document

# Several times what a token takes in any language.
_CHARACTERS_PER_TOKEN = 32
# Some templates write today's date; the same recipe has to give the same tokens tomorrow.
_DAY = datetime.date(2025, 1, 1)
_DATE_FORMAT = re.compile(r"""strftime_now\(\s*['"]([^'"]+)['"]""")
_FIXED_DATE = "{%- macro strftime_now(format) -%}{{ fixed_dates[format] }}{%- endmacro -%}"


def calibration_tokens(documents: list[Document], tokenizer: Any, sampling: Sampling) -> Tensor:
    """int64 [samples, length], the same for the same documents, tokenizer and seed."""
    stream: list[int] = []
    for document in _enough(documents, sampling):
        stream += encode(document, tokenizer)
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    windows = len(stream) // sampling.length
    if windows < sampling.samples:
        raise UsageError(
            f"the calibration text has {len(stream)} tokens, enough for {windows} windows of {sampling.length}; the recipe asks "
            f"for {sampling.samples}. Lower calibration.samples or calibration.length, or give more text."
        )
    cut = torch.tensor(stream[: windows * sampling.length], dtype=torch.int64).view(windows, sampling.length)
    return cut[_permutation(windows, sampling)[: sampling.samples].sort().values]


def framed_tokens(documents: list[Document], tokenizer: Any, sampling: Sampling) -> Tensor:
    """The same for an encoder, which reads every text between tokens of its own: int64 [samples, length], these included."""
    before, after = frame_of(tokenizer)
    inner = sampling.length - len(before) - len(after)
    if inner < 1:
        raise UsageError(
            f"calibration.length {sampling.length} leaves no room beside the encoder's own tokens; raise it."
        )
    windows = calibration_tokens(documents, tokenizer, sampling.model_copy(update={"length": inner}))
    around = [torch.tensor([ids], dtype=torch.int64).expand(len(windows), -1) for ids in (before, after)]
    return torch.cat([around[0], windows, around[1]], dim=1)


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that an encoder's tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False).input_ids
    framed = tokenizer("a", add_special_tokens=True, verbose=False).input_ids
    places = [start for start in range(len(framed) - len(bare) + 1) if framed[start : start + len(bare)] == bare]
    if not places:
        raise UsageError(
            "the tokenizer cuts a text differently between its special tokens; such encoders are not supported."
        )
    return framed[: places[0]], framed[places[0] + len(bare) :]


def _enough(documents: list[Document], sampling: Sampling) -> list[Document]:
    """Of a large text some documents, at random and in their order: several times as much as is drawn from them."""
    wanted = _CHARACTERS_PER_TOKEN * sampling.samples * sampling.length
    picked: list[int] = []
    characters = 0
    for index in _permutation(len(documents), sampling).tolist():
        if characters >= wanted:
            break
        picked.append(index)
        content = documents[index].content
        characters += len(content) if isinstance(content, str) else sum(len(turn["content"]) for turn in content)
    return [documents[index] for index in sorted(picked)]


def _permutation(count: int, sampling: Sampling) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(sampling.seed))


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of a document, without adding special tokens of our own."""
    return tokenizer(rendered(document, tokenizer), add_special_tokens=False, verbose=False).input_ids


def rendered(document: Document, tokenizer: Any, *, answering: bool = False) -> str:
    """The text of a document; chat messages pass through the model's own template.  answering: the model's turn begins at its end."""
    content = document.content
    if isinstance(content, str):
        return content
    if not tokenizer.chat_template:
        raise UsageError(f"{document.name}: holds chat messages, but the model has no chat template; use a text field.")
    template = tokenizer.get_chat_template()
    dates = {found: _DAY.strftime(found) for found in _DATE_FORMAT.findall(template)}
    try:
        # A macro takes the place of the function that tells today's date; only plain data may be handed in.
        return tokenizer.apply_chat_template(
            content,
            tokenize=False,
            add_generation_prompt=answering,
            chat_template=_FIXED_DATE * bool(dates) + template,
            fixed_dates=dates,
        )
    except TemplateError as error:
        raise UsageError(f"{document.name}: the model's chat template refuses these messages: {error}.") from error


def tokens_digest(tokens: Tensor) -> str:
    """Digest of token windows: shape and values."""
    data = f"{tuple(tokens.shape)}".encode() + tokens.contiguous().numpy().tobytes()
    return "sha256:" + hashlib.sha256(data).hexdigest()
