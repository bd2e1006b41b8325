"""How often the gate is wrong: simulated runs whose truth is known, judged as real ones are.

    .venv/bin/python benchmarks/gate_soundness.py [--runs 1000] [--only NAME]

At the margin: the candidate is exactly as bad as a gate forbids, so every PASS is a false acceptance; at most 5 % may be (speed is judged
by a two-sided 95 % interval, which makes it 2.5 %). Power: a candidate without loss, at the sample size that planning asks for, must pass
four times in five. A/A: a candidate that is its baseline; the control must not find a drift more often than in 5 % of the runs.

Prints one JSON line for each case: how many of the runs passed, and the exact 95 % interval of that share.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from assay.recipe import Evaluate, Gate
from assay_evals.evidence import (
    Answer,
    Arm,
    Cloze,
    Evidence,
    Generation,
    Header,
    RecipeUsed,
    SpeedRun,
    TextUsed,
    Window,
)
from assay_evals.gate import gate_row
from assay_evals.planning import Assumptions
from assay_evals.speed_findings import ORDERS, decode_tokens_per_second
from assay_evals.statistics import binomial_lower, binomial_upper

Random = np.random.Generator
NEW_TOKENS, TOKENS = 16, 20_000
_EVALUATE = """{
  "quality": [{"metric": "kl_divergence"}],
  "speed": [{"metric": "decode_tokens_per_second", "prompt_tokens": 64, "new_tokens": 16}]
}"""


@dataclass(frozen=True)
class Case:
    """What is simulated, what share of the runs may (or must) have the outcome that is counted, and one run's outcome."""

    name: str
    what: str
    bound: float
    at_most: bool
    run: Callable[[Random], bool]


def evidence(
    windows: tuple[Window, ...] = (), clozes: tuple[Cloze, ...] = (), runs: tuple[SpeedRun, ...] = ()
) -> Evidence:
    arm = Arm(
        bundle_digest="",
        model_digest="",
        dtype="float32",
        runtime="",
        size_bytes=1,
        scheme="none",
        bits_per_weight=None,
    )
    used = RecipeUsed(name="", digest="", gate=Gate(), evaluate=Evaluate.model_validate_json(_EVALUATE))
    text = TextUsed(source="", digest="", documents=0)
    header = Header(recipe=used, candidate=arm, baseline=arm, text=text, checks=(), environment={})
    return Evidence(header=header, windows=windows, clozes=clozes, runs=runs, digest="")


def uneven(random: Random, documents: int, samples: int) -> list[int]:
    """How many samples each document has: the longest some ten times the shortest, as real texts are."""
    shares = random.lognormal(0, 0.7, documents)
    return [max(1, round(samples * share / shares.sum())) for share in shares]


def questions(
    random: Random, documents: int, *, samples: int = 1300, lost: float, gained: float, alike: float
) -> Evidence:
    """Cloze answers. lost, gained: shares of all questions that turn wrong, and right.

    alike: how much the documents differ in both, as the standard deviation of a document's rate over its mean (gamma).
    """
    rows: list[Cloze] = []
    for document, count in enumerate(uneven(random, documents, samples)):
        rate = random.gamma(1 / alike**2, alike**2) if alike else 1.0
        turned = random.random(count)
        for position in range(count):
            worse, better = turned[position] < lost * rate, turned[position] > 1 - gained * rate
            # What did not turn is right in both, or wrong in both: that is the same to a paired difference.
            before, after = (worse, better) if worse or better else (True, True)
            rows.append(
                Cloze(
                    document=f"{document:04}",
                    window=0,
                    position=position,
                    word="",
                    context="",
                    baseline=Answer(correct=bool(before), answer=""),
                    candidate=Answer(correct=bool(after), answer=""),
                )
            )
    return evidence(clozes=tuple(rows))


def divergences(random: Random, documents: int, *, mean: float, between: float, within: float) -> Evidence:
    """20,000 tokens in windows of 128: lognormal, with a lognormal level for each document; both have the mean 1 before they are scaled."""
    rows: list[Window] = []
    for document, count in enumerate(uneven(random, documents, TOKENS)):
        level = mean * random.lognormal(-(between**2) / 2, between)
        for window in range(-(-count // 128)):
            values = level * random.lognormal(-(within**2) / 2, within, min(128, count - 128 * window))
            rows.append(
                Window(
                    document=f"{document:04}",
                    window=window,
                    tokens=len(values),
                    kl=tuple(values.tolist()),
                    agreed=(1,) * len(values),
                    nll_baseline=1.0,
                    nll_candidate=1.0,
                )
            )
    return evidence(windows=tuple(rows))


def agreement(random: Random, documents: int, *, mean: float, alike: float) -> Evidence:
    """20,000 tokens, which disagree at a rate that differs between documents."""
    rows: list[Window] = []
    for document, count in enumerate(uneven(random, documents, TOKENS)):
        rate = min(1.0, (1 - mean) * random.gamma(1 / alike**2, alike**2))
        agreed = tuple((random.random(count) >= rate).astype(int).tolist())
        rows.append(
            Window(
                document=f"{document:04}",
                window=0,
                tokens=count,
                kl=(0.0,) * count,
                agreed=agreed,
                nll_baseline=1.0,
                nll_candidate=1.0,
            )
        )
    return evidence(windows=tuple(rows))


def speeds(
    random: Random, blocks: int, *, speedup: float, noise: float, drift: float = 0.0, heavy: bool = False
) -> Evidence:
    """Blocks of four processes. noise: standard deviation of the logarithm of a process's time.  drift: of the machine, from one process to
    the next.  heavy: Student's noise of three degrees instead of normal (other programs come and go)."""
    rows: list[SpeedRun] = []
    for block in range(blocks):
        order = ORDERS[int(random.random() < 0.5)]
        level = random.normal(0, 0.1)
        for position, arm in enumerate(order):
            error = random.standard_t(3) / 3**0.5 if heavy else random.normal()
            seconds = 0.02 * np.exp(level + drift * position + noise * error)
            if arm == "candidate":
                seconds /= speedup
            times = tuple(float(0.1 + seconds * index) for index in range(NEW_TOKENS))
            rows.append(
                SpeedRun(
                    block=block,
                    position=(0, 1, 2, 3)[position],
                    arm="baseline" if arm == "baseline" else "candidate",
                    load_seconds=1.0,
                    peak_memory_bytes=1,
                    generations=(Generation(prompt_tokens=64, token_seconds=times),),
                )
            )
    return evidence(runs=tuple(rows))


def passes_at_some_look(random: Random, looks: int) -> bool:
    """Cloze answers at the margin, of 40 documents at first and twice as many at each further look; it ends when a look settles it."""
    whole = questions(
        random, 40 * 2 ** (looks - 1), samples=1300 * 2 ** (looks - 1), lost=0.065, gained=0.035, alike=0.7
    )
    evaluate = whole.header.recipe.evaluate.model_copy(update={"looks": looks})
    header = replace(whole.header, recipe=replace(whole.header.recipe, evaluate=evaluate))
    for look in range(looks):
        # Documents are numbered in the order in which they are read.
        clozes = tuple(row for row in whole.clozes if int(row.document) < 40 * 2**look)
        verdict = gate_row("cloze_accuracy", {"max_drop": 0.03}, replace(whole, header=header, clozes=clozes)).verdict
        if verdict != "INCONCLUSIVE":
            return verdict == "PASS"
    return False


def passes(metric: str, criterion: dict[str, float], measured: Evidence) -> bool:
    return gate_row(metric, criterion, measured).verdict == "PASS"


def drift_found(measured: Evidence) -> bool:
    """Whether the control's interval leaves out 1."""
    interval = decode_tokens_per_second(measured)[1].interval
    return interval is not None and not interval[0] <= 1 <= interval[1]


def cases() -> Iterator[Case]:
    """Sizes around those of the shipped recipes: 1,300 questions and 20,000 tokens in some 40 documents, 6 to 8 blocks."""
    drop = {"max_drop": 0.03}
    for documents, alike in ((39, 0.0), (39, 0.7), (20, 1.0), (200, 0.7)):
        yield Case(
            f"cloze at the margin, {documents} documents, rates varying by {alike:g}",
            "1,300 questions, 6.5 % lost and 3.5 % gained, 3 points forbidden",
            0.05,
            True,
            lambda random, documents=documents, alike=alike: passes(
                "cloze_accuracy", drop, questions(random, documents, lost=0.065, gained=0.035, alike=alike)
            ),
        )
    for samples, alike in ((300, 0.0), (1000, 0.0), (1000, 0.5), (3000, 0.5)):
        yield Case(
            f"cloze at the margin, rare differences, {samples} questions, rates varying by {alike:g}",
            "1 % lost, none gained, 1 point forbidden, 60 documents",
            0.05,
            True,
            lambda random, samples=samples, alike=alike: passes(
                "cloze_accuracy",
                {"max_drop": 0.01},
                questions(random, 60, samples=samples, lost=0.01, gained=0.0, alike=alike),
            ),
        )
    for looks in (2, 3):
        yield Case(
            f"cloze at the margin, up to {looks} looks",
            "1,300 questions in 40 documents, doubled while unsettled; 6.5 % lost and 3.5 % gained, 3 points forbidden",
            0.05,
            True,
            lambda random, looks=looks: passes_at_some_look(random, looks),
        )
    for documents, between, within in ((39, 0.3, 1.3), (39, 0.6, 1.8), (20, 0.6, 1.8), (200, 0.6, 1.8)):
        yield Case(
            f"divergence at the limit, {documents} documents, spread {between:g} between and {within:g} within",
            "20,000 tokens, lognormal, mean 0.1 where at most 0.1 is asked",
            0.05,
            True,
            lambda random, documents=documents, between=between, within=within: passes(
                "kl_divergence", {"max": 0.1}, divergences(random, documents, mean=0.1, between=between, within=within)
            ),
        )
    for alike in (0.2, 0.5):
        yield Case(
            f"agreement at the limit, rates varying by {alike:g}",
            "20,000 tokens in 39 documents, 90 % where at least 90 % is asked",
            0.05,
            True,
            lambda random, alike=alike: passes(
                "top1_agreement", {"min": 0.9}, agreement(random, 39, mean=0.9, alike=alike)
            ),
        )
    for blocks, noise, drift, heavy in ((6, 0.03, 0.0, False), (8, 0.05, 0.03, False), (8, 0.03, 0.0, True)):
        yield Case(
            f"speed at the limit, {blocks} blocks, noise {noise:g}, drift {drift:g}{', heavy tails' if heavy else ''}",
            "1.5 times as fast where 1.5 is asked",
            0.025,
            True,
            lambda random, blocks=blocks, noise=noise, drift=drift, heavy=heavy: passes(
                "decode_tokens_per_second",
                {"min_speedup": 1.5},
                speeds(random, blocks, speedup=1.5, noise=noise, drift=drift, heavy=heavy),
            ),
        )
    for heavy in (False, True):
        yield Case(
            f"A/A, 8 blocks{', heavy tails' if heavy else ''}",
            "the control finds a drift where there is none",
            0.05,
            True,
            lambda random, heavy=heavy: drift_found(speeds(random, 8, speedup=1.0, noise=0.05, heavy=heavy)),
        )
    yield Case(
        "A/A, a limit just below 1",
        "a candidate that is its baseline is said to FAIL: at least 0.99 times as fast is asked",
        0.05,
        True,
        lambda random: (
            gate_row(
                "decode_tokens_per_second", {"min_speedup": 0.99}, speeds(random, 8, speedup=1.0, noise=0.02)
            ).verdict
            == "FAIL"
        ),
    )
    planned, assumed = 1300, Assumptions()
    flips = assumed.discordance / 2
    yield Case(
        "power, cloze without a loss at the planned size",
        f"{planned:,} questions, 4 % lost and 4 % gained, 3 points forbidden",
        0.80,
        False,
        lambda random: passes(
            "cloze_accuracy", drop, questions(random, 39, samples=planned, lost=flips, gained=flips, alike=0.3)
        ),
    )
    yield Case(
        "power, divergence at half of the limit",
        "20,000 tokens in 39 documents, mean 0.05 where at most 0.1 is asked",
        0.80,
        False,
        lambda random: passes(
            "kl_divergence", {"max": 0.1}, divergences(random, 39, mean=0.05, between=0.3, within=1.3)
        ),
    )
    yield Case(
        "power, twice as fast where 1.5 is asked",
        "8 blocks, noise 0.05",
        0.80,
        False,
        lambda random: passes(
            "decode_tokens_per_second", {"min_speedup": 1.5}, speeds(random, 8, speedup=2.0, noise=0.05)
        ),
    )


def simulate(case: Case, runs: int, seed: int = 0) -> dict[str, object]:
    """The share of runs with the outcome, its exact interval, and whether that is compatible with the bound."""
    random = np.random.default_rng(seed)
    count = sum(case.run(random) for _ in range(runs))
    low, high = binomial_lower(count, runs, 0.025), binomial_upper(count, runs, 0.025)
    sound = low <= case.bound if case.at_most else high >= case.bound
    row: dict[str, object] = {"case": case.name, "what": case.what, "runs": runs, "share": count / runs}
    return row | {"interval": [round(low, 4), round(high, 4)], "bound": case.bound, "sound": sound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for case in cases():
        if arguments.only in case.name:
            rows.append(simulate(case, arguments.runs))
            print(json.dumps(rows[-1]), flush=True)
    if unsound := [row["case"] for row in rows if not row["sound"]]:
        raise SystemExit(f"not sound: {'; '.join(map(str, unsound))}")


if __name__ == "__main__":
    main()
