"""Texts for calibration and evaluation: documents with names, from Python's own documentation, local files or the Hub.

`python-docs` is split by document into two parts that share no paragraph: topics quote each other, so every paragraph is given
to the smallest topic that has it and left out of the others before the topics are dealt out by the digest of their names.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from assay.errors import AssayError, UsageError
from assay.files import canonical_json, sha256_bytes
from assay.recipe import HubDataset, HubRows, JsonLines, PythonDocs, TextFile

Part = Literal["calibration", "evaluation"]
Messages = list[dict[str, str]]
_PARAGRAPHS_PER_DOCUMENT = 40


@dataclass(frozen=True)
class Document:
    """One text with a name that is unique in its source; content is plain text, or chat messages; tag: the slice that it belongs to."""

    name: str
    content: str | Messages
    tag: str | None = None


def texts_digest(documents: list[Document]) -> str:
    """Digest of names and contents, in order."""
    return sha256_bytes(canonical_json([[document.name, document.content] for document in documents]))


def load_documents(source: PythonDocs | TextFile | JsonLines | HubDataset, part: Part, base: Path) -> list[Document]:
    """The documents of a source; base: the directory that relative paths start from."""
    if isinstance(source, PythonDocs):
        return python_docs(part)
    if isinstance(source, TextFile):
        documents = _text_file(base / source.path)
    elif isinstance(source, JsonLines):
        documents = _json_lines(base / source.path, source.field, _tag_field(source))
    else:
        documents = _hub_dataset(source)
    # Data sets have empty rows; each would put another end-of-text token into the calibration tokens.
    documents = [document for document in documents if _holds_text(document.content)]
    if not documents:
        raise UsageError(f"the {part} text {source.name if isinstance(source, HubDataset) else source.path} is empty.")
    return documents


def python_docs(part: Part) -> list[Document]:
    """One part of the documentation topics that CPython ships, every paragraph of them once."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise AssayError("this Python ships without pydoc_data.topics; use another text source.") from error
    owned: set[str] = set()
    documents: list[Document] = []
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        kept: list[str] = []
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            normal = " ".join(paragraph.split())
            if normal and normal not in owned:
                owned.add(normal)
                kept.append(paragraph.strip("\n"))
        if kept:
            documents.append(Document(name, "\n\n".join(kept) + "\n"))
    wanted = 0 if part == "calibration" else 1
    return [
        document for document in sorted(documents, key=lambda document: document.name) if _side(document.name) == wanted
    ]


def _side(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] & 1


def _holds_text(content: str | Messages) -> bool:
    return bool(content.strip() if isinstance(content, str) else content)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); paths are relative to the recipe.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}).") from error


def _text_file(path: Path) -> list[Document]:
    """Documents end at lines that hold only ---; a file without them is cut every 40 paragraphs."""
    text = _read_text(path)
    parts = re.split(r"(?m)^---\s*$", text)
    if len(parts) == 1:
        paragraphs = re.split(r"\n\s*\n", text)
        size = _PARAGRAPHS_PER_DOCUMENT
        parts = ["\n\n".join(paragraphs[start : start + size]) for start in range(0, len(paragraphs), size)]
    return [
        Document(f"{path.name}#{index}", part.strip("\n") + "\n") for index, part in enumerate(parts) if part.strip()
    ]


def _tag_field(source: JsonLines | HubDataset) -> str | None:
    """Of evaluation texts, that may have one."""
    return getattr(source, "tag", None)


def label(value: Any, place: str, field: str) -> str:
    """What a row says it is, as a text."""
    if isinstance(value, str | int) and (text := " ".join(str(value).split())):
        return text
    raise UsageError(f"{place}: {field!r} must be a text or a whole number: it names a part of the data.")


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a JSONL file that is not blank: its place, and what it holds."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place}: not valid JSON ({error}).") from error
        yield place, row


def field_of(row: Any, field: str, place: str) -> Any:
    """The value of a field; UsageError says which there are."""
    if not isinstance(row, dict) or field not in row:
        keys = ", ".join(sorted(row)) if isinstance(row, dict) else "no object"
        raise UsageError(f"{place}: there is no field {field!r}; the line has: {keys}.")
    return row[field]


def _json_lines(path: Path, field: str, tag_field: str | None) -> list[Document]:
    documents: list[Document] = []
    for place, row in json_rows(path):
        value = field_of(row, field, place)
        tag = None if tag_field is None else label(field_of(row, tag_field, place), place, tag_field)
        name = f"{path.name}:{place.rpartition(':')[2]}"
        documents.append(Document(name, contents(value, place, field), tag))
    return documents


def contents(value: Any, place: str, field: str) -> str | Messages:
    """A text, or chat messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        return [{"role": turn["role"], "content": turn["content"]} for turn in value]
    raise UsageError(f"{place}: {field!r} must be a text, or a list of chat messages whose role and content are texts.")


def hub_rows(source: HubRows) -> Any:
    """The rows of a data set of the Hub, at the revision that the recipe names."""
    try:
        from datasets import load_dataset_builder
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UsageError("hf: data sets need the extra `datasets`: pip install 'assay[datasets]'.") from error
    try:
        commit = source.revision
        if commit and not re.fullmatch(r"[0-9a-f]{40}", commit):
            commit = HfApi().dataset_info(source.name, revision=commit).sha
        # With its full address: a bare name may be taken for a directory here.
        builder = load_dataset_builder(f"hf://datasets/{source.name}", source.config, revision=commit)
        builder.download_and_prepare()
        rows: Any = builder.as_dataset(split=source.split)
    except Exception as error:
        raise AssayError(f"the data set {source.name} cannot be loaded: {type(error).__name__}: {error}") from error
    if commit and builder.hash != commit:
        # Without the Hub, datasets takes the latest version that it has.
        raise AssayError(
            f"the data set {source.name}: the Hub cannot be reached, and the local cache gives another revision than "
            f"{source.revision}. Fetch it where there is a network."
        )
    return rows


def _hub_dataset(source: HubDataset) -> list[Document]:
    rows = hub_rows(source)
    tag_field = _tag_field(source)
    for wanted in (source.field, tag_field):
        if wanted is not None and wanted not in rows.column_names:
            raise UsageError(f"{source.name}: there is no field {wanted!r}; it has: {', '.join(rows.column_names)}.")
    tags: Iterable[Any] = itertools.repeat(None) if tag_field is None else rows[tag_field]
    documents: list[Document] = []
    for index, (value, tag) in enumerate(zip(rows[source.field], tags, strict=False)):
        place = f"{source.name}#{index}"
        named = None if tag_field is None else label(tag, place, tag_field)
        documents.append(Document(f"{source.name}/{source.split}#{index}", contents(value, place, source.field), named))
    return documents
