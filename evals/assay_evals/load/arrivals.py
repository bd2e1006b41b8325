"""When requests are sent: the loads of a run, and the arrivals of an open loop.

A closed loop keeps a number of requests in flight: a new one is sent when one ends. An open loop sends at a rate whether or not the
endpoint keeps up, as independent users do: the gaps are exponential, which makes the arrivals a Poisson process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from assay.errors import UsageError

Kind = Literal["concurrency", "rate"]


@dataclass(frozen=True)
class Load:
    """One level: requests in flight (concurrency), or arrivals per second (rate)."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    kind: Kind
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}" + ("/s" if self.kind == "rate" else "")


def read_loads(kind: Kind, text: str) -> tuple[Load, ...]:
    """Levels from a list such as 1,2,4; UsageError names what is no number, or occurs twice."""
    loads: list[Load] = []
    for word in text.split(","):
        try:
            value = float(word) if kind == "rate" else int(word)
        except ValueError:
            value = 0
        if not 0 < value < 1e6:
            what = "numbers of requests a second, such as 0.5,1,2" if kind == "rate" else "whole numbers, such as 1,2,4"
            raise UsageError(f"--{kind} {text}: {word.strip()!r} is none of what it lists: {what}.")
        loads.append(Load(kind, float(value)))
    if len(set(loads)) < len(loads):
        raise UsageError(f"--{kind} {text}: a level is listed twice; for more evidence raise --requests.")
    return tuple(loads)


def poisson_arrivals(rate: float, seed: str) -> Iterator[float]:
    """Seconds from now to each arrival, without end: sums of gaps from an exponential distribution of mean 1 / rate."""
    source, at = random.Random(seed), 0.0
    while True:
        at += source.expovariate(rate)
        yield at
