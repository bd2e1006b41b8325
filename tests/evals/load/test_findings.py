"""What levels made to order come to, against sums by hand."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from load_levels import PARAMETERS, level, request
from rich.console import Console
from scipy import stats

from assay.errors import UsageError
from assay_evals.load.arrivals import Load
from assay_evals.load.findings import LevelFindings, find, reasons_to_fail
from assay_evals.load.lag import LagWatch
from assay_evals.load.objectives import Asked, Objectives, read_asked, read_objectives
from assay_evals.load.records import ClientLag, Level, Measured
from assay_evals.load.result import conclude
from assay_evals.load.table import load_tables

NOTHING_ASKED = Asked(max_error_rate=0.01)


def steady(count: int, *gaps: float, **changes: Any) -> list[Any]:
    """Requests one after the other, each with these gaps."""
    return [request(number, number * sum(gaps), *gaps, **changes) for number in range(count)]


def notes(found: Level, **changes: Any) -> str:
    parameters = PARAMETERS if not changes else type(PARAMETERS)(**(vars(PARAMETERS) | changes))
    return " | ".join(find(found, parameters, NOTHING_ASKED).notes)


def test_figures_are_sums_by_hand() -> None:
    rows = steady(40, 0.5, 0.1, 0.2, 0.1)
    found = find(level(*rows), PARAMETERS, Asked(max_error_rate=0.01, price_per_hour=1.8))
    # 0.9 seconds a request, of 4 tokens.
    assert found.requests_per_second and found.output_tokens_per_second
    assert found.requests_per_second.value == pytest.approx(1 / 0.9)
    assert found.output_tokens_per_second.value == pytest.approx(4 / 0.9)
    assert found.cost_per_million_output_tokens
    assert found.cost_per_million_output_tokens.value == pytest.approx(1.8 / 3600 * 0.9 / 4 * 1e6)
    for percentiles, value in (
        (found.time_to_first_token, 0.5),
        (found.time_per_output_token, 0.4 / 3),
        (found.end_to_end_latency, 0.9),
    ):
        assert [one.seconds for one in percentiles] == [pytest.approx(value), pytest.approx(value), None]
        assert percentiles[2].needs_requests == 299
    # Gaps of 0.1, 0.2 and 0.1: two thirds are 0.1.
    assert [one.seconds for one in found.inter_token_latency][:2] == [pytest.approx(0.1), pytest.approx(0.2)]
    assert found.notes == ()


def test_only_measured_requests_have_latencies_but_all_make_throughput() -> None:
    rows = [
        request(0, 0.0, 1.0, 1.0, phase="warm-up"),
        *[request(number, number * 1.0, 0.5, 0.5) for number in range(1, 21)],
        request(21, 20.5, 3.0, 3.0, phase="cool-down"),
    ]
    found = find(level(*rows), PARAMETERS, NOTHING_ASKED)
    assert (found.warm_up, found.requests, found.cool_down) == (1, 20, 1)
    assert [one.seconds for one in found.end_to_end_latency[:1]] == [1.0]
    # From 1.0 to 21.0 s: both tokens of each measured request, and the warm-up's two, at 1.0 and 2.0.
    assert found.output_tokens_per_second and found.output_tokens_per_second.value == pytest.approx(42 / 20)
    assert found.requests_per_second and found.requests_per_second.value == pytest.approx(21 / 20)


def test_failures_count_by_kind_with_the_first_message() -> None:
    rows = steady(20, 0.1, 0.1)
    for number, kind in ((3, "cut"), (5, "HTTP 500"), (7, "HTTP 500")):
        rows[number] = request(number, rows[number].due, 0.1, failure=kind)
    found = find(level(*rows), PARAMETERS, NOTHING_ASKED)
    assert [(one.kind, one.count) for one in found.failures] == [("HTTP 500", 2), ("cut", 1)]
    assert found.failures[0].first_message == "it was HTTP 500 at 5"
    assert found.error_rate and found.error_rate.value == 0.15
    assert found.error_rate.interval == pytest.approx(
        (stats.beta.ppf(0.05, 3, 18), stats.beta.ppf(0.95, 4, 17)), rel=1e-9
    )
    # A failed request's chunk is of no use to anyone.
    assert found.output_tokens_per_second and found.output_tokens_per_second.value == pytest.approx(
        17 * 2 / 4.0, rel=0.01
    )
    (reason,) = reasons_to_fail([found], NOTHING_ASKED)
    assert reason.startswith("concurrency 1: 3 of 20 requests failed, 15.0%; at most 1% was asked. HTTP 500: it was")


def test_goodput_counts_requests_that_keep_every_objective() -> None:
    rows = steady(20, 0.1, 0.1)
    rows[1] = request(1, rows[1].due, 0.6, 0.1)  # too late a first token
    rows[2] = request(2, rows[2].due, 0.1, 0.4)  # too slow a second one
    rows[3] = request(3, rows[3].due, 0.1)  # one token has no time per token
    rows[4] = request(4, rows[4].due, 0.1, 0.1, failure="cut")
    asked = read_asked("ttft=0.5, tpot=0.2,e2e=10", 0.5, 0.9, None, "USD")
    found = find(level(*rows), PARAMETERS, asked)
    assert found.good_share and found.good_share.value == 16 / 20
    assert found.goodput_requests_per_second and found.requests_per_second
    assert found.goodput_requests_per_second.value / found.requests_per_second.value == pytest.approx(16 / 19)
    assert reasons_to_fail([found], asked) == [
        "concurrency 1: 80.0% of the requests met every objective; at least 90% was asked."
    ]
    assert not reasons_to_fail([found], read_asked("ttft=0.5", 0.5, 0.8, None, "USD"))


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=x", "ttft=0", "ttft=inf", "itl=1", "ttft=1,ttft=2", "ttft=1,"]
)
def test_what_is_no_objective_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="write each of ttft, tpot, e2e at most once"):
        read_objectives(text)


def test_a_share_of_goodput_needs_objectives() -> None:
    assert (
        read_objectives("e2e=2") == Objectives(e2e=2.0)
        and str(read_objectives("e2e=2,ttft=1")) == "ttft ≤ 1 s, e2e ≤ 2 s"
    )
    with pytest.raises(UsageError, match="none are declared"):
        read_asked(None, 0.01, 0.9, None, "USD")


def test_neighbours_that_run_together_are_not_counted_as_independent() -> None:
    """Four at a time in step: 40 requests of ten batches tell less than 40 one by one."""
    rows = [request(number, number // 4 * 1.0, 0.5 + 0.01 * (number // 4), 0.1) for number in range(40)]
    alone = find(level(*rows), PARAMETERS, NOTHING_ASKED).time_to_first_token
    together = find(level(*rows, load=Load("concurrency", 4.0)), PARAMETERS, NOTHING_ASKED).time_to_first_token
    assert alone[0].seconds == together[0].seconds and alone[0].interval and together[0].interval
    assert together[0].interval[0] < alone[0].interval[0] and together[0].interval[1] > alone[0].interval[1]
    assert alone[1].seconds is not None and together[1].seconds is None and (together[1].needs_requests or 0) > 100


# Notes


def test_a_client_that_lags_says_so() -> None:
    slow = ClientLag(ticks=9, median_seconds=0.0, p99_seconds=0.03, largest_seconds=0.1, processor_share=0.95)
    said = notes(level(*steady(9, 0.5, 0.1), client=slow))
    assert "lagged by up to 30.0 ms (p99), which is not small against 100.0 ms" in said and "95% of a core" in said
    assert "lag" in notes(level(*steady(9, 0.5, 0.1), client=None))
    assert "lag" not in notes(level(*steady(9, 0.5, 0.4), client=slow))


def test_the_lag_is_how_late_the_loop_comes() -> None:
    async def block(seconds: float) -> ClientLag | None:
        watch = LagWatch()
        with watch.watching():
            for _ in range(5):
                await asyncio.sleep(0.05)
                time.sleep(seconds)
        return watch.found

    blocked, free = asyncio.run(block(0.3)), asyncio.run(block(0.0))
    assert blocked and free
    assert 0.2 < blocked.largest_seconds < 1 and blocked.p99_seconds > 0.2
    assert free.median_seconds < 0.02


def test_a_rate_that_the_endpoint_does_not_keep_up_with_is_said() -> None:
    load = Load("rate", 10.0)
    keeps_up = [request(number, number * 0.1, 0.2, 0.1) for number in range(100)]
    falls_behind = [request(number, number * 0.1, 0.2 + 0.1 * number, 0.1) for number in range(100)]
    assert "keep up" not in notes(level(*keeps_up, load=load))
    assert "does not keep up with this rate: 51 requests were in flight" in notes(level(*falls_behind, load=load))


def test_tokens_that_are_not_what_was_asked_are_said() -> None:
    assert "answers have 2 tokens (median) of the 4 allowed" in notes(level(*steady(9, 0.5, 0.1)))
    four = (0.5, 0.1, 0.1, 0.1)
    assert "prompts have 30 tokens (median); 16 were asked for" in notes(level(*steady(9, *four, prompt_tokens=30)))
    assert "50% of the prompt tokens came out of the server's prefix cache" in notes(
        level(*steady(9, *four, prompt_tokens=16, cached_tokens=8))
    )
    assert "whole answers come in one chunk" in notes(level(*steady(9, 0.5, per_chunk=4)))
    assert notes(level(*steady(9, *four, prompt_tokens=30)), input_tokens=None) == ""


# The table


def shown(*found: Level, **asked: Any) -> str:
    measured = Measured(started="now", environment={}, parameters=PARAMETERS, levels=found)
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        for table in load_tables(conclude(measured, Asked(max_error_rate=0.01, **asked))):
            console.print(table)
    return capture.get()


def test_the_table_has_every_figure_with_its_interval() -> None:
    text = shown(
        level(*steady(40, 0.5, 0.1, 0.2, 0.1)), price_per_hour=1.6, currency="EUR", objectives=Objectives(ttft=1)
    )
    for words in ("concurrency 1", "1.11 req/s", "4.44 tok/s", "500 ms", "299 requests", "100 EUR", "100.0%"):
        assert words in text, words
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_many_levels_go_below_each_other_within_80_columns() -> None:
    rows = steady(10, 0.5, 0.1)
    levels = [level(*rows, load=Load("concurrency", float(number))) for number in (1, 2, 4, 8, 16)]
    text = shown(*levels)
    assert all(str(one.load) in text for one in levels) and text.count("time per output token p50") == 2
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_level_without_any_answer_is_shown_too() -> None:
    rows = [request(number, number * 0.1, failure="HTTP 500") for number in range(10)]
    text = shown(level(*rows, stopped="the first 10 requests all failed"))
    assert "100.0%" in text and "10 HTTP 500" in text
    empty: LevelFindings = find(level(stopped="interrupted by Ctrl-C", unfinished=2), PARAMETERS, NOTHING_ASKED)
    assert empty.error_rate is None and "2 unfinished" in empty.notes[0]
    assert "concurrency 1" in shown(level(stopped="interrupted by Ctrl-C"))
