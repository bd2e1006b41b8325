"""Measure speed: blocks of four fresh processes, ABBA or BAAB by a seeded coin, so that slow drift cancels within a block."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from assay.child import run_module
from assay.errors import UsageError
from assay.progress import Progress
from assay.recipe import Evaluate, PrefixReuseMetric, request_lengths
from assay_evals.evidence import SpeedRun
from assay_evals.speed.energy import POWERCAP

Arm = Literal["baseline", "candidate"]
_RUN = TypeAdapter(SpeedRun)
_RUN_SECONDS = 1800
_SEED = 0


def lengths_of(evaluate: Evaluate) -> dict[int, int]:
    """Tokens of the prompt → new tokens, of every request that the recipe's speed metrics need: one for each prompt length."""
    wanted: dict[int, int] = {}
    for metric in evaluate.speed:
        for length, new_tokens in request_lengths(metric).items():
            wanted[length] = max(new_tokens, wanted.get(length, 1))
    if not wanted and any(metric.metric in ("peak_memory", "load_time") for metric in evaluate.speed):
        wanted[256] = 16
    return dict(sorted(wanted.items()))


def requests_of(evaluate: Evaluate, stream: Iterable[int]) -> list[dict[str, Any]]:
    """The requests for these lengths, as the worker takes them; stream: token ids to take prompts from."""
    wanted = lengths_of(evaluate)
    tokens = list(itertools.islice(stream, max(wanted, default=0)))
    if len(tokens) < max(wanted, default=0):
        raise UsageError(f"the evaluation text has {len(tokens)} tokens, too few for a prompt of {max(wanted)}.")
    reused = {one.prompt_tokens: one.prefix_tokens for one in evaluate.speed if isinstance(one, PrefixReuseMetric)}
    return [
        {"prompt": tokens[:length], "new_tokens": new_tokens, "prefix_tokens": reused.get(length, 0)}
        for length, new_tokens in wanted.items()
    ]


def measure_speed(
    directories: dict[Arm, Path],
    runtime: str,
    requests: list[dict[str, Any]],
    blocks: range,
    progress: Progress,
    *,
    powercap: Path = POWERCAP,
) -> Iterator[SpeedRun]:
    """Yield one run per fresh process; AssayError when one fails, because a speed without its failures is not a speed.

    blocks: their numbers, of which each has its own toss of the coin.  powercap: where the energy counters are.
    """
    with progress.stage("measure speed", len(blocks) * 4) as advance:
        for block in blocks:
            heads = random.Random(f"{_SEED} {block}").random() < 0.5
            first: tuple[Arm, Arm] = ("baseline", "candidate") if heads else ("candidate", "baseline")
            for position, arm in enumerate((*first, *reversed(first))):
                workload = {"runtime": runtime, "directory": str(directories[arm]), "requests": requests}
                report = _run(workload | {"powercap": str(powercap)})
                yield _RUN.validate_json(json.dumps({"block": block, "position": position, "arm": arm} | report))
                advance()


def _run(workload: dict[str, Any]) -> dict[str, Any]:
    what = f"a speed run of {workload['directory']}"
    written = run_module(what, "assay_evals.speed.worker", seconds=_RUN_SECONDS, given=json.dumps(workload))
    return json.loads(written.strip().splitlines()[-1])
