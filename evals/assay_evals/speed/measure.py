"""Measure speed: blocks of four fresh processes, ABBA or BAAB by a seeded coin, so that slow drift cancels within a block."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from assay.child import run_module
from assay.errors import UsageError
from assay.progress import Progress
from assay.recipe import DecodeMetric, Evaluate, TimeToFirstTokenMetric
from assay_evals.evidence import Generation, SpeedRun

Arm = Literal["baseline", "candidate"]
_RUN_SECONDS = 1800
_SEED = 0


def requests_of(evaluate: Evaluate, stream: Iterable[int]) -> list[dict[str, Any]]:
    """The requests that the recipe's speed metrics need, one for each prompt length; stream: token ids to take prompts from."""
    wanted: dict[int, int] = {}
    for metric in evaluate.speed:
        if isinstance(metric, DecodeMetric):
            wanted[metric.prompt_tokens] = max(metric.new_tokens, wanted.get(metric.prompt_tokens, 1))
        elif isinstance(metric, TimeToFirstTokenMetric):
            wanted.setdefault(metric.prompt_tokens, 1)
    if not wanted and any(metric.metric == "peak_memory" for metric in evaluate.speed):
        wanted[256] = 16
    tokens = list(itertools.islice(stream, max(wanted, default=0)))
    if len(tokens) < max(wanted, default=0):
        raise UsageError(f"the evaluation text has {len(tokens)} tokens, too few for a prompt of {max(wanted)}.")
    return [{"prompt": tokens[:length], "new_tokens": new_tokens} for length, new_tokens in sorted(wanted.items())]


def measure_speed(
    directories: dict[Arm, Path], runtime: str, requests: list[dict[str, Any]], blocks: range, progress: Progress
) -> Iterator[SpeedRun]:
    """Yield one run per fresh process; AssayError when one fails, because a speed without its failures is not a speed.

    blocks: their numbers, of which each has its own toss of the coin.
    """
    with progress.stage("measure speed", len(blocks) * 4) as advance:
        for block in blocks:
            heads = random.Random(f"{_SEED} {block}").random() < 0.5
            first: tuple[Arm, Arm] = ("baseline", "candidate") if heads else ("candidate", "baseline")
            for position, arm in enumerate((*first, *reversed(first))):
                report = _run(directories[arm], runtime, requests)
                yield SpeedRun(
                    block=block,
                    position=_POSITIONS[position],
                    arm=arm,
                    load_seconds=report["load_seconds"],
                    peak_memory_bytes=report["peak_memory_bytes"],
                    generations=tuple(
                        Generation(prompt_tokens=row["prompt_tokens"], token_seconds=tuple(row["token_seconds"]))
                        for row in report["generations"]
                    ),
                )
                advance()


_POSITIONS: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)


def _run(directory: Path, runtime: str, requests: list[dict[str, Any]]) -> dict[str, Any]:
    workload = json.dumps({"runtime": runtime, "directory": str(directory), "requests": requests})
    what = f"a speed run of {directory}"
    written = run_module(what, "assay_evals.speed.worker", seconds=_RUN_SECONDS, given=workload)
    return json.loads(written.strip().splitlines()[-1])
