"""Measure structured output: each prompt is answered by both arms, on their own and with the schema enforced, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from assay.progress import Progress
from assay.recipe import Structured
from assay_evals.evidence import StructuredRow, Written
from assay_evals.runtimes.base import Runtime
from assay_evals.structured.constraint import Constraint, Enforcer, SchemaError
from assay_evals.structured.items import Item
from assay_evals.structured.outputs import judged


@dataclass(frozen=True)
class WritingArm:
    """A loaded artifact, and what enforces schemas in its vocabulary."""

    runtime: Runtime
    enforcer: Enforcer


def measure_structured(
    baseline: WritingArm,
    candidate: WritingArm,
    asked: Sequence[tuple[Item, list[int]]],
    settings: Structured,
    progress: Progress,
) -> Iterator[StructuredRow]:
    """Yield what both arms write for each item.  asked: items with the tokens of their prompts."""
    with progress.stage("measure structured output", len(asked)) as advance:
        for item, prompt in asked:
            free = [_free(arm, item, prompt, settings) for arm in (baseline, candidate)]
            refused, before, after, constraint = None, None, None, None
            try:
                before, _ = _enforced(baseline, item, prompt, settings)
                after, constraint = _enforced(candidate, item, prompt, settings)
            except SchemaError as error:
                refused, before = str(error), None
            yield StructuredRow(
                item=item.name,
                prompt=baseline.runtime.decode(prompt),
                schema=_json(item.schema),
                expected=None if item.expected is None else _json(item.expected),
                refused=refused,
                baseline=free[0],
                candidate=free[1],
                baseline_enforced=before,
                candidate_enforced=after,
                compile_seconds=constraint.compile_seconds if constraint else None,
                step_seconds=tuple(constraint.step_seconds) if constraint else (),
            )
            advance()


def _free(arm: WritingArm, item: Item, prompt: list[int], settings: Structured) -> Written:
    tokens = arm.runtime.generate(prompt, settings.new_tokens, stops=True).tokens
    return _written(arm.runtime, tokens, item, settings)


def _enforced(arm: WritingArm, item: Item, prompt: list[int], settings: Structured) -> tuple[Written, Constraint]:
    constraint = arm.enforcer.compile(item.schema)
    tokens = arm.runtime.generate_picked(prompt, settings.new_tokens, constraint.pick).tokens
    return _written(arm.runtime, tokens, item, settings), constraint


def _written(runtime: Runtime, tokens: Sequence[int], item: Item, settings: Structured) -> Written:
    text = runtime.decode(list(tokens)) if tokens else ""
    found = judged(text, item.schema, item.expected, ordered=settings.ordered_arrays)
    return Written(
        tokens=len(tokens),
        cut_off=len(tokens) == settings.new_tokens,
        parsed=found.parsed,
        valid=found.valid,
        correct=found.correct,
        text=text,
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
