"""Parts of the evidence that are judged on their own, because an average can hide that one of them is broken.

A slice is a set of documents: those of one tag, where the text has tags, or those of about one length.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from assay_evals.evidence import Evidence
from assay_evals.wording import SLICE

TAG, LENGTH = "tag", "length"
_LENGTHS = (256, 1024, 4096)


def slices_of(evidence: Evidence) -> dict[str, Evidence]:
    """The evidence of each slice by its name (tag=de, length=up to 256), in a fixed order; lengths only where they differ."""
    tags = evidence.header.text.tags
    names = [f"{TAG}={tag}" for tag in sorted(set(tags.values()))]
    parts = {name: {document for document, tag in tags.items() if f"{TAG}={tag}" == name} for name in names}
    lengths = _lengths(evidence)
    if len(set(lengths.values())) > 1:
        for bucket in sorted(set(lengths.values())):
            shown = f"up to {_LENGTHS[bucket]:,} tokens" if bucket < len(_LENGTHS) else f"over {_LENGTHS[-1]:,} tokens"
            parts[f"{LENGTH}={shown}"] = {document for document, found in lengths.items() if found == bucket}
    return {
        name: dataclasses.replace(
            evidence,
            windows=tuple(window for window in evidence.windows if window.document in documents),
            continuations=tuple(row for row in evidence.continuations if row.document in documents),
            clozes=tuple(cloze for cloze in evidence.clozes if cloze.document in documents),
            encoded=tuple(row for row in evidence.encoded if row.document in documents),
        )
        for name, documents in parts.items()
    }


def sliced(metric: str, name: str) -> str:
    """What a metric is called in a slice."""
    return f"{metric}{SLICE}{name}"


def _lengths(evidence: Evidence) -> dict[str, int]:
    """Document → the bucket of the tokens of it that were measured."""
    tokens: Counter[str] = Counter()
    # A query's tokens are a text's over again.
    read = evidence.windows or evidence.embeddings or evidence.classes or evidence.retrievals
    for row in read:
        tokens[row.document] += row.tokens
    return {document: sum(count > longest for longest in _LENGTHS) for document, count in tokens.items()}
