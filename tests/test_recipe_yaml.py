"""The YAML reader: plain data with true line numbers, and one clear error for everything else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import recipe_yaml
from assay.errors import EXIT_USAGE, Problem, RecipeError
from assay.recipe_yaml import MAX_BYTES, MAX_DEPTH, Document, apply_overrides, read_document, scalar


@pytest.fixture(params=["CSafeLoader", "SafeLoader"], autouse=True)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyYAML's two parsers: machines without libyaml get the second."""
    if not hasattr(yaml, request.param):
        pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr(recipe_yaml, "_Loader", getattr(yaml, request.param))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def read(file: Path, text: str | bytes) -> Document:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_document(file)


def refused(file: Path, text: str | bytes) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        read(file, text)
    assert caught.value.exit_code == EXIT_USAGE
    assert all(problem.file == str(file) for problem in caught.value.problems)
    return caught.value.problems


def the_problem(file: Path, text: str | bytes) -> tuple[int, str]:
    (problem,) = refused(file, text)
    return problem.line, problem.message


def test_data_and_lines(file: Path) -> None:
    document = read(file, "# a comment\na: 1\nb:\n  - x\n  - {c: 2,\n     d: yes}\n")
    assert document.data == {"a": 1, "b": ["x", {"c": 2, "d": "yes"}]}
    lines = {("a",): 2, ("b",): 3, ("b", 0): 4, ("b", 1): 5, ("b", 1, "c"): 5, ("b", 1, "d"): 6}
    assert {location: document.line(location) for location in lines} == lines
    assert document.line(("b", 1, "absent", "deeper")) == 5
    assert document.line(("absent",)) == 2


@pytest.mark.parametrize("text", ["a: 1\r\nb: 2\r\n", "\ufeffa: 1\nb: 2\n", "---\na: 1\nb: 2\n", "a: 1\nb: 2\n..."])
def test_line_ends_marks_and_document_marks_do_not_matter(file: Path, text: str) -> None:
    document = read(file, text)
    assert document.data == {"a": 1, "b": 2}
    assert document.line(("b",)) == document.line(("a",)) + 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("007", 7),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        (".5", 0.5),
        ("1.", 1.0),
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("1.2.3", "1.2.3"),
        (".", "."),
        ("٣", "٣"),
        (".nan", ".nan"),
        ("<<", "<<"),
    ],
)
def test_words_follow_the_core_schema(file: Path, text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)
    assert read(file, f"a: {text}").data == {"a": value}
    assert read(file, f"a: '{text}'").data == {"a": text}


@pytest.mark.parametrize("text", ["9" * 5000, "1e999", "-1e999", "9" * 400])
def test_numbers_without_end_are_refused(file: Path, text: str) -> None:
    assert the_problem(file, f"a: 1\nb: {text}") == (2, "the number is too large.")


def test_every_duplicate_key_is_found(file: Path) -> None:
    problems = refused(file, "a: 1\nb: {c: 1, c: 2}\na: 3\n'a': 4\n")
    assert [(problem.line, problem.message) for problem in problems] == [
        (2, "the key 'c' is there already (line 2)."),
        (3, "the key 'a' is there already (line 1)."),
        (4, "the key 'a' is there already (line 1)."),
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: &x 1\n", 1, "anchors and aliases are not allowed"),
        ("a: 1\nb: *x\n", 2, "anchors and aliases are not allowed"),
        ("a: 1\nb: &x [*x]\n", 2, "anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system ['true']\n", 1, "the tag !!python/object/apply:os.system is not allowed"),
        ("!!python/name:os.system a: 1\n", 1, "the tag !!python/name:os.system is not allowed"),
        ("a: !!str 1\n", 1, "the tag !!str is not allowed"),
        ("a: 1\nb: ! x\n", 2, "the tag ! is not allowed"),
        ("a: !own {b: 1}\n", 1, "the tag !own is not allowed"),
        ("!!map {a: 1}\n", 1, "the tag !!map is not allowed"),
        ("a: 1\n---\nb: 1\n", 2, "a second document begins here"),
        ("a: 1\n? [x]\n: 1\n", 2, "a key must be a plain word"),
        ("a: 1\nb: [1\nc: 2\n", 3, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: 1\nb: @x\n", 2, "not valid YAML"),
        ("a: 1\nb: \x01\n", 2, "the control character '\\x01' is not allowed"),
        ('a: 1\nb: "\\0"\n', 2, "a control character is not allowed"),
        ('a: 1\n"\\e": 2\n', 2, "a control character is not allowed"),
        ("- a\n- b\n", 1, "a recipe is a mapping that begins with `version: 1`."),
        ("word\n", 1, "a recipe is a mapping"),
        ("", 1, "a recipe is a mapping"),
        ("# only a comment\n", 1, "a recipe is a mapping"),
        ("~\n", 1, "a recipe is a mapping"),
    ],
)
def test_what_is_not_plain_data_is_refused_with_its_line(file: Path, text: str, line: int, words: str) -> None:
    found, message = the_problem(file, text)
    assert message.startswith(words)
    assert found == line
    assert "\n" not in message


def test_a_lone_surrogate_is_refused(file: Path) -> None:
    line, _ = the_problem(file, 'a: 1\nb: "\\ud800"\n')
    assert line == 2


@pytest.mark.parametrize(("data", "line"), [(b"a: 1\nb: \xff", 2), ("a: 1".encode("utf-16"), 1), (b"\x80", 1)])
def test_other_encodings_are_refused(file: Path, data: bytes, line: int) -> None:
    assert the_problem(file, data) == (line, "not UTF-8 text; save it as UTF-8.")


def test_the_depth_is_limited(file: Path) -> None:
    deepest = "a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert read(file, deepest).data
    assert the_problem(file, f"b: 1\n{deepest.replace('[]', '[[]]')}") == (2, "nested more than 32 levels deep.")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 500_000 + "]" * 500_000,
        "{a: " * 200_000,
        "- " * 500_000,
        "? " * 500_000,
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" + "d: [*c, *c]\n" * 80_000,
    ],
)
def test_hostile_files_are_refused_at_once(file: Path, text: str) -> None:
    start = time.process_time()
    assert len(refused(file, text)) == 1
    assert time.process_time() - start < 1


def test_the_size_is_limited(file: Path) -> None:
    padding = "#" * (MAX_BYTES - len("a: 1\n"))
    assert read(file, f"a: 1\n{padding}").data == {"a": 1}
    line, message = the_problem(file, f"a: 1\n{padding}#")
    assert line == 0
    assert message.startswith("larger than 1 MiB")


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "absent.yaml", "No such file or directory"), (tmp_path, "Is a directory")]:
        with pytest.raises(RecipeError, match=f"^{path}: cannot be read: {reason}"):
            read_document(path)


def overridden(*assignments: str) -> Document:
    data: dict[str, Any] = {"a": {"b": 1}, "list": [{"c": 1}, {"c": 2}], "word": "x", "nothing": None}
    return apply_overrides(Document("r.yaml", data, {}), assignments)


@pytest.mark.parametrize(
    ("assignment", "changed"),
    [
        ("a.b=2", {"a": {"b": 2}}),
        ("a.b=", {"a": {"b": None}}),
        ("a.b='2'", {"a": {"b": "2"}}),
        ("a.new=x=y", {"a": {"b": 1, "new": "x=y"}}),
        ("a={c: [1, 2.5, no]}", {"a": {"c": [1, 2.5, "no"]}}),
        ("list.1.c=3", {"list": [{"c": 1}, {"c": 3}]}),
        ("list.0=z", {"list": ["z", {"c": 2}]}),
        ("list=[]", {"list": []}),
        ("new.deep.er=1", {"new": {"deep": {"er": 1}}}),
        ("nothing.x=1", {"nothing": {"x": 1}}),
    ],
)
def test_overrides(assignment: str, changed: dict[str, Any]) -> None:
    assert overridden(assignment).data == overridden().data | changed


def test_overrides_apply_in_order_and_leave_the_document_alone() -> None:
    document = overridden()
    assert apply_overrides(document, ("a.b=2", "a.b=3")).data["a"] == {"b": 3}
    assert document.data["a"] == {"b": 1}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("a", "write it as key.key=value"),
        ("=1", "write it as key.key=value"),
        ("a..b=1", "write it as key.key=value"),
        ("a.=1", "write it as key.key=value"),
        (".".join("a" * 100) + "=1", "write it as key.key=value"),
        ("\udcff=1", "write it as key.key=value"),
        ("list.2.c=1", "list is a list of 2; write a number from 0 instead of '2'"),
        ("list.-1=1", "list is a list of 2; write a number from 0 instead of '-1'"),
        ("list.first=1", "list is a list of 2"),
        ("list.0.c.d=1", "list.0.c is 1, which has nothing in it to set"),
        ("word.x=1", "word is 'x', which has nothing in it to set"),
        ("a=[", "not valid YAML"),
        ("a=1\n---\n2", "a second document"),
        ("a=&x [*x, *x]", "anchors and aliases are not allowed"),
        ("a=!!python/name:os.system x", "the tag !!python/name:os.system is not allowed"),
        ("a={b: 1, b: 2}", "the key 'b' is there already"),
        ("a=" + "[" * 40 + "]" * 40, "nested more than 32 levels deep"),
        ("a=\udcff", "the control character"),
        ("a=1e999", "the number is too large"),
    ],
)
def test_overrides_that_cannot_be(assignment: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        overridden(assignment)
    (problem,) = caught.value.problems
    assert problem.message.startswith(words)
    assert problem.file == f"--set {assignment.replace(chr(0xDCFF), chr(92) + 'udcff')}"
    assert str(problem).isprintable() or "\n" in assignment


def test_every_bad_override_is_shown() -> None:
    with pytest.raises(RecipeError) as caught:
        overridden("a", "a.b=2", "word.x=1")
    assert [problem.file for problem in caught.value.problems] == ["--set a", "--set word.x=1"]


def test_the_last_of_two_overrides_is_the_one_that_is_wrong() -> None:
    assert overridden("a.b=1", "a=2").problem(("a", "b"), "x").file == "--set a=2"
    assert overridden("a=2", "a=3").problem(("a",), "x").file == "--set a=3"


def test_problems_name_the_line_or_the_override_they_come_from(file: Path) -> None:
    document = apply_overrides(read(file, "a: {b: 1}\nlist: [1, 2, 3]\n"), ("a.b=2", "new.key=1", "list=[4]"))
    places = {
        ("a", "b"): "--set a.b=2",
        ("a", "b", "c"): "--set a.b=2",
        ("a",): f"{file}:1",
        ("a", "other"): f"{file}:1",
        ("new",): "--set new.key=1",
        ("list", 0): "--set list=[4]",
        ("list", 2): "--set list=[4]",
    }
    assert {place: str(document.problem(place, "x")) for place in places} == {
        place: f"{origin}: x" for place, origin in places.items()
    }


YAML_TEXT = st.text(alphabet="[]{}:,-?&*!|>'\"%@`#\n\t ab01.~<=\\\ufeff\x00\x85é\ud800", max_size=60)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), YAML_TEXT.map(lambda text: text.encode(errors="surrogatepass"))))
def test_no_bytes_raise_anything_but_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    for prefix in (b"", b"a: "):
        try:
            document = read(file, prefix + data)
        except RecipeError as error:
            assert error.problems
        else:
            assert all(line > 0 for line in document.lines.values())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=30), st.builds("{}={}".format, st.text("ab.012", max_size=8), YAML_TEXT))))
def test_no_override_raises_anything_but_a_recipe_error(assignments: list[str]) -> None:
    document = Document("r.yaml", {"a": {"b": 1}, "b": [{"a": 1}]}, {})
    try:
        apply_overrides(document, tuple(assignments))
    except RecipeError as error:
        assert all(problem.file.startswith("--set ") for problem in error.problems)
