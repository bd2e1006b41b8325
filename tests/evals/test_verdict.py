from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from assay.errors import EXIT_INTEGRITY, IntegrityError
from assay_evals.evidence import Check, Evidence
from assay_evals.gate import judge
from assay_evals.verdict import GateRow, limit_of, overall, read_verdict, write_verdict


def test_a_verdict_survives_its_file(tmp_path: Path, good: Evidence) -> None:
    verdict = judge(good)
    write_verdict(tmp_path / "verdict.json", verdict)
    assert read_verdict(tmp_path / "verdict.json") == verdict
    first = (tmp_path / "verdict.json").read_bytes()
    write_verdict(tmp_path / "verdict.json", read_verdict(tmp_path / "verdict.json"))
    assert (tmp_path / "verdict.json").read_bytes() == first


def test_the_file_has_the_promised_form(tmp_path: Path, good: Evidence) -> None:
    write_verdict(tmp_path / "verdict.json", judge(good))
    value = json.loads((tmp_path / "verdict.json").read_bytes())
    assert (value["version"], value["verdict"], value["exit_code"]) == (1, "PASS", 0)
    keys = {"metric", "baseline", "candidate", "difference", "interval", "confidence", "n", "clusters", "reason"}
    gated = keys | {"criterion", "margin", "minimum_detectable", "verdict"}
    assert all(set(row) == gated for row in value["gates"])
    assert all(set(row) == keys | {"minimum_detectable"} for row in value["reported"])
    cloze = next(row for row in value["gates"] if row["metric"] == "cloze_accuracy")
    assert (cloze["criterion"], cloze["margin"]) == ({"max_drop": 0.06}, 0.06)


def edited(path: Path, good: Evidence, edit: Any) -> Path:
    write_verdict(path, judge(good))
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(
    "edit",
    [
        lambda value: value.update(version=2),
        lambda value: value.update(exit_code=1),
        lambda value: value.update(verdict="FAIL", exit_code=1),
        lambda value: value.update(verdict="MAYBE"),
        lambda value: value["gates"][0].update(verdict="FAIL"),
        lambda value: value["gates"].clear(),
        lambda value: value["checks"][0].update(passed=False),
        lambda value: value["gates"][0].update(n="many"),
        lambda value: value.update(extra=1),
        lambda value: value.pop("evidence"),
    ],
)
def test_a_verdict_that_contradicts_itself_is_refused(tmp_path: Path, good: Evidence, edit: Any) -> None:
    path = edited(tmp_path / "verdict.json", good, edit)
    with pytest.raises(IntegrityError, match=r"verdict\.json") as raised:
        read_verdict(path)
    assert raised.value.exit_code == EXIT_INTEGRITY


def test_a_missing_or_damaged_file_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="missing"):
        read_verdict(tmp_path / "verdict.json")
    (tmp_path / "verdict.json").write_bytes(b"{")
    with pytest.raises(IntegrityError, match="not valid JSON"):
        read_verdict(tmp_path / "verdict.json")


@pytest.mark.parametrize(
    ("criterion", "value", "at_least"),
    [
        ({"max_drop": 0.03}, -0.03, True),
        ({"min": 0.9}, 0.9, True),
        ({"min_speedup": 1.5}, 1.5, True),
        ({"max": 0.1}, 0.1, False),
        ({"max_ratio": 0.5}, 0.5, False),
    ],
)
def test_every_criterion_is_a_limit_on_the_difference(
    criterion: dict[str, float], value: float, at_least: bool
) -> None:
    assert (limit_of(criterion).value, limit_of(criterion).at_least) == (value, at_least)


def test_the_worst_outcome_stands_for_all(good: Evidence) -> None:
    row = judge(good).gates[0]

    def rows(*outcomes: str) -> list[GateRow]:
        return [GateRow(**{**row.__dict__, "verdict": outcome}) for outcome in outcomes]

    fine = Check(name="a", passed=True, detail="")
    assert overall(rows("PASS", "PASS"), [fine]) == "PASS"
    assert overall(rows("PASS", "INCONCLUSIVE"), [fine]) == "INCONCLUSIVE"
    assert overall(rows("INCONCLUSIVE", "FAIL", "PASS"), [fine]) == "FAIL"
    assert overall(rows("FAIL", "INVALID"), [fine]) == "INVALID"
    assert overall(rows("PASS"), [fine, Check(name="b", passed=False, detail="")]) == "INVALID"
    assert overall([], [fine]) == "INVALID"
