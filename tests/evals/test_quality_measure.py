from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from assay.errors import UsageError
from assay.progress import Progress
from assay.recipe import Evaluate
from assay.text import Document, python_docs
from assay_evals.evidence import Cloze, Window
from assay_evals.quality.checks import decode_path, disjoint_texts, same_tokenizer
from assay_evals.quality.divergence import divergence
from assay_evals.quality.measure import measure_quality
from assay_evals.quality.passages import Passage, cut, select_passages
from assay_evals.runtimes.base import Runtime

PROSE = (
    "The following statement binds the name of the module to the value that the call returns, and nothing else is bound. "
    "When a name is not found at all, a NameError exception is raised; see os.path for more. "
    "Ünïcode words such as naïve or café — and so on — do not count, but plain words do count. "
)
LAST_WORDS = ["returns", "bound", "all", "raised", "more", "count", "count"]


def evaluate(**values: Any) -> Evaluate:
    defaults = {"length": 32, "quality": [{"metric": "kl_divergence", "tokens": 300}]}
    return Evaluate.model_validate_json(json.dumps(defaults | values))


# Passages.


def test_windows_are_the_document_in_pieces(tokenizer: Any) -> None:
    document = Document("prose", PROSE * 3)
    tokens = tokenizer(document.content, add_special_tokens=False).input_ids
    for length in (16, 50, 10_000):
        windows = cut(document, tokenizer, length)
        together = [token for window in windows for token in window.tokens]
        assert together == tokens[: len(together)]
        assert len(tokens) - len(together) < 8
        assert all(len(window.tokens) == length for window in windows[:-1])
        assert [window.window for window in windows] == list(range(len(windows)))
        assert {window.document for window in windows} == {"prose"}


def test_fewer_than_8_tokens_are_left_out(tokenizer: Any) -> None:
    assert cut(Document("tiny", "is it?"), tokenizer, 32) == []


def test_questions_are_the_last_words_of_clauses(tokenizer: Any) -> None:
    (window,) = cut(Document("prose", PROSE), tokenizer, 10_000)
    assert [question.word for question in window.questions] == LAST_WORDS


@pytest.mark.parametrize("length", [24, 64, 512])
def test_a_question_is_its_tokens_and_its_context_what_came_before(tokenizer: Any, length: int) -> None:
    found = 0
    for document in [Document("prose", PROSE), *python_docs("evaluation")[:12]]:
        for window in cut(document, tokenizer, length):
            for question in window.questions:
                found += 1
                assert 0 < question.start < question.stop < len(window.tokens)
                answer = tokenizer.decode(window.tokens[question.start : question.stop])
                before = tokenizer.decode(window.tokens[: question.start])
                after = tokenizer.decode(window.tokens[question.stop :])
                assert answer.strip() == question.word
                assert re.match(r"[.!?,;:](\s|$)", after)
                assert len(before.split()) >= 8
                # A window may begin within the bytes of a quotation mark.
                context = question.context.encode("ascii", "ignore").strip()
                assert len(context) > 20
                assert " ".join(before.split()).encode("ascii", "ignore").strip().endswith(context)
    assert found > 10


def test_a_window_that_ends_within_a_name_ends_no_clause(tokenizer: Any) -> None:
    text = "one two three four five six seven eight nine see the os.path of it, and so on and on."
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in tokens.offset_mapping]
    length = ends.index(text.index("os.") + 3) + 1
    first, *_ = cut(Document("names", text), tokenizer, length)
    assert tokenizer.decode(first.tokens).endswith("os.")
    assert first.questions == ()


def test_chat_documents_pass_through_the_template_and_ask_nothing(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": PROSE}, {"role": "assistant", "content": PROSE}]
    (window,) = cut(Document("chat", messages), tokenizer, 10_000)
    assert tokenizer.decode(window.tokens) == f"[user] {PROSE}\n[assistant] {PROSE}\n"
    assert window.questions == ()


def test_windows_are_taken_round_by_round_until_there_is_enough(tokenizer: Any) -> None:
    documents = [Document(name, PROSE * 4) for name in ("b", "a", "c")]
    chosen = select_passages(documents, tokenizer, evaluate())
    assert [(passage.window, passage.document) for passage in chosen[:4]] == [(0, "a"), (0, "b"), (0, "c"), (1, "a")]
    scored = [len(passage.tokens) - 1 for passage in chosen]
    assert sum(scored[:-1]) < 300 <= sum(scored)


def test_questions_are_declared_too(tokenizer: Any) -> None:
    documents = [Document(name, PROSE * 4) for name in ("a", "b")]
    quality = [{"metric": "kl_divergence", "tokens": 10}, {"metric": "cloze_accuracy", "samples": 12}]
    chosen = select_passages(documents, tokenizer, evaluate(length=200, quality=quality))
    asked = [len(passage.questions) for passage in chosen]
    assert sum(asked[:-1]) < 12 <= sum(asked)


def test_too_little_text_says_how_much_there_is(tokenizer: Any) -> None:
    quality = [{"metric": "kl_divergence", "tokens": 100}, {"metric": "cloze_accuracy", "samples": 1000}]
    with pytest.raises(UsageError, match=r"scored tokens and 7 cloze questions; the recipe declares 100 and 1000"):
        select_passages([Document("a", PROSE)], tokenizer, evaluate(length=512, quality=quality))
    with pytest.raises(UsageError, match="the recipe declares 300 and 0"):
        select_passages([], tokenizer, evaluate())


# Divergence.


def exact(baseline: NDArray[np.float64], candidate: NDArray[np.float64]) -> tuple[Any, Any]:
    """Log-probabilities in float64."""

    def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
        shifted = logits - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    return log_softmax(baseline), log_softmax(candidate)


@pytest.mark.parametrize("length", [2, 65, 130])
@pytest.mark.parametrize("noise", [0.01, 1.0, 5.0])
def test_divergence_is_that_of_float64(length: int, noise: float) -> None:
    rng = np.random.default_rng(length)
    baseline = (rng.normal(size=(length, 1000)) * 4).astype(np.float32)
    candidate = (baseline + noise * rng.normal(size=baseline.shape)).astype(np.float32)
    tokens = tuple(int(token) for token in rng.integers(0, 1000, length))
    found = divergence(baseline, candidate, tokens)
    p, q = exact(baseline.astype(np.float64), candidate.astype(np.float64))
    expected = (np.exp(p) * (p - q)).sum(axis=-1)[:-1]
    assert len(found.kl) == len(found.agreed) == length - 1
    np.testing.assert_allclose(found.kl, expected, rtol=1e-4, atol=2e-6)
    np.testing.assert_array_equal(found.agreed, (baseline.argmax(-1) == candidate.argmax(-1))[:-1])
    following = list(tokens[1:])
    np.testing.assert_allclose(found.nll_baseline, -p[np.arange(length - 1), following].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.nll_candidate, -q[np.arange(length - 1), following].mean(), rtol=1e-5)


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = np.random.default_rng(0).normal(size=(40, 500)).astype(np.float32) * 8
    found = divergence(logits, logits.copy(), tuple(range(40)))
    assert found.kl == (0.0,) * 39
    assert found.agreed == (1,) * 39
    assert found.nll_baseline == found.nll_candidate


def test_divergence_has_a_direction_and_leaves_its_inputs_alone() -> None:
    sharp, flat = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    sharp[:, 0] = 5.0
    before = sharp.copy()
    forward, backward = divergence(sharp, flat, (0, 0)), divergence(flat, sharp, (0, 0))
    p = np.exp(5) / (np.exp(5) + 3)
    entropy = -(p * np.log(p) + 3 * (1 - p) / 3 * np.log((1 - p) / 3))
    np.testing.assert_allclose(forward.kl[0], np.log(4) - entropy, rtol=1e-5)
    assert backward.kl[0] > 1.5 * forward.kl[0]
    np.testing.assert_array_equal(sharp, before)


def test_numbers_that_are_not_finite_stay_visible() -> None:
    broken = np.zeros((3, 4), np.float32)
    broken[1] = np.nan
    found = divergence(np.zeros((3, 4), np.float32), broken, (0, 1, 2))
    assert found.kl[0] == 0.0
    assert np.isnan(found.kl[1])
    assert np.isnan(found.nll_candidate)


# Both together, on real models.


@pytest.fixture(scope="module")
def measured(tokenizer: Any, runtime: Runtime, other: Runtime) -> tuple[list[Passage], list[Window | Cloze]]:
    passages = select_passages([Document("prose", PROSE * 3)], tokenizer, evaluate(length=64))
    return passages, list(measure_quality(runtime, other, passages, Progress()))


def test_every_window_is_measured_on_both_models(
    measured: tuple[list[Passage], list[Window | Cloze]], runtime: Runtime, other: Runtime
) -> None:
    passages, rows = measured
    windows = [row for row in rows if isinstance(row, Window)]
    assert [(row.document, row.window) for row in windows] == [(one.document, one.window) for one in passages]
    for passage, row in zip(passages, windows, strict=True):
        expected = divergence(runtime.logits(list(passage.tokens)), other.logits(list(passage.tokens)), passage.tokens)
        assert row.tokens == len(passage.tokens) - 1
        assert row.kl == expected.kl
        assert row.agreed == expected.agreed
        assert (row.nll_baseline, row.nll_candidate) == (expected.nll_baseline, expected.nll_candidate)
        assert min(value for value in row.kl if value is not None) > 0


def test_answers_are_greedy_completions(
    measured: tuple[list[Passage], list[Window | Cloze]], tokenizer: Any, runtime: Runtime, other: Runtime
) -> None:
    """Each answer again, by generating token after token from the words before the question."""
    passages, rows = measured
    clozes = [row for row in rows if isinstance(row, Cloze)]
    questions = [(passage, question) for passage in passages for question in passage.questions]
    assert len(clozes) == len(questions) > 5
    for row, (passage, question) in zip(clozes, questions, strict=True):
        assert (row.document, row.window, row.position) == (passage.document, passage.window, question.start)
        assert (row.word, row.context) == (question.word, question.context)
        wanted = list(passage.tokens[question.start : question.stop])
        for arm, answer in ((runtime, row.baseline), (other, row.candidate)):
            greedy = list(arm.generate(list(passage.tokens[: question.start]), len(wanted)).tokens)
            assert answer.correct == (greedy == wanted)
            shared = next((index for index, token in enumerate(wanted) if greedy[index] != token), len(wanted) - 1)
            assert answer.answer == tokenizer.decode(greedy[: shared + 1]).strip()


def test_a_right_answer_is_counted_as_right(tokenizer: Any, runtime: Runtime) -> None:
    """A question whose word is what the model would say, and one that differs in its last token."""
    prompt = tokenizer("The following statement binds the name of the", add_special_tokens=False).input_ids
    said = list(runtime.generate(prompt, 3).tokens)
    right = Passage("right", 0, (*prompt, *said, 13), (_question(len(prompt), 3),))
    wrong = Passage("wrong", 0, (*prompt, *said[:2], (said[2] + 1) % 512, 13), (_question(len(prompt), 3),))
    rows = [row for row in measure_quality(runtime, runtime, [right, wrong], Progress()) if isinstance(row, Cloze)]
    assert [row.baseline.correct for row in rows] == [True, False]
    assert rows[0].baseline.answer == rows[1].candidate.answer == tokenizer.decode(said).strip()


def _question(start: int, tokens: int) -> Any:
    from assay_evals.quality.passages import Question

    return Question(start, start + tokens, "word", "context")


# Checks.


class Altered:
    """A runtime but for what a test changes about it."""

    def __init__(self, runtime: Runtime, **changes: Any) -> None:
        self._runtime = runtime
        self.__dict__ |= changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


CHAT = Document("chat", [{"role": "user", "content": "What does it return, and when?"}])


@pytest.mark.parametrize("document", [Document("prose", PROSE), CHAT], ids=["text", "chat"])
def test_the_same_tokenizer_passes(runtime: Runtime, tokenizer: Any, document: Document) -> None:
    check = same_tokenizer(runtime, runtime, tokenizer, [document])
    assert check.passed
    assert check.detail == "the same tokens on 1 documents."
    begins = Altered(runtime, encode=lambda text: [0, *runtime.encode(text)])
    assert same_tokenizer(begins, begins, tokenizer, [document]).passed


@pytest.mark.parametrize("document", [Document("prose", PROSE), CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("arm", ["baseline", "candidate"])
@pytest.mark.parametrize(
    "spoil",
    [lambda tokens: tokens[:-1], lambda tokens: [0, 0, *tokens], lambda tokens: [*tokens, 0], lambda _: []],
    ids=["one less", "two before", "one after", "none"],
)
def test_another_tokenizer_fails_and_names_the_arm(
    runtime: Runtime, tokenizer: Any, document: Document, arm: str, spoil: Callable[[list[int]], list[int]]
) -> None:
    changed: Any = Altered(runtime, encode=lambda text: spoil(runtime.encode(text)))
    arms = (changed, runtime) if arm == "baseline" else (runtime, changed)
    check = same_tokenizer(*arms, tokenizer, [document])
    assert not check.passed
    assert f"the {arm}'s tokenizer cuts the document {document.name!r} differently" in check.detail


def windows(rng: np.random.Generator, count: int) -> Iterator[Sequence[int]]:
    return (rng.integers(0, 1000, 100).tolist() for _ in range(count))


def test_texts_that_share_sequences_are_noticed() -> None:
    calibration, fresh = list(windows(np.random.default_rng(1), 5)), list(windows(np.random.default_rng(2), 5))
    assert disjoint_texts(calibration, fresh).passed
    # 12 tokens in a row are chance, 13 are not; 1 of 440 is allowed, 20 are not.
    near = [list(fresh[0]), *fresh[1:]]
    near[0][10:22] = calibration[0][30:42]
    assert "0.00% of its 440" in disjoint_texts(calibration, near).detail
    near[0][10:23] = calibration[0][30:43]
    assert disjoint_texts(calibration, near).passed
    assert "0.23% of its 440" in disjoint_texts(calibration, near).detail
    near[0][10:42] = calibration[0][30:62]
    check = disjoint_texts(calibration, near)
    assert not check.passed
    assert "4.55% of its 440 sequences of 13 tokens stand in the calibration text" in check.detail


@pytest.fixture
def decoded() -> list[Passage]:
    return [Passage("prose", number, tuple(range(10 + number, 74 + number)), ()) for number in range(5)]


def test_a_sound_decode_path_passes_and_says_by_how_much(
    runtime: Runtime, other: Runtime, decoded: list[Passage]
) -> None:
    check = decode_path(runtime, other, decoded)
    assert check.passed and check.name == "decode path"
    by_token, by_pass = re.findall(r"(\d\.\d{4})", check.detail)[:2]
    whole = [
        divergence(runtime.logits(list(one.tokens))[32:], other.logits(list(one.tokens))[32:], one.tokens[32:]).kl
        for one in decoded[:4]
    ]
    expected = sum(map(sum, whole)) / sum(map(len, whole))
    assert float(by_pass) == pytest.approx(expected, abs=1e-4) and float(by_token) == pytest.approx(expected, rel=0.02)
    assert "on the same 124 positions" in check.detail


@pytest.mark.parametrize("arm", ["baseline", "candidate"])
def test_a_kernel_that_is_broken_for_single_tokens_only_is_noticed(
    runtime: Runtime, decoded: list[Passage], arm: str
) -> None:
    def broken(tokens: list[int], start: int) -> Any:
        return np.roll(runtime.decode_logits(tokens, start), 7, axis=1)

    spoiled: Any = Altered(runtime, decode_logits=broken)
    arms = (spoiled, runtime) if arm == "baseline" else (runtime, spoiled)
    assert decode_path(runtime, runtime, decoded).passed
    assert not decode_path(*arms, decoded).passed


def test_too_few_positions_show_nothing(runtime: Runtime) -> None:
    short = [Passage("short", 0, tuple(range(10, 40)), ())]
    check = decode_path(runtime, runtime, short)
    assert not check.passed and "only 14 positions could be decoded; 32 are needed" in check.detail
    assert not decode_path(runtime, runtime, []).passed
