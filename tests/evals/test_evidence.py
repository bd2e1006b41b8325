from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from assay.errors import EXIT_INTEGRITY, IntegrityError
from assay.files import sha256_bytes
from assay_evals.evidence import Cloze, Evidence, SpeedRun, Window, read_evidence, write_evidence


def write(directory: Path, evidence: Evidence) -> Evidence:
    return write_evidence(directory, evidence.header, [*evidence.windows, *evidence.clozes], evidence.runs)


def resign(directory: Path) -> None:
    """Make the header's digests those of the files as they are now."""
    path = directory / "evidence.json"
    header = json.loads(path.read_bytes())
    header["files"] = {name: sha256_bytes((directory / name).read_bytes()) for name in header["files"]}
    path.write_text(json.dumps(header))


def replace_line(directory: Path, name: str, number: int, line: str) -> None:
    lines = (directory / name).read_text().split("\n")
    lines[number - 1] = line
    (directory / name).write_text("\n".join(lines))
    resign(directory)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, good: Evidence) -> Path:
    directory = tmp_path_factory.mktemp("original") / "evidence"
    write(directory, good)
    return directory


@pytest.fixture
def written(tmp_path: Path, original: Path) -> Path:
    """A copy of written evidence, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "evidence"))


def test_what_is_written_is_read_back_whole(tmp_path: Path, good: Evidence) -> None:
    returned = write(tmp_path / "evidence", good)
    assert returned == read_evidence(tmp_path / "evidence")
    assert (returned.windows, returned.clozes, returned.runs) == (good.windows, good.clozes, good.runs)
    assert returned.header == good.header
    assert returned.digest == sha256_bytes((tmp_path / "evidence" / "evidence.json").read_bytes())


def test_the_header_has_the_promised_form(written: Path) -> None:
    header = json.loads((written / "evidence.json").read_bytes())
    assert header["version"] == 1
    assert header["recipe"]["gate"]["cloze_accuracy"] == {"max_drop": 0.06}
    assert None not in header["recipe"]["gate"].values()
    assert header["files"]["speed.jsonl"] == sha256_bytes((written / "speed.jsonl").read_bytes())
    kinds = [json.loads(line)["kind"] for line in (written / "quality.jsonl").read_text().splitlines()]
    assert kinds.count("window") == 40
    assert kinds.count("cloze") == 800


def test_the_same_measurements_give_the_same_bytes(tmp_path: Path, make_evidence: Callable[..., Evidence]) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, make_evidence(seed=4))
    for name in ("evidence.json", "quality.jsonl", "speed.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null_and_none(tmp_path: Path, good: Evidence, number: float) -> None:
    first = good.windows[0]
    broken = replace(first, kl=(number, *first.kl[1:]), nll_candidate=number)
    run = replace(good.runs[0], load_seconds=number)
    returned = write_evidence(tmp_path / "evidence", good.header, [broken, *good.windows[1:]], [run])
    assert returned.windows[0].kl[:2] == (None, first.kl[1])
    assert returned.windows[0].nll_candidate is None
    assert returned.runs[0].load_seconds is None
    assert '"load_seconds":null' in (tmp_path / "evidence" / "speed.jsonl").read_text()


def test_a_measurement_that_breaks_off_leaves_what_was_there(tmp_path: Path, good: Evidence) -> None:
    write(tmp_path / "evidence", good)
    before = (tmp_path / "evidence" / "evidence.json").read_bytes()

    def broken() -> Iterator[Window | Cloze]:
        yield good.windows[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_evidence(tmp_path / "evidence", good.header, broken(), good.runs)
    assert (tmp_path / "evidence" / "evidence.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["evidence"]


@pytest.mark.parametrize("name", ["evidence.json", "quality.jsonl", "speed.jsonl"])
def test_a_missing_file_is_an_integrity_error(written: Path, name: str) -> None:
    (written / name).unlink()
    with pytest.raises(IntegrityError, match=name) as raised:
        read_evidence(written)
    assert raised.value.exit_code == EXIT_INTEGRITY


@pytest.mark.parametrize("name", ["quality.jsonl", "speed.jsonl"])
def test_one_changed_byte_is_an_integrity_error(written: Path, name: str) -> None:
    data = bytearray((written / name).read_bytes())
    data[len(data) // 2] ^= 1
    (written / name).write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=f"{name}: the digest is"):
        read_evidence(written)


LINE = (
    '{"kind":"window","document":"a","window":0,"tokens":1,"kl":[0.5],"agreed":[1],"nll_baseline":1,"nll_candidate":1}'
)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Invalid JSON"),
        ("", "Invalid JSON"),
        ("[]", "should be an object"),
        (LINE.replace("[0.5]", "[NaN]"), "kl.0: Input should be a finite number"),
        (LINE.replace("[0.5]", "[1e999]"), "kl.0: Input should be a finite number"),
        (LINE.replace("[0.5]", '["0.5"]'), "kl.0"),
        (LINE.replace("[0.5]", "[0.5,0.5]"), "1 tokens, 2 divergences"),
        (LINE.replace("[1]", "[2]"), "agreed.0"),
        (LINE.replace('"window":0', '"window":0.5'), "window"),
        (LINE.replace('"window":0', '"window":0,"extra":1'), "window.extra"),
        (LINE.replace('"kind":"window"', '"kind":"windows"'), "kind"),
        (LINE.replace('"tokens":1', '"tokens":0').replace("[0.5]", "[]").replace("[1]", "[]"), "0 tokens"),
    ],
)
def test_a_malformed_line_is_named(written: Path, line: str, complaint: str) -> None:
    replace_line(written, "quality.jsonl", 3, line)
    with pytest.raises(IntegrityError, match=r"quality\.jsonl:3: ") as raised:
        read_evidence(written)
    assert complaint in str(raised.value)


def test_the_well_formed_line_of_the_test_above_is_accepted(written: Path) -> None:
    replace_line(written, "quality.jsonl", 3, LINE)
    assert read_evidence(written).windows[2].kl == (0.5,)


def test_a_file_cut_at_a_line_end_or_within_a_line_is_noticed(written: Path) -> None:
    data = (written / "speed.jsonl").read_bytes()
    (written / "speed.jsonl").write_bytes(data[:-1])
    resign(written)
    with pytest.raises(IntegrityError, match="cut short"):
        read_evidence(written)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 2}, "version 1"),
        ({"files": {"quality.jsonl": "sha256:0"}}, "files"),
        ({"text": {"source": "x"}}, "text.digest"),
        ({"checks": [{"name": "a", "passed": "yes", "detail": ""}]}, "checks.0.passed"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_malformed_header_is_named(written: Path, change: dict[str, object], complaint: str) -> None:
    path = written / "evidence.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(IntegrityError, match=r"evidence\.json: ") as raised:
        read_evidence(written)
    assert complaint in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_a_header_that_is_not_json_is_an_integrity_error(written: Path, data: bytes) -> None:
    (written / "evidence.json").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"evidence\.json"):
        read_evidence(written)


def test_evidence_of_nothing_can_be_written(tmp_path: Path, good: Evidence) -> None:
    """An evaluator that measured nothing still leaves a readable record, which the gate then finds INVALID."""
    nothing: list[SpeedRun] = []
    assert write_evidence(tmp_path / "evidence", good.header, [], nothing).windows == ()
