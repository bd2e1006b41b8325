from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from assay_evals.evidence import Answer, Continuation, Continued, Evidence
from assay_evals.gate import judge
from assay_evals.report import render_report
from assay_evals.report.charts import Axis, divergence_strip, forest_row
from assay_evals.report.layers import chart_layers, read_layers
from assay_evals.report.table import verdict_table

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
LOCK = {"model": {"source": "package:demo/model.gguf"}, "seed": 0}


def layer(name: str, error: float | None = 0.05, scheme: str = "W4A16") -> dict[str, Any]:
    bits = 4.25 if scheme == "W4A16" else 8.25
    return {"name": name, "scheme": scheme, "group_size": 64, "relative_error": error, "bits_per_weight": bits}


def manifest(blocks: int = 6) -> dict[str, Any]:
    layers = [layer(f"model.layers.{block}.{kind}", 0.01 * (block + 1)) for block in range(blocks) for kind in KINDS]
    layers.append(layer("lm_head", None, "W8A16"))
    return {"version": 1, "layers": layers, "fallbacks": ["lm_head was kept at 8 bits."]}


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside of styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def page(
    evidence: Evidence, made_of: dict[str, Any] | None = None, lock: dict[str, Any] | None = None
) -> tuple[str, Page]:
    made, locked = manifest() if made_of is None else made_of, LOCK if lock is None else lock
    source = render_report("html", judge(evidence), evidence, made, locked).decode()
    return source, Page(source)


def test_the_page_needs_nothing_but_itself(good: Evidence) -> None:
    source, parsed = page(good)
    assert len(source.encode()) < 1_000_000
    assert not re.search(r"https?://|url\(|@import", source)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert not [attributes for _, attributes in parsed.tags if {"src", "href", "onload"} & set(attributes)]
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in parsed.tags)
    assert parsed.open == []


def test_the_verdict_and_its_consequences_come_first(good: Evidence) -> None:
    _, parsed = page(good)
    opening = parsed.text[:700]
    assert "PASS" in opening
    assert "Decode 3.3× as fast (95% interval 3.24× to 3.34×), 74% smaller on disk" in opening
    assert (
        "cloze accuracy 0.8 points lower (90% interval −2.2 to +1.2 points), first token 16% later (95% interval"
        in opening
    )


def test_what_the_figures_are_figures_of_is_said(good: Evidence) -> None:
    """The baseline's dtype flatters a ratio, and bits of the quantized weights alone flatter a size."""
    _, parsed = page(good, manifest() | {"parameters": 134_515_008})
    opening = parsed.text[:1200]
    assert "the same model, unquantized, in float32" in opening
    assert "4.60 bits per quantized weight, 8.45 per parameter on disk" in opening
    _, parsed = page(good)
    assert "per parameter" not in parsed.text


def test_every_gate_check_digest_and_layer_kind_is_there(good: Evidence) -> None:
    source, parsed = page(good)
    verdict = judge(good)
    for row in verdict.gates:
        assert row.reason in parsed.text
    for check in verdict.checks:
        assert check.detail in parsed.text
    for digest in (verdict.candidate, verdict.baseline, verdict.recipe, verdict.evidence, good.header.text.digest):
        assert digest in parsed.text
    for text in (*KINDS, "lm_head was kept at 8 bits.", "Example CPU", '"package:demo/model.gguf"', "assay compile"):
        assert text in parsed.text
    assert sum("forest" in (attributes.get("class") or "").split() for _, attributes in parsed.tags) == 7
    assert source.count('class="flip"') == 10


def test_the_same_run_gives_the_same_page(good: Evidence) -> None:
    assert page(good)[0] == page(good)[0]


HOSTILE = "<script>alert(1)</script>\"'&"


def test_text_of_models_and_documents_stays_text(good: Evidence) -> None:
    clozes = tuple(
        replace(
            row,
            context=HOSTILE,
            word=HOSTILE,
            document=HOSTILE + str(index),
            candidate=Answer(correct=False, answer=HOSTILE),
        )
        for index, row in enumerate(good.clozes)
    )
    windows = tuple(replace(row, document=HOSTILE + str(index)) for index, row in enumerate(good.windows))
    made = manifest() | {
        "fallbacks": [HOSTILE],
        "layers": [layer(f"model.layers.0.{HOSTILE}"), layer(HOSTILE, scheme=HOSTILE)],
    }
    header = replace(
        good.header,
        environment={HOSTILE: HOSTILE},
        candidate=replace(good.header.candidate, scheme=HOSTILE, runtime=HOSTILE),
        baseline=replace(good.header.baseline, runtime=HOSTILE),
    )
    _, parsed = page(replace(good, header=header, windows=windows, clozes=clozes), made, {HOSTILE: HOSTILE})
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert parsed.text.count("<script>alert(1)</script>") > 30


def test_continuations_stand_beside_each_other_from_where_they_part(good: Evidence) -> None:
    shared: dict[str, Any] = {"window": 0, "prompt_tokens": 8, "new_tokens": 12, "prompt": "once", "together": " upon"}
    before = Continued(tokens=9, ended=True, text=" upon a time.")
    after = Continued(tokens=12, ended=False, text=" upon upon upon")
    parted = Continuation(document="d", same=1, baseline=before, candidate=after, **shared)
    alike = Continuation(document="e", same=9, baseline=before, candidate=before, **shared)
    _, parsed = page(replace(good, continuations=(parted, alike)))
    assert "1 of 2 prompts are continued differently" in parsed.text
    assert "… once upon Baseline a time. ▪ Candidate upon upon … d, window 0: 1 tokens in common" in parsed.text


def test_long_texts_are_cut_and_said_to_be(good: Evidence) -> None:
    clozes = tuple(replace(row, context="word " * 10_000) for row in good.clozes)
    source, parsed = page(replace(good, clozes=clozes), lock={"notes": "x" * 2_000_000})
    assert len(source) < 1_000_000
    assert "49,760 more characters" in parsed.text


def test_a_model_of_thousands_of_experts_fits(good: Evidence) -> None:
    layers = [
        layer(f"model.layers.{block}.mlp.experts.{expert}.{kind}", 0.001 * expert)
        for block in range(48)
        for expert in range(128)
        for kind in ("gate_proj", "up_proj")
    ]
    source, parsed = page(good, {"version": 1, "layers": layers})
    assert len(source) < 1_000_000
    assert "mlp.experts.*.gate_proj" in parsed.text
    assert "12288" in parsed.text


@pytest.mark.parametrize(
    ("changes", "word", "reason"),
    [
        ({"kl": 0.2}, "FAIL", "KL divergence: Even the better end"),
        ({"speedup": 1.5}, "INCONCLUSIVE", "Decode speed: The interval"),
    ],
)
def test_a_verdict_short_of_pass_says_why(
    make_evidence: Callable[..., Evidence], changes: dict[str, float], word: str, reason: str
) -> None:
    _, parsed = page(make_evidence(**changes))
    assert word in parsed.text[:200]
    assert f"Why {reason}" in parsed.text
    assert "It is not published." in parsed.text


@pytest.mark.parametrize(
    "parts", [{"runs": ()}, {"windows": ()}, {"clozes": ()}, {"windows": (), "clozes": (), "runs": ()}]
)
def test_a_broken_measurement_promises_nothing(good: Evidence, parts: dict[str, Any]) -> None:
    _, parsed = page(replace(good, **parts), {}, {})
    assert "INVALID" in parsed.text[:200]
    assert "smaller on disk" not in parsed.text
    assert "as fast" not in parsed.text


def test_windows_without_a_finite_divergence_are_drawn_too(good: Evidence) -> None:
    broken = tuple(replace(window, kl=(None,) * 63) for window in good.windows)
    _, parsed = page(replace(good, windows=broken))
    assert "INVALID" in parsed.text[:200]
    assert "not measured" in parsed.text


def positions(markup: str) -> tuple[float, float, float]:
    """Low end, point and high end of a forest row in percent of its width."""
    found = re.search(r"<g class='whisker'><line x1='([\d.]+)%' x2='([\d.]+)%'", markup)
    point = re.search(r"<svg class='mark' x='([\d.]+)%'", markup)
    assert found
    assert point
    return float(found[1]), float(point[1]), float(found[2])


def test_the_forest_has_the_limit_in_the_middle_and_good_on_the_right(make_evidence: Callable[..., Evidence]) -> None:
    fine, poor = judge(make_evidence()), judge(make_evidence(kl=0.2, lost=0.4, speedup=1.2))
    for row in fine.gates[:-1]:
        low, point, high = positions(forest_row(row))
        assert 50 <= low < point < high <= 100, row.metric
    for row in poor.gates:
        if row.verdict == "FAIL":
            low, point, high = positions(forest_row(row))
            assert 0 <= low < point < high < 50, row.metric
    unclear = next(row for row in judge(make_evidence(speedup=1.5)).gates if row.verdict == "INCONCLUSIVE")
    low, _, high = positions(forest_row(unclear))
    assert low < 50 < high


def test_outcomes_differ_in_shape_and_not_in_colour_alone(make_evidence: Callable[..., Evidence]) -> None:
    rows = {row.verdict: row for row in judge(make_evidence(kl=0.2, speedup=1.5)).gates}
    marks = {
        verdict: re.sub(r".*class='mark'[^>]*>(.*?)</svg>.*", r"\1", forest_row(row)) for verdict, row in rows.items()
    }
    assert len(set(marks.values())) == 3


def test_axes_have_a_few_round_ticks_within_them() -> None:
    for low, high in ((0.0, 83.0), (37.2, 42.9), (0.0, 0.07), (-3.0, 1200.0)):
        ticks = Axis(low, high, 0, 100).ticks()
        assert 3 <= len(ticks) <= 7
        assert all(low <= tick <= high for tick in ticks)
    assert Axis(10, 20, 100, 200).at(15) == 150


def test_the_strip_keeps_the_largest_divergence_of_each_stretch(good: Evidence) -> None:
    window = replace(good.windows[0], tokens=300, kl=tuple([0.0] * 200 + [4.0] + [0.0] * 99), agreed=(1,) * 300)
    heights = [float(height) for height in re.findall(r"V([\d.]+)H", divergence_strip(window, 4.0, bins=10))]
    assert len(heights) == 10
    assert heights.index(min(heights)) == 6
    assert min(heights) == 2


def test_layers_are_grouped_by_kind_and_the_worst_expert_stands_for_its_block() -> None:
    made = [layer(f"model.layers.{b}.mlp.experts.{e}.up_proj", 0.01 * e + 0.1 * b) for b in range(2) for e in range(3)]
    found = chart_layers(
        read_layers({"layers": [*made, layer("model.layers.1.self_attn.q_proj", None), layer("lm_head")]})
    )
    assert [strip.kind for strip in found.strips] == ["mlp.experts.*.up_proj", "self_attn.q_proj"]
    assert found.strips[0].largest == "12%"
    assert found.strips[0].chart.count("<title>") == 2
    assert "experts.2.up_proj: W4A16, groups of 64, error 2%" in found.strips[0].chart
    assert found.strips[1].largest == "not measured"
    assert [one.name for one in found.alone] == ["lm_head"]
    assert found.worst[0].name == "model.layers.1.mlp.experts.2.up_proj"
    assert found.unknown


def test_precisions_are_named_as_they_were_built() -> None:
    entries = [layer("a", scheme="none"), layer("b") | {"group_size": "channel"}, layer("c"), layer("d"), {"name": "e"}]
    found = chart_layers(read_layers({"layers": entries})).precisions
    names = [(one.precision, one.modules) for one in found]
    assert names == [("W4A16, groups of 64", 2), ("W4A16, per channel", 1), ("unknown", 1), ("unquantized", 1)]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(make_evidence: Callable[..., Evidence], width: int) -> None:
    verdict = judge(make_evidence(speedup=1.5, kl=0.2))
    output = io.StringIO()
    Console(width=width, file=output).print(verdict_table(verdict))
    text = output.getvalue()
    assert "…" not in text
    for expected in ("✗ FAIL", "~ INCONCLUSIVE", "✓ PASS", "≥ 1.5", "≤ 0.1", "≥ −6", "142 MB", "exact", "perplexity"):
        assert expected in text
    assert "same build" not in text
    assert "in 40" in text and "in 6" in text, "documents and blocks, which are what counts as independent"
    assert max(len(line) for line in text.splitlines()) <= width
