"""Calibration windows: drawn by a seed, never overlapping, and never made from a text that is too short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from assay.calibration import calibration_tokens, encode, rendered, tokens_digest
from assay.errors import UsageError
from assay.recipe import Sampling
from assay.text import Document, python_docs

END = 0
KNOWN = "sha256:4d342c941a8823b03e499d028923f2d6792bf9b1664f3a0f4de493ea7d815438"
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return python_docs("calibration")[:6]


def sampling(samples: int, length: int, seed: int = 0) -> Sampling:
    return Sampling(samples=samples, length=length, seed=seed)


def stream_of(documents: list[Document], tokenizer: Any) -> list[int]:
    return [token for one in documents for token in [*encode(one, tokenizer), END]]


def test_the_same_seed_gives_the_same_windows(documents: list[Document], tokenizer: Any) -> None:
    torch.manual_seed(1)
    one = calibration_tokens(documents, tokenizer, sampling(16, 32, seed=5))
    torch.manual_seed(2)
    two = calibration_tokens(documents, tokenizer, sampling(16, 32, seed=5))
    assert one.dtype is torch.int64
    assert one.shape == (16, 32)
    assert torch.equal(one, two)
    assert tokens_digest(one) == tokens_digest(two)


def test_another_seed_gives_other_windows(documents: list[Document], tokenizer: Any) -> None:
    digests = {tokens_digest(calibration_tokens(documents, tokenizer, sampling(16, 32, seed))) for seed in range(8)}
    assert len(digests) == 8


def test_drawing_leaves_the_global_generator_alone(documents: list[Document], tokenizer: Any) -> None:
    before = torch.get_rng_state()
    calibration_tokens(documents, tokenizer, sampling(16, 32))
    assert torch.equal(torch.get_rng_state(), before)


def counted(length: int, settings: Sampling) -> list[list[int]]:
    """Windows of the text 0 1 2 … whose tokens are their own positions."""
    model = Tokenizer(WordLevel({str(number): number for number in range(length)}, unk_token="0"))
    model.pre_tokenizer = Whitespace()
    documents = [Document("count", " ".join(str(number) for number in range(length)))]
    return calibration_tokens(documents, PreTrainedTokenizerFast(tokenizer_object=model), settings).tolist()


def test_the_windows_of_seed_0_are_these() -> None:
    """A change here changes every lock."""
    assert counted(100, sampling(4, 8)) == [[*range(start, start + 8)] for start in (0, 40, 64, 72)]


@pytest.mark.parametrize("seed", range(5))
def test_windows_never_overlap(seed: int) -> None:
    windows = counted(1000, sampling(15, 31, seed))
    starts = [window[0] for window in windows]
    assert starts == sorted(set(starts))
    assert all(start % 31 == 0 for start in starts)
    assert windows == [[*range(start, start + 31)] for start in starts]


@pytest.mark.parametrize("length", [8, 31, 64])
def test_all_windows_together_are_the_joined_text(documents: list[Document], tokenizer: Any, length: int) -> None:
    stream = stream_of(documents, tokenizer)
    windows = len(stream) // length
    tokens = calibration_tokens(documents, tokenizer, sampling(windows, length))
    assert tokens.flatten().tolist() == stream[: windows * length]


def test_each_document_ends_with_the_end_of_text(tokenizer: Any) -> None:
    documents = [Document("a", "one two three"), Document("b", "four five six")]
    first, second = (encode(document, tokenizer) for document in documents)
    assert END not in first + second
    joined = [*first, END, *second, END]
    assert calibration_tokens(documents, tokenizer, sampling(1, len(joined))).tolist() == [joined]


def test_a_tokenizer_without_end_of_text_joins_without_one(tiny_model: Callable[[str], Path]) -> None:
    bare = AutoTokenizer.from_pretrained(tiny_model("llama"), eos_token=None)
    bare.eos_token = None
    documents = [Document("a", "one two three four"), Document("b", "five six seven eight")]
    joined = encode(documents[0], bare) + encode(documents[1], bare)
    assert calibration_tokens(documents, bare, sampling(1, len(joined))).tolist() == [joined]


def test_of_a_large_text_some_documents_are_read_and_they_are_random(tokenizer: Any) -> None:
    documents = [Document(str(number), f"{number} " * 40) for number in range(2000)]
    read: list[list[str]] = []
    for seed in (0, 1):
        names: list[str] = []
        spy: Any = _Spy(tokenizer, names)
        assert calibration_tokens(documents, spy, sampling(4, 64, seed)).shape == (4, 64)
        read.append(names)
    assert all(20 < len(names) < 200 for names in read) and read[0] != read[1]
    assert all(names == sorted(names, key=int) for names in read), "in their order"


class _Spy:
    """A tokenizer that notes the first word of what it is given."""

    def __init__(self, tokenizer: Any, seen: list[str]) -> None:
        self._tokenizer, self._seen = tokenizer, seen

    def __call__(self, text: str, **options: Any) -> Any:
        self._seen.append(text.split(maxsplit=1)[0])
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("short", [1, 5])
def test_a_text_that_is_too_short_says_how_far_it_goes(tokenizer: Any, short: int) -> None:
    documents = [Document("a", "word " * 200)]
    stream = stream_of(documents, tokenizer)
    windows = len(stream) // 16
    asked = windows + short
    words = (
        f"the calibration text has {len(stream)} tokens, enough for {windows} windows of 16; the recipe asks for {asked}. "
        "Lower calibration.samples or calibration.length, or give more text."
    )
    with pytest.raises(UsageError) as caught:
        calibration_tokens(documents, tokenizer, sampling(asked, 16))
    assert str(caught.value) == words
    assert len(calibration_tokens(documents, tokenizer, sampling(windows, 16))) == windows


def test_text_is_encoded_without_tokens_of_our_own(tiny_model: Callable[[str], Path]) -> None:
    eager = AutoTokenizer.from_pretrained(tiny_model("llama"))
    eager.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END)]
    )
    ids = encode(Document("a", "plain words"), eager)
    assert eager("plain words").input_ids == [END, *ids]
    assert eager.decode(ids) == "plain words"


def test_chat_messages_pass_through_the_models_own_template(tokenizer: Any) -> None:
    assert tokenizer.decode(encode(Document("a", CHAT), tokenizer)) == "[user] Hello\n[assistant] Hi\n"


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(tiny_model: Callable[[str], Path]) -> None:
    dated = AutoTokenizer.from_pretrained(tiny_model("llama"))
    dated.chat_template = "Today is {{ strftime_now('%d %b %Y') }}.{% for m in messages %}{{ m.content }}{% endfor %}"
    assert rendered(Document("a", CHAT), dated) == "Today is 01 Jan 2025.HelloHi"


def test_chat_messages_without_a_template_are_refused(tiny_model: Callable[[str], Path]) -> None:
    bare = AutoTokenizer.from_pretrained(tiny_model("llama"))
    bare.chat_template = None
    with pytest.raises(UsageError, match=r"rows\.jsonl:7: holds chat messages, but the model has no chat template"):
        encode(Document("rows.jsonl:7", CHAT), bare)
    assert encode(Document("rows.jsonl:8", "text"), bare)


@pytest.mark.parametrize(
    ("template", "words"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{% if %}", "Expected an expression")],
)
def test_messages_that_the_template_refuses_are_named(
    tiny_model: Callable[[str], Path], template: str, words: str
) -> None:
    strict = AutoTokenizer.from_pretrained(tiny_model("llama"))
    strict.chat_template = template
    with pytest.raises(UsageError, match=rf"rows\.jsonl:7: the model's chat template refuses these messages: {words}"):
        encode(Document("rows.jsonl:7", CHAT), strict)


@given(st.integers(1, 40), st.integers(8, 40), st.integers(0, 2**32 - 1))
def test_every_window_is_whole_and_in_the_text(tokenizer: Any, samples: int, length: int, seed: int) -> None:
    documents = [Document("a", "some words of a text, again and again. " * 20)]
    stream = stream_of(documents, tokenizer)
    if samples * length > len(stream):
        with pytest.raises(UsageError, match=f"enough for {len(stream) // length} windows"):
            calibration_tokens(documents, tokenizer, sampling(samples, length, seed))
    else:
        assert calibration_tokens(documents, tokenizer, sampling(samples, length, seed)).shape == (samples, length)


def test_the_digest_tells_values_order_and_shape_apart() -> None:
    tokens = torch.arange(12)
    variants = [
        tokens.view(3, 4),
        tokens.view(4, 3),
        tokens.view(3, 4) + 1,
        tokens.view(3, 4).flip(0),
        tokens.view(3, 4)[:2],
    ]
    assert len({tokens_digest(variant) for variant in variants}) == len(variants)
    strided = tokens.view(4, 3).T
    assert tokens_digest(strided) == tokens_digest(strided.contiguous())
    assert tokens_digest(tokens.view(3, 4)) == KNOWN
