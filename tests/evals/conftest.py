"""Evidence made to order: what an evaluator would write, with effects of a known size and a fixed seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.recipe import Evaluate, Gate
from assay_evals.evidence import (
    Answer,
    Arm,
    Check,
    Cloze,
    Evidence,
    Generation,
    Header,
    RecipeUsed,
    SpeedRun,
    TextUsed,
    Window,
)
from assay_evals.runtimes.base import Runtime, open_runtime
from assay_evals.validity import EVALUATORS

EVALUATE = """{
  "text": {"source": "python-docs"}, "length": 64, "blocks": 6,
  "quality": [{"metric": "kl_divergence", "tokens": 2000}, {"metric": "top1_agreement", "tokens": 2000},
              {"metric": "cloze_accuracy", "samples": 600}],
  "speed": [{"metric": "decode_tokens_per_second", "prompt_tokens": 128, "new_tokens": 16},
            {"metric": "time_to_first_token", "prompt_tokens": 128}, {"metric": "peak_memory"},
            {"metric": "size_on_disk"}]
}"""
GATE = """{
  "kl_divergence": {"max": 0.10}, "top1_agreement": {"min": 0.80}, "cloze_accuracy": {"max_drop": 0.06},
  "decode_tokens_per_second": {"min_speedup": 1.5}, "time_to_first_token": {"max_ratio": 1.5},
  "peak_memory": {"max_ratio": 0.8}, "size_on_disk": {"max_ratio": 0.5}
}"""


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


def header(gate: str = GATE, evaluate: str = EVALUATE, **changes: Any) -> Header:
    values: dict[str, Any] = {
        "recipe": RecipeUsed(
            name="demo",
            digest=digest("1"),
            gate=Gate.model_validate_json(gate),
            evaluate=Evaluate.model_validate_json(evaluate),
        ),
        "candidate": Arm(
            bundle_digest=digest("c"),
            model_digest=digest("d"),
            dtype="float32",
            runtime="onnxruntime-genai 0.18.0",
            size_bytes=142_000_000,
            scheme="W4A16",
            bits_per_weight=4.6,
        ),
        "baseline": Arm(
            bundle_digest=digest("b"),
            model_digest=digest("a"),
            dtype="float32",
            runtime="onnxruntime-genai 0.18.0",
            size_bytes=540_000_000,
            scheme="none",
            bits_per_weight=32.0,
        ),
        "text": TextUsed(source="python-docs", digest=digest("7"), documents=40),
        "checks": tuple(Check(name=name, passed=True, detail="as it should be") for name in EVALUATORS),
        "environment": {
            "cpu": "Example CPU",
            "cores": 2,
            "os": "Linux",
            "python": "3.11",
            "packages": {"numpy": "2.4"},
        },
    }
    return Header(**(values | changes))


def windows(rng: np.random.Generator, documents: int, tokens: int, kl: float) -> list[Window]:
    made: list[Window] = []
    for number in range(documents):
        level = kl * rng.lognormal(-0.02, 0.2)
        values = level * rng.lognormal(-0.5, 1.0, tokens)
        nll = float(rng.normal(2.8, 0.3))
        made.append(
            Window(
                document=f"document-{number:02}",
                window=0,
                tokens=tokens,
                kl=tuple(float(value) for value in values),
                agreed=tuple(1 if draw > 0.08 else 0 for draw in rng.random(tokens)),
                nll_baseline=nll,
                nll_candidate=nll + float(rng.normal(kl / 2, 0.01)),
            )
        )
    return made


def clozes(rng: np.random.Generator, documents: int, each: int, lost: float, gained: float) -> list[Cloze]:
    made: list[Cloze] = []
    for number in range(documents):
        for position in range(each):
            right = bool(rng.random() < 0.45)
            flip = bool(rng.random() < (lost if right else gained))
            made.append(
                Cloze(
                    document=f"document-{number:02}",
                    window=0,
                    position=position,
                    word="statement",
                    context="the value is bound by the",
                    baseline=Answer(correct=right, answer="statement" if right else "code"),
                    candidate=Answer(correct=right != flip, answer="statement" if right != flip else "function"),
                )
            )
    return made


def runs(
    rng: np.random.Generator,
    blocks: int,
    noise: float,
    *,
    speedup: float = 3.3,
    drift: float = 0.0,
    new_tokens: int = 16,
) -> list[SpeedRun]:
    """drift: growth of the logarithm of every time per position within a block."""
    made: list[SpeedRun] = []
    for block in range(blocks):
        order = ("baseline", "candidate", "candidate", "baseline")
        if rng.random() < 0.5:
            order = ("candidate", "baseline", "baseline", "candidate")
        for position, arm in enumerate(order):
            slow = math.exp(rng.normal(0, noise) + drift * position)
            step = slow / (22.0 * (speedup if arm == "candidate" else 1.0))
            first = slow * (1.28 if arm == "candidate" else 1.10) * math.exp(rng.normal(0, noise))
            made.append(
                SpeedRun(
                    block=block,
                    position=position,  # pyright: ignore[reportArgumentType]
                    arm=arm,
                    load_seconds=0.4 * slow,
                    peak_memory_bytes=int((420e6 if arm == "candidate" else 810e6) * math.exp(rng.normal(0, 0.004))),
                    generations=(
                        Generation(
                            prompt_tokens=128, token_seconds=tuple(first + index * step for index in range(new_tokens))
                        ),
                    ),
                )
            )
    return made


def build(
    seed: int = 0,
    *,
    documents: int = 40,
    kl: float = 0.03,
    lost: float = 0.04,
    gained: float = 0.03,
    blocks: int = 6,
    noise: float = 0.02,
    speedup: float = 3.3,
    drift: float = 0.0,
    **changes: Any,
) -> Evidence:
    rng = np.random.default_rng(seed)
    return Evidence(
        header=header(**changes),
        windows=tuple(windows(rng, documents, 63, kl)),
        clozes=tuple(clozes(rng, documents, 20, lost, gained)),
        runs=tuple(runs(rng, blocks, noise, speedup=speedup, drift=drift)),
        digest=digest("e"),
    )


@pytest.fixture(scope="session")
def make_evidence() -> Callable[..., Evidence]:
    """Evidence of a good candidate; every argument of `build` changes one thing about it."""
    return build


@pytest.fixture(scope="session")
def good() -> Evidence:
    return build()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[[str], Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model("llama"))


@pytest.fixture(scope="module")
def runtime(tiny_model: Callable[[str], Path]) -> Runtime:
    return open_runtime("transformers", tiny_model("llama"))


@pytest.fixture(scope="module")
def other(tiny_model: Callable[[str], Path]) -> Runtime:
    """A model that is not the first one."""
    return open_runtime("transformers", tiny_model("mistral"))
