"""The verdict as JUnit XML, which CI systems show beside tests: a case for every gate and every check.

FAIL is a failure, INVALID and a failed check are errors, INCONCLUSIVE is skipped with its reason. Skipped cases count as green in many
systems: the exit code of `assay compile`, not this file, says whether a job passed.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from assay_evals import wording
from assay_evals.verdict import Outcome, Verdict

_TAGS: dict[Outcome, str] = {"FAIL": "failure", "INVALID": "error", "INCONCLUSIVE": "skipped"}
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(verdict: Verdict, name: str) -> str:
    """The file as text. name: the recipe's."""
    found: list[tuple[str, str, Outcome, str]] = []
    for row in verdict.gates:
        found.append(("gate", f"{row.metric} {wording.criterion(row.metric, row.criterion)}", row.verdict, row.reason))
    for check in verdict.checks:
        found.append(("check", check.name, "PASS" if check.passed else "INVALID", check.detail))
    counts = {tag: sum(_TAGS.get(outcome) == tag for _, _, outcome, _ in found) for tag in _TAGS.values()}
    suite = ElementTree.Element(
        "testsuite",
        name=_legal(f"assay {name}"),
        tests=str(len(found)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
    )
    for kind, title, outcome, reason in found:
        case = ElementTree.SubElement(suite, "testcase", classname=_legal(f"assay.{name}.{kind}"), name=_legal(title))
        if outcome in _TAGS:
            ElementTree.SubElement(case, _TAGS[outcome], message=_legal(f"{outcome}: {reason}"))
        else:
            ElementTree.SubElement(case, "system-out").text = _legal(reason)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _legal(text: str) -> str:
    """Without what no XML may hold."""
    return _ILLEGAL.sub("\ufffd", text)
