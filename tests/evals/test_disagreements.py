from __future__ import annotations

from dataclasses import replace

from assay_evals.disagreements import mean_divergence, worst_disagreements
from assay_evals.evidence import Continuation, Continued, Evidence


def test_flips_are_answers_that_went_from_right_to_wrong_worst_window_first(good: Evidence) -> None:
    flips = worst_disagreements(good, 1000).flips
    assert len(flips) == sum(row.baseline.correct and not row.candidate.correct for row in good.clozes)
    assert all(row.baseline.correct and not row.candidate.correct for row in flips)
    divergence = {window.document: mean_divergence(window) for window in good.windows}
    ranks = [divergence[flip.document] for flip in flips]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) > 1


def test_windows_come_by_falling_divergence_and_a_broken_one_first(good: Evidence) -> None:
    broken = replace(good.windows[5], kl=(None,) * 63)
    evidence = replace(good, windows=(*good.windows[:5], broken, *good.windows[6:]))
    found = worst_disagreements(evidence, 4).windows
    assert found[0] == broken
    means = [mean_divergence(window) for window in found[1:]]
    others = sorted(mean_divergence(window) for window in good.windows if window.document != broken.document)
    assert means == others[::-1][:3]


def test_the_order_of_the_samples_does_not_matter(good: Evidence) -> None:
    turned = replace(good, windows=good.windows[::-1], clozes=good.clozes[::-1])
    assert worst_disagreements(turned, 7) == worst_disagreements(good, 7)


def continuation(number: int, same: int, before: bool, after: bool) -> Continuation:
    arms = [Continued(tokens=9 if ended else 12, ended=ended, text="so it went on") for ended in (before, after)]
    return Continuation(
        document="d",
        window=number,
        prompt_tokens=8,
        new_tokens=12,
        prompt="once",
        same=same,
        together="so",
        baseline=arms[0],
        candidate=arms[1],
    )


def test_continuations_that_do_not_end_come_first_then_those_that_part_soonest(good: Evidence) -> None:
    rows = (continuation(0, 5, True, True), continuation(1, 2, True, True), continuation(2, 9, True, False))
    alike = continuation(3, 12, False, False)
    found = worst_disagreements(replace(good, continuations=(*rows, alike)), 5).continuations
    assert [row.window for row in found] == [2, 1, 0]


def test_nothing_measured_gives_nothing(good: Evidence) -> None:
    found = worst_disagreements(replace(good, windows=(), clozes=()), 5)
    assert (found.flips, found.windows) == ((), ())
