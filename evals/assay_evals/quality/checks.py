"""What must hold before a measurement means anything: the same tokenizer everywhere, and text that nothing was calibrated on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from assay.calibration import rendered
from assay.text import Document
from assay_evals.evidence import Check
from assay_evals.runtimes.base import Runtime

_GRAM = 13
_MOST_OVERLAP = 0.01
_SAMPLE_DOCUMENTS = 5
_DECODED_TOKENS = 24
_LEAST_DECODED = 0.9
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


def same_runtime(baseline: Runtime, candidate: Runtime) -> Check:
    """Both artifacts run on one runtime, or the comparison is between runtimes."""
    passed = baseline.name == candidate.name
    return Check(name="same runtime", passed=passed, detail=f"baseline {baseline.name}, candidate {candidate.name}.")


def disjoint_texts(calibration: Iterable[Sequence[int]], evaluation: Iterable[Sequence[int]]) -> Check:
    """Share of the evaluation windows' 13-token sequences that also stand in the calibration windows."""
    seen = {gram for tokens in calibration for gram in _grams(tokens)}
    grams = [gram for tokens in evaluation for gram in _grams(tokens)]
    share = sum(gram in seen for gram in grams) / max(1, len(grams))
    return Check(
        name="evaluation text unseen in calibration",
        passed=share <= _MOST_OVERLAP,
        detail=f"{share:.2%} of its {len(grams)} sequences of {_GRAM} tokens stand in the calibration text; at most {_MOST_OVERLAP:.0%} may.",
    )


def decode_path(runtime: Runtime, prompts: Sequence[Sequence[int]], end_token: int | None) -> Check:
    """Generating token by token must give what one pass over the same tokens gives.

    Scores come from passes over whole windows; a kernel that is broken for single tokens only would not show in them. A few
    near-ties may fall differently.
    """
    agreed = compared = 0
    for prompt in prompts:
        generated = runtime.generate(list(prompt), _DECODED_TOKENS).tokens
        scores = runtime.logits([*prompt, *generated[:-1]])
        for token, expected in zip(generated, scores[len(prompt) - 1 :].argmax(-1), strict=True):
            if int(expected) == end_token:
                break
            agreed += token == int(expected)
            compared += 1
    share = agreed / compared if compared else 1.0
    detail = f"{agreed} of {compared} tokens generated one by one are the first choice of a pass over the same text."
    return Check(name="decode path", passed=share >= _LEAST_DECODED, detail=detail)


def _grams(tokens: Sequence[int]) -> Iterable[tuple[int, ...]]:
    return (tuple(tokens[start : start + _GRAM]) for start in range(len(tokens) - _GRAM + 1))
