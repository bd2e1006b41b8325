"""The report where people and machines meet a run first: a pull request's comment, and CI's list of tests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from assay_evals.evidence import Answer, Check, Evidence
from assay_evals.gate import judge
from assay_evals.report import ReportFormat, render_report
from assay_evals.verdict import Verdict

MANIFEST = {"fallbacks": ["lm_head was kept at 8 bits."]}


def render(form: ReportFormat, evidence: Evidence, made: dict[str, Any] | None = None) -> str:
    return render_report(form, judge(evidence), evidence, MANIFEST if made is None else made, {}).decode()


def test_json_is_the_verdict(good: Evidence) -> None:
    assert Verdict.from_json(json.loads(render("json", good))) == judge(good)


def test_the_comment_begins_with_the_verdict_and_what_it_means(make_evidence: Callable[..., Evidence]) -> None:
    lines = render("markdown", make_evidence()).split("\n\n")
    assert lines[0] == "## ✅ PASS: demo"
    assert lines[1].startswith("Decode 3.3× as fast (95% interval 3.24× to 3.34×), 74% smaller on disk, ")
    assert "may be published" in lines[2]
    failed = render("markdown", make_evidence(kl=0.2)).split("\n\n")
    assert failed[0] == "## ❌ FAIL: demo"
    assert failed[3].startswith("- KL divergence: Even the better end of the interval is ")


def test_every_gate_check_fallback_and_digest_is_in_the_comment(good: Evidence) -> None:
    text, verdict = render("markdown", good), judge(good)
    rows = [line for line in text.splitlines() if line.endswith(" ✅ PASS |")]
    assert len(rows) == len(verdict.gates) == 7
    assert "| Cloze accuracy | " in text and "at most 6 points lower" in text
    assert all(check.detail in text.replace("\\", "") for check in verdict.checks)
    assert "lm\\_head was kept at 8 bits." in text
    assert all(part in text for part in (verdict.candidate, verdict.baseline, verdict.recipe, verdict.evidence))
    columns = {line.replace("\\|", "").count("|") for line in rows}
    assert len(columns) == 1


def test_flips_stand_side_by_side_worst_first(good: Evidence) -> None:
    text = render("markdown", good)
    section = text[text.index("worst of the answers that became wrong") :]
    assert section.count("| statement | statement | function |") == 10


HOSTILE = "a | b\n\n# x <img src=y> @someone [z](//w) ![q](//e) `c` $m$ \x1b[31m"


def test_text_of_models_and_documents_steers_nothing(good: Evidence) -> None:
    clozes = tuple(
        replace(row, context=HOSTILE, word=HOSTILE, candidate=Answer(correct=False, answer=HOSTILE))
        for row in good.clozes
    )
    plain = render("markdown", good, {"fallbacks": []})
    text = render("markdown", replace(good, clozes=clozes), {"fallbacks": [HOSTILE]})
    assert "<img" not in text and "\x1b" not in text
    assert not re.search(r"(?<!\\)@someone|(?<!\\)\[z|(?<!\\)`c|(?<!\\)\$m", text)
    # A break would end its row and begin a heading.
    assert [line for line in text.splitlines() if line.startswith("#")] == [text.splitlines()[0]]
    rows = [line for line in text.splitlines() if "someone" in line and line.startswith("|")]
    assert len(rows) == 10 and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert plain.count("<details>") == 4


def test_a_broken_measurement_promises_nothing_in_a_comment(good: Evidence) -> None:
    text = render("markdown", replace(good, runs=()))
    assert text.startswith("## ⚠️ INVALID: demo\n\nThe measurement is broken")


def cases(text: str) -> dict[str, ElementTree.Element]:
    suite = ElementTree.fromstring(text)
    found = {case.get("name", ""): case for case in suite}
    assert suite.tag == "testsuite" and int(suite.get("tests", "")) == len(found)
    for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert int(suite.get(attribute, "")) == sum(case.find(tag) is not None for case in found.values())
    return found


def test_every_gate_and_check_is_a_test_case(good: Evidence) -> None:
    found, verdict = cases(render("junit", good)), judge(good)
    assert len(found) == len(verdict.gates) + len(verdict.checks)
    assert {case.get("classname") for case in found.values()} == {"assay.demo.gate", "assay.demo.check"}
    assert all([part.tag for part in case] == ["system-out"] for case in found.values())


@pytest.mark.parametrize(
    ("changes", "name", "tag", "message"),
    [
        ({"kl": 0.2}, "kl_divergence at most 0.1 nats", "failure", "FAIL: Even the better end"),
        ({"speedup": 1.5}, "decode_tokens_per_second at least 1.5×", "skipped", "INCONCLUSIVE: The interval"),
    ],
)
def test_a_gate_that_did_not_pass_is_no_passed_test(
    make_evidence: Callable[..., Evidence], changes: dict[str, float], name: str, tag: str, message: str
) -> None:
    case = cases(render("junit", make_evidence(**changes)))[name]
    assert [part.tag for part in case] == [tag]
    assert case[0].get("message", "").startswith(message)


def test_a_failed_check_is_an_error_and_may_hold_any_character(good: Evidence) -> None:
    check = Check(name="tokenizer identity", passed=False, detail="cut at \x00\x1b <here> & \ud800")
    checks = (check, *(one for one in good.header.checks if one.name != check.name))
    found = cases(render("junit", replace(good, header=replace(good.header, checks=checks))))
    assert found["tokenizer identity"][0].get("message") == "INVALID: cut at \ufffd\ufffd <here> & \ufffd"
