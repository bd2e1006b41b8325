"""What must hold before a measurement means anything: the same tokenizer everywhere, and text that nothing was calibrated on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from assay.calibration import rendered
from assay.text import Document
from assay_evals.evidence import Check
from assay_evals.quality.divergence import divergence
from assay_evals.quality.passages import Passage
from assay_evals.runtimes.base import Runtime

_GRAM = 13
_MOST_OVERLAP = 0.01
_SAMPLE_DOCUMENTS = 5
_DECODED_WINDOWS, _DECODED_TOKENS, _FEWEST_DECODED = 4, 64, 32
_MOST_GROWTH, _DECODE_MARGIN = 1.5, 0.01
_SAMPLE_CHARACTERS = 2000


def same_tokenizer(baseline: Runtime, candidate: Runtime, tokenizer: Any, documents: Sequence[Document]) -> Check:
    """Both artifacts, as served, cut text into the tokens that the model was made with."""
    samples = documents[:_SAMPLE_DOCUMENTS]
    for document in samples:
        text = rendered(document, tokenizer)[:_SAMPLE_CHARACTERS]
        expected = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        for arm, runtime in (("baseline", baseline), ("candidate", candidate)):
            found = runtime.encode(text)
            # A runtime may put the model's own first token before every text.
            if found[-len(expected) :] != expected or len(found) > len(expected) + 1:
                detail = (
                    f"the {arm}'s tokenizer cuts the document {document.name!r} differently from the source model's."
                )
                return Check(name="tokenizer identity", passed=False, detail=detail)
    return Check(name="tokenizer identity", passed=True, detail=f"the same tokens on {len(samples)} documents.")


def same_template(expected: str | None, found: Mapping[str, str | None]) -> Check:
    """Each arm carries the chat template that the model was made with: another one ruins every chat, and no plain text shows it.

    found: an arm's template by its name; None where there is none.
    """
    for arm, template in found.items():
        if template != expected:
            shown = "has none" if template is None else "has another one"
            source = "has none" if expected is None else "has one"
            detail = f"the source model {source}, the {arm} {shown}."
            return Check(name="chat template identity", passed=False, detail=detail)
    detail = "the model has none." if expected is None else "the source model's, to the last character, in both arms."
    return Check(name="chat template identity", passed=True, detail=detail)


def disjoint_texts(calibration: Iterable[Sequence[int]], evaluation: Iterable[Sequence[int]]) -> Check:
    """Share of the evaluation windows' 13-token sequences that also stand in the calibration windows."""
    seen = {gram for tokens in calibration for gram in grams(tokens)}
    found = [gram for tokens in evaluation for gram in grams(tokens)]
    share = sum(gram in seen for gram in found) / max(1, len(found))
    return Check(
        name="evaluation text unseen in calibration",
        passed=share <= _MOST_OVERLAP,
        detail=f"{share:.2%} of its {len(found)} sequences of {_GRAM} tokens stand in the calibration text; at most {_MOST_OVERLAP:.0%} may.",
    )


def decode_path(baseline: Runtime, candidate: Runtime, passages: Sequence[Passage]) -> Check:
    """Fed token by token, as when it is served, each arm must score as it does in one pass over the whole text.

    The divergence is measured in passes over whole windows; a kernel that is broken for single tokens only would not show there.
    Measured is the divergence of the candidate by either path from the baseline, on the same positions, and that of the baseline
    from itself. 4-bit kernels for one token and for many differ a little, so a margin is allowed.
    """
    by_pass: list[float] = []
    by_token: list[float] = []
    itself: list[float] = []
    for passage in passages[:_DECODED_WINDOWS]:
        tokens = passage.tokens[: 2 * _DECODED_TOKENS]
        start = len(tokens) // 2
        # Position i is scored against token i + 1, and the last token has none after it.
        whole = [runtime.logits(list(tokens))[start:] for runtime in (baseline, candidate)]
        steps = [runtime.decode_logits(list(tokens), start) for runtime in (baseline, candidate)]
        rest = tokens[start:]
        by_pass += divergence(whole[0], whole[1], rest).kl
        by_token += divergence(whole[0], steps[1], rest).kl
        itself += divergence(whole[0], steps[0], rest).kl
    if len(by_token) < _FEWEST_DECODED:
        detail = (
            f"only {len(by_token)} positions could be decoded; {_FEWEST_DECODED} are needed: the text is too short."
        )
        return Check(name="decode path", passed=False, detail=detail)
    means = {name: fmean(values) for name, values in (("pass", by_pass), ("token", by_token), ("itself", itself))}
    sound = means["token"] <= _MOST_GROWTH * means["pass"] + _DECODE_MARGIN and means["itself"] <= _DECODE_MARGIN
    detail = (
        f"Fed token by token, the candidate is {means['token']:.4f} nats from the baseline, in one pass {means['pass']:.4f}, on the "
        f"same {len(by_token)} positions; the baseline's own two paths differ by {means['itself']:.4f}. Allowed: "
        f"{_MOST_GROWTH:g} times as much and {_DECODE_MARGIN:g} more."
    )
    return Check(name="decode path", passed=sound, detail=detail)


def grams(tokens: Sequence[int]) -> Iterable[tuple[int, ...]]:
    """Every sequence of 13 tokens."""
    return (tuple(tokens[start : start + _GRAM]) for start in range(len(tokens) - _GRAM + 1))
