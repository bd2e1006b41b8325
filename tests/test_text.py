"""Texts: disjoint parts of Python's documentation, local files with errors by line, and data sets of a Hub on loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from hypothesis import given
from hypothesis import strategies as st

from assay.errors import UsageError
from assay.recipe import HubDataset, JsonLines, PythonDocs, TaggedJsonLines, TextFile
from assay.text import Document, Part, load_documents, python_docs, texts_digest


def paragraphs(documents: list[Document]) -> list[str]:
    return [
        " ".join(part.split()) for one in documents for part in re.split(r"\n\s*\n", str(one.content)) if part.strip()
    ]


def test_the_parts_of_pythons_documentation_share_no_paragraph_and_lose_none() -> None:
    from pydoc_data.topics import topics

    calibration, evaluation = python_docs("calibration"), python_docs("evaluation")
    ours, theirs = paragraphs(calibration), paragraphs(evaluation)
    assert len(ours) == len(set(ours))
    assert len(theirs) == len(set(theirs))
    assert not set(ours) & set(theirs)
    everything = paragraphs([Document(name, text) for name, text in topics.items()])
    assert set(ours) | set(theirs) == set(everything)
    assert len(everything) > len(set(everything)), "topics quote each other, or this test shows nothing"


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_each_part_has_many_named_documents(part: Part) -> None:
    documents = python_docs(part)
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert len(names) > 20
    assert sum(len(document.content) for document in documents) > 100_000
    assert all(document.content.strip() for document in documents)
    assert load_documents(PythonDocs(source="python-docs"), part, Path("/nowhere")) == documents


def test_no_document_is_in_both_parts() -> None:
    assert not {one.name for one in python_docs("calibration")} & {one.name for one in python_docs("evaluation")}


def test_a_topic_stays_on_its_side_whatever_the_python() -> None:
    """By the digest of its name: these are on opposite sides in every version that has them."""
    assert "assignment" in {document.name for document in python_docs("calibration")}
    assert "assert" in {document.name for document in python_docs("evaluation")}


def test_the_digest_is_stable_across_processes() -> None:
    code = "from assay.text import python_docs, texts_digest as d; print(d(python_docs('calibration')), d(python_docs('evaluation')))"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {f"{texts_digest(python_docs('calibration'))} {texts_digest(python_docs('evaluation'))}"}


def test_the_digest_tells_names_contents_and_order_apart() -> None:
    one, two = Document("a", "x"), Document("b", "y")
    variants = [
        [],
        [one],
        [one, two],
        [two, one],
        [Document("a", "y"), two],
        [Document("ab", ""), two],
        [Document("a", [{"role": "user", "content": "x"}])],
    ]
    digests = {texts_digest(variant) for variant in variants}
    assert len(digests) == len(variants)
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in digests)


def text_file(directory: Path, text: str | bytes) -> list[Document]:
    (directory / "notes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_documents(TextFile(source="text", path="notes.txt"), "calibration", directory)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_of_dashes_end_documents(tmp_path: Path, newline: str) -> None:
    text = "---\nfirst\n\nstill first\n---\n\nsecond --- not an end\n--- nor this\n----\n---  \n\n---\nlast"
    documents = text_file(tmp_path, text.replace("\n", newline))
    assert [document.content for document in documents] == [
        "first\n\nstill first\n",
        "second --- not an end\n--- nor this\n----\n",
        "last\n",
    ]
    names = [document.name for document in documents]
    assert len(set(names)) == 3
    assert all(name.startswith("notes.txt#") for name in names)


def test_without_them_a_document_is_forty_paragraphs(tmp_path: Path) -> None:
    documents = text_file(tmp_path, "\n \n".join(f"paragraph {number}\nof two lines" for number in range(95)))
    assert [str(document.content).count("of two lines") for document in documents] == [40, 40, 15]
    assert [document.name for document in documents] == ["notes.txt#0", "notes.txt#1", "notes.txt#2"]
    assert documents[2].content.startswith("paragraph 80\nof two lines\n\nparagraph 81\n")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert text_file(tmp_path, b"\xef\xbb\xbfwords") == [Document("notes.txt#0", "words\n")]


@pytest.mark.parametrize("text", ["", "\n \n\t\n", "---\n\n---\n"])
def test_an_empty_text_is_a_usage_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"the calibration text notes\.txt is empty"):
        text_file(tmp_path, text)


def test_a_text_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    for name, words in (("absent.txt", "No such file or directory"), (".", "Is a directory")):
        with pytest.raises(UsageError, match=rf"cannot be read \({words}\); paths are relative to the recipe"):
            load_documents(TextFile(source="text", path=name), "evaluation", tmp_path)
    with pytest.raises(UsageError, match=r"notes\.txt: not UTF-8 text \(byte 5\)"):
        text_file(tmp_path, "caf\u00e9s: \u00e9".encode()[:3] + b"e \xff rest")


def json_lines(directory: Path, *lines: str, field: str = "text") -> list[Document]:
    (directory / "rows.jsonl").write_bytes("\n".join(lines).encode())
    return load_documents(JsonLines(source="jsonl", path="rows.jsonl", field=field), "calibration", directory)


def test_every_line_is_a_document_named_by_its_line(tmp_path: Path) -> None:
    documents = json_lines(
        tmp_path, '{"text": "one", "n": 1}', "", "  ", '{"text": "two\\n\\nlines"}\r', '{"text": ""}', ""
    )
    assert documents == [Document("rows.jsonl:1", "one"), Document("rows.jsonl:4", "two\n\nlines")]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e", "\r"])
def test_only_a_newline_ends_a_line(tmp_path: Path, character: str) -> None:
    """Unicode's other separators may stand in JSON as they are; control characters have to be escaped."""
    text = f"before{character}after"
    documents = json_lines(tmp_path, json.dumps({"text": text}, ensure_ascii=False), '{"text": "next"}')
    assert documents == [Document("rows.jsonl:1", text), Document("rows.jsonl:2", "next")]


def tagged_lines(directory: Path, *lines: str) -> list[Document]:
    (directory / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = TaggedJsonLines(source="jsonl", path="rows.jsonl", field="text", tag="language")
    return load_documents(source, "evaluation", directory)


def test_a_line_says_what_slice_it_belongs_to(tmp_path: Path) -> None:
    documents = tagged_lines(tmp_path, '{"text": "eins", "language": "de"}', '{"text": "zwei", "language": 2}')
    assert [(document.content, document.tag) for document in documents] == [("eins", "de"), ("zwei", "2")]
    assert texts_digest(documents) == texts_digest(
        json_lines(tmp_path, *(tmp_path / "rows.jsonl").read_text().split("\n"))
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "x"}', r"rows\.jsonl:2: there is no field 'language'; the line has: text\."),
        (
            '{"text": "x", "language": null}',
            r"rows\.jsonl:2: 'language' must be a text or a whole number: it names a part of the data",
        ),
        ('{"text": "x", "language": " "}', r"rows\.jsonl:2: 'language' must be a text"),
        ('{"text": "x", "language": ["de"]}', r"rows\.jsonl:2: 'language' must be a text"),
    ],
)
def test_a_line_without_its_slice_is_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tagged_lines(tmp_path, '{"text": "one", "language": "en"}', line)


CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def test_chat_messages_are_kept_as_messages(tmp_path: Path) -> None:
    row = {"messages": [turn | {"weight": 1} for turn in CHAT]}
    assert json_lines(tmp_path, json.dumps(row), field="messages") == [Document("rows.jsonl:1", CHAT)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"rows\.jsonl:3: not valid JSON \(Expecting property name"),
        ("text", r"rows\.jsonl:3: not valid JSON \(Expecting value"),
        ("[" * 100_000, r"rows\.jsonl:3: not valid JSON \("),
        ('{"text": ' + "1" * 5000 + "}", r"rows\.jsonl:3: not valid JSON \("),
        ('{"body": "x", "id": 7}', r"rows\.jsonl:3: there is no field 'text'; the line has: body, id\."),
        ("{}", r"rows\.jsonl:3: there is no field 'text'; the line has: \."),
        ('["text"]', r"rows\.jsonl:3: there is no field 'text'; the line has: no object"),
        ('"text"', r"rows\.jsonl:3: there is no field 'text'"),
        ('{"text": 7}', r"rows\.jsonl:3: 'text' must be a text, or a list of chat messages"),
        ('{"text": null}', r"rows\.jsonl:3: 'text' must be a text"),
        ('{"text": ["Hello"]}', r"rows\.jsonl:3: 'text' must be a text"),
        ('{"text": [{"role": "user"}]}', r"rows\.jsonl:3: 'text' must be a text"),
        ('{"text": [{"role": "assistant", "content": null}]}', r"rows\.jsonl:3: 'text' must be a text"),
        ('{"text": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}', r"rows\.jsonl:3: 'text' must be"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        json_lines(tmp_path, '{"text": "one"}', "", line, '{"text": "four"}')


@pytest.mark.parametrize("lines", [[], ["", "  "], ['{"text": ""}', '{"text": " \\n"}', '{"text": []}']])
def test_rows_without_any_text_are_a_usage_error(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(UsageError, match=r"the calibration text rows\.jsonl is empty"):
        json_lines(tmp_path, *lines)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "role", "content"]), inner),
    max_leaves=6,
)


@given(st.lists(JSON | st.text(max_size=12), max_size=3), st.booleans())
def test_no_file_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], escaped: bool) -> None:
    lines = [json.dumps({"text": row}, ensure_ascii=escaped) if escaped else json.dumps(row) for row in rows]
    try:
        documents = json_lines(tmp_path_factory.getbasetemp(), *lines)
    except UsageError as error:
        assert "rows.jsonl" in str(error)
    else:
        assert all(document.content for document in documents)


ROWS = [{"text": "one"}, {"text": ""}, {"text": "three\u2028lines"}, {"text": " \n"}, {"text": "five"}]
LOAD = """
import json, sys
from pathlib import Path
from assay.errors import AssayError
from assay.recipe import HubDataset
from assay.text import load_documents
for question in json.loads(sys.argv[1]):
    try:
        documents = load_documents(HubDataset(source="hf", **question), "calibration", Path())
        answer = [[document.name, document.content] for document in documents]
    except AssayError as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
"""


def ask(hub: Hub, home: Path, *questions: dict[str, Any], **variables: str) -> list[Any]:
    """What `load_documents` answers in a process of its own: datasets reads its environment once."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps([{"name": "org/texts", "field": "text"} | one for one in questions])],
        env=hub.environment(home) | variables,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


@pytest.fixture
def texts(hub: Hub) -> Hub:
    """A Hub with the data set org/texts, in two commits: main and v1."""
    new = {
        "README.md": b"# Texts",
        "data/train.jsonl": lines_of(ROWS),
        "data/test.jsonl": lines_of([{"text": "held out"}]),
    }
    hub.add("datasets", "org/texts", new)
    hub.repositories[0].commits["b" * 40] = new | {"data/train.jsonl": lines_of([{"text": "old"}])}
    hub.repositories[0].refs["v1"] = "b" * 40
    return hub


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_read_at_its_revision_and_offline_from_the_cache(texts: Hub, tmp_path: Path) -> None:
    (tmp_path / "org" / "texts").mkdir(parents=True)  # a directory of the same name here is not the data set
    (tmp_path / "org" / "texts" / "train.jsonl").write_text('{"text": "a stranger"}')
    main, split, tagged, sliced = ask(
        texts, tmp_path, {}, {"split": "test"}, {"revision": "v1"}, {"split": "train[:1]"}
    )
    assert main == [
        ["org/texts/train#0", "one"],
        ["org/texts/train#2", "three\u2028lines"],
        ["org/texts/train#4", "five"],
    ]
    assert split == [["org/texts/test#0", "held out"]]
    assert tagged == [["org/texts/train#0", "old"]]
    assert sliced == [["org/texts/train[:1]#0", "one"]]
    texts.requests.clear()
    again, pinned, other, tag = ask(
        texts, tmp_path, {}, {"revision": "b" * 40}, {"revision": "c" * 40}, {"revision": "v1"}, HF_HUB_OFFLINE="1"
    )
    assert pinned == tagged
    assert again in (main, tagged)  # no revision was asked for: the latest that is here
    assert other.startswith(
        "AssayError: the data set org/texts: the Hub cannot be reached, and the local cache gives another"
    )
    assert tag.startswith("AssayError: the data set org/texts cannot be loaded: OfflineModeIsEnabled")
    assert texts.requests == []


def test_what_a_data_set_lacks_is_said_in_words(texts: Hub, tmp_path: Path) -> None:
    field, split, config, revision, absent = ask(
        texts,
        tmp_path,
        {"field": "body"},
        {"split": "dev"},
        {"config": "fr"},
        {"revision": "v9"},
        {"name": "org/absent"},
    )
    assert field == "UsageError: org/texts: there is no field 'body'; it has: text."
    assert split.startswith("AssayError: the data set org/texts cannot be loaded: ValueError: Unknown split")
    assert config.startswith(
        "AssayError: the data set org/texts cannot be loaded: ValueError: BuilderConfig 'fr' not found"
    )
    assert revision.startswith("AssayError: the data set org/texts cannot be loaded: RevisionNotFoundError")
    assert absent.startswith("AssayError: the data set org/absent cannot be loaded: DatasetNotFoundError")


def test_a_data_set_that_brings_code_is_refused_and_its_code_never_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.add(
        "datasets",
        "org/texts",
        {"README.md": b"# Texts", "texts.py": b"raise SystemExit", "train.jsonl": lines_of(ROWS)},
    )
    (answer,) = ask(hub, tmp_path, {})
    assert answer.startswith("AssayError: the data set org/texts cannot be loaded: ")
    assert "texts.py" not in hub.fetched()


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(UsageError, match=r"hf: data sets need the extra `datasets`: pip install 'assay\[datasets\]'"):
        load_documents(HubDataset(source="hf", name="org/texts", field="text"), "calibration", Path())
