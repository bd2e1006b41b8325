"""What is particular to the Hub: files as loaders want them, one commit per publish, git's tags, and what the Hub can answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, Repository
from registry_places import Place, files_of, hub_place

from assay.artifact import directory_digest
from assay.errors import AccessDeniedError, AssayError, IntegrityError, NotSupportedError, UnreachableError, UsageError
from assay.files import list_files, sha256_bytes
from assay.registry import hub as hub_module
from assay.registry import transport
from assay.registry.base import Attachment, part
from assay.registry.inspection import list_artifacts, verify
from assay.registry.open import check_registry, create_registry, open_registry
from assay.registry.publish import Receipt, publish
from assay.registry.pull import pull
from assay.registry.reference import parse_reference

# huggingface_hub 2.4 uploads by an argument that its HTTP client deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

MakeRun = Callable[..., Path]
NEW = {"model.onnx": b"new", "added.json": b"{}", "README.md": b"# New\n"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(transport, "BASE_SECONDS", 0.001)
    with hub_place(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def hub(place: Place) -> Hub:
    return place.server


def publish_run(run: Path, *tags: str) -> Receipt:
    return publish(run / "artifact", run, "hf://team", "small", tags or ("latest",))


def small(hub: Hub) -> Repository:
    return hub.find("team/small")


def top(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if not path.startswith(".assay/") and path != ".gitattributes"}


def artifact_files(run: Path) -> dict[str, bytes]:
    return {name: (run / "artifact" / name).read_bytes() for name in list_files(run / "artifact")}


def edit(hub: Hub, changes: dict[str, bytes | None]) -> None:
    """A commit by somebody on the Hub's own pages."""
    files = files_of(hub, "team/small") | changes
    small(hub).commit(small(hub).refs["main"], {path: data for path, data in files.items() if data is not None})


def test_a_loader_finds_the_files_as_it_wants_them(make_run: MakeRun, hub: Hub) -> None:
    old, new = make_run("old"), make_run("new", files=NEW)
    publish_run(old, "latest", "1.0")
    assert small(hub).private
    assert top(files_of(hub, "team/small")) == artifact_files(old)
    assert list(small(hub).large) == [sha256_bytes(artifact_files(old)["model.onnx.data"]).removeprefix("sha256:")]
    publish_run(new, "latest", "1.1")
    for revision, run in (("main", new), ("latest", new), ("1.1", new), ("1.0", old)):
        assert top(files_of(hub, "team/small", revision)) == artifact_files(run)
    # One commit by the Hub, and one for each publish.
    assert len(small(hub).commits) == 3


def test_publishing_again_makes_no_commit_and_sends_no_file(run: Path, hub: Hub) -> None:
    publish_run(run, "latest", "1.0")
    before = (dict(small(hub).refs), list(small(hub).commits))
    hub.requests.clear()
    publish_run(run, "latest", "1.0")
    assert (dict(small(hub).refs), list(small(hub).commits)) == before
    assert {method for method, _ in hub.requests} <= {"GET", "POST"}
    assert all(
        path.endswith("/paths-info/" + small(hub).refs["main"]) for method, path in hub.requests if method == "POST"
    )


def test_the_token_is_needed_for_a_private_model(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish_run(run)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(UsageError, match="no repository team/small on the Hub, or not for this token"):
        pull("hf://team", "small", tmp_path / "out")
    with pytest.raises(AccessDeniedError, match=r"access denied .*HF_TOKEN") as refused:
        publish_run(run)
    assert "hf_of_somebody_else" not in str(refused.value)


def test_a_model_card_may_be_edited_on_the_hub(run: Path, hub: Hub, tmp_path: Path) -> None:
    receipt = publish_run(run, "latest", "1.0")
    assert verify("hf://team", "small").strangers == ()
    edit(hub, {"README.md": b"# Better words\n", "picture.png": b"\x89PNG", "tokenizer.json": None})
    assert verify("hf://team", "small").strangers == ("README.md", "picture.png", "tokenizer.json")
    assert pull("hf://team", "small", tmp_path / "out").bundle_digest == receipt.bundle_digest
    assert (tmp_path / "out/README.md").read_bytes() == b"# A model\n"
    edit(hub, {"tokenizer.json": b"{}"})
    commits = len(small(hub).commits)
    publish_run(run, "latest", "1.0")
    assert len(small(hub).commits) == commits
    assert files_of(hub, "team/small")["README.md"] == b"# Better words\n"


def test_a_model_that_was_damaged_at_the_top_is_mended(make_run: MakeRun, hub: Hub, tmp_path: Path) -> None:
    run = make_run()
    receipt = publish_run(run)
    edit(hub, {"model.onnx": b"other", "model.onnx.data": None})
    assert pull("hf://team", "small", tmp_path / "out").digest == receipt.digest
    publish_run(run)
    assert top(files_of(hub, "team/small")) == artifact_files(run)


def test_files_of_others_stay_when_a_model_is_replaced(make_run: MakeRun, hub: Hub) -> None:
    old, new = make_run("old"), make_run("new", files=NEW)
    publish_run(old)
    edit(hub, {"notes.txt": b"mine"})
    publish_run(new, "2.0")
    assert top(files_of(hub, "team/small")) == artifact_files(new) | {"notes.txt": b"mine"}
    assert verify("hf://team", "small:2.0").strangers == ("notes.txt",)
    assert verify("hf://team", "small").strangers == ()


def test_a_git_tag_that_somebody_moves_changes_nothing(make_run: MakeRun, hub: Hub, tmp_path: Path) -> None:
    old, new = make_run("old"), make_run("new", files=NEW)
    first = publish_run(old, "1.0")
    right = small(hub).refs["1.0"]
    publish_run(new, "1.1")
    small(hub).refs["1.0"] = small(hub).refs["1.1"]
    assert pull("hf://team", "small:1.0", tmp_path / "out").digest == first.digest
    publish_run(old, "1.0")
    assert small(hub).refs["1.0"] == right
    del small(hub).refs["1.0"]
    publish_run(old, "1.0")
    assert small(hub).refs["1.0"] == right


def test_what_is_said_later_leaves_the_files_where_they_are(make_run: MakeRun, hub: Hub) -> None:
    old, new = make_run("old"), make_run("new", files=NEW)
    first = publish_run(old, "1.0")
    publish_run(new, "1.1")
    commits = {tag: small(hub).refs[tag] for tag in ("1.0", "1.1")}
    repository = create_registry("hf://team").repository("small")
    model = repository.resolve(parse_reference("small:1.0"))
    statement = Attachment("application/vnd.example.statement.v1+json", (part("a", "text/plain", b"well done"),))
    repository.commit(repository.read_manifest(model), [statement], ["stable"])
    assert top(files_of(hub, "team/small")) == artifact_files(new)
    assert {tag: small(hub).refs[tag] for tag in commits} == commits
    assert small(hub).refs["stable"] == commits["1.0"]
    assert verify("hf://team", "small:stable").digest == first.digest
    assert verify("hf://team", "small:1.1").bundle_digest == directory_digest(new / "artifact")


def test_a_race_for_main_is_lost_once_and_won_then(make_run: MakeRun, hub: Hub, tmp_path: Path) -> None:
    one, two = make_run("one"), make_run("two", files=NEW)
    publish_run(make_run("zero", files={"model.onnx": b"zero"}), "0.9")
    raced: list[str] = []

    def race(method: str, path: str) -> None:
        if "/commit/" in path and not raced:
            raced.append(path)
            publish_run(two, "2.0", "latest")

    hub.before = race
    receipt = publish_run(one, "1.0", "latest")
    assert raced and receipt.tags_set == ("1.0", "latest")
    assert {listing.tag for listing in list_artifacts("hf://team")} == {"0.9", "1.0", "2.0", "latest"}
    assert top(files_of(hub, "team/small")) == artifact_files(one)
    for reference, run in (("small:latest", one), ("small:1.0", one), ("small:2.0", two)):
        assert verify("hf://team", reference).bundle_digest == directory_digest(run / "artifact")


def test_an_answer_that_is_lost_is_not_a_race(run: Path, hub: Hub) -> None:
    lost: list[str] = []

    def lose(method: str, path: str) -> int | None:
        if "/commit/" in path and not lost:
            lost.append(path)
            return 502
        return None

    hub.after = lose
    receipt = publish_run(run, "1.0")
    assert lost and receipt.created and receipt.tags_set == ("1.0",)
    assert len(small(hub).commits) == 2


def test_a_hub_that_takes_no_commit(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay.registry.hf.step_aside", lambda attempt: None)
    hub.before = lambda method, path: 503 if "/commit/" in path else None
    with pytest.raises(UnreachableError, match="takes no commit"):
        publish_run(run)
    assert list_artifacts("hf://team") == ()
    hub.before = lambda method, path: 400 if "/commit/" in path else None
    with pytest.raises(AssayError, match="the Hub answered 400"):
        publish_run(run)


def test_a_download_that_breaks_off_goes_on_where_it_did(run: Path, hub: Hub, tmp_path: Path) -> None:
    receipt = publish_run(run)
    hub.breaks = [3, 1, 0, 2, 5]
    assert pull("hf://team", "small", tmp_path / "out").digest == receipt.digest
    assert hub.breaks == []


def test_a_hub_that_sends_a_few_bytes_at_a_time_is_given_up(
    make_run: Callable[..., Path], hub: Hub, tmp_path: Path
) -> None:
    run = make_run(files={"model.onnx": bytes(1000)})
    publish_run(run)
    hub.crumb = 10
    with pytest.raises(UnreachableError, match=r"bytes short of its \d+.*tried 6 times"):
        pull("hf://team", "small", tmp_path / "out")
    hub.crumb = 300
    assert pull("hf://team", "small", tmp_path / "out").created


def test_models_of_others_are_not_overwritten(run: Path, hub: Hub) -> None:
    hub.add("models", "team/small", {"README.md": b"# Soon\n", ".gitattributes": b""})
    publish_run(run)
    hub.add("models", "team/other", {"model.safetensors": b"theirs"})
    with pytest.raises(UsageError, match=r"a model that Assay did not publish \(model.safetensors\)"):
        publish(run / "artifact", run, "hf://team", "other")
    assert open_registry("hf://team").names() == ("small",)
    with pytest.raises(UsageError, match="there is no other:latest"):
        verify("hf://team", "other")
    edit(hub, {".gitignore": b"*.onnx"})
    with pytest.raises(UsageError, match=r"has a \.gitignore"):
        publish_run(run, "1.0")


@pytest.mark.parametrize("name", [".gitattributes", ".gitignore", ".assay/hub.json"])
def test_files_that_the_hub_has_for_itself_are_refused(make_run: MakeRun, hub: Hub, name: str) -> None:
    run = make_run(files={"model.onnx": b"x", name: b"x"})
    with pytest.raises(NotSupportedError, match="cannot be published to the Hub"):
        publish_run(run)


def test_main_is_no_tag(run: Path, hub: Hub) -> None:
    with pytest.raises(UsageError, match="main cannot be a tag here"):
        publish_run(run, "main")
    assert hub.repositories == []


def test_history_that_was_squashed(make_run: MakeRun, hub: Hub, tmp_path: Path) -> None:
    publish_run(make_run("old"), "1.0")
    new = make_run("new", files=NEW)
    publish_run(new, "1.1")
    kept = small(hub).refs["main"]
    for commit in set(small(hub).commits) - {kept}:
        del small(hub).commits[commit]
    with pytest.raises(IntegrityError, match="its commit is missing"):
        pull("hf://team", "small:1.0", tmp_path / "out")
    assert pull("hf://team", "small:1.1", tmp_path / "out").bundle_digest == directory_digest(new / "artifact")


@pytest.mark.parametrize(
    "facts",
    [
        None,
        b"no JSON",
        b'{"version":2,"current":null,"commits":{}}',
        b'{"version":1,"current":5,"commits":{}}',
        b'{"version":1,"current":null,"commits":{"sha256:0":"main"}}',
        json.dumps({"version": 1, "current": None, "commits": {f"sha256:{'0' * 64}": "../../main"}}).encode(),
        b'{"version":1,"current":null,"commits":{}}',
    ],
)
def test_facts_that_are_damaged(run: Path, hub: Hub, tmp_path: Path, facts: bytes | None) -> None:
    publish_run(run)
    edit(hub, {".assay/hub.json": facts})
    with pytest.raises(IntegrityError, match=r"hub\.json"):
        pull("hf://team", "small", tmp_path / "out")


def test_who_may_publish_is_asked_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    check_registry("hf://team")
    check_registry("hf://org")
    with pytest.raises(UsageError, match=r"not a member of others\. Allowed: hf://org, hf://team"):
        check_registry("hf://others")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AccessDeniedError, match="access denied"):
        check_registry("hf://team")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(AccessDeniedError, match="no token for the Hub"):
        check_registry("hf://team")


@pytest.mark.parametrize("org", ["a/b", "-a", "a b", "a..b"])
def test_addresses_that_are_none(hub: Hub, org: str) -> None:
    with pytest.raises(UsageError, match="not a user or an organization"):
        open_registry(f"hf://{org}")


def test_names_that_the_hub_does_not_allow(run: Path, hub: Hub) -> None:
    with pytest.raises(UsageError, match="a--b"):
        publish(run / "artifact", run, "hf://team", "a--b")


def test_a_hub_that_cannot_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 500
    with pytest.raises(UnreachableError, match="the Hub answered 500"):
        verify("hf://team", "small")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match="the Hub does not answer"):
        verify("hf://team", "small")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssayError, match="HF_HUB_OFFLINE is set"):
        verify("hf://team", "small")


def test_a_gated_model(run: Path, hub: Hub) -> None:
    publish_run(run)
    small(hub).gated = True
    with pytest.raises(AccessDeniedError, match="Access is restricted"):
        verify("hf://team", "small")


def test_a_digest_alone_leads_nowhere(hub: Hub) -> None:
    with pytest.raises(NotSupportedError, match="Write NAME@sha256"):
        verify("hf://team", f"sha256:{'0' * 64}")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(hub_module, "import_module", absent)
    with pytest.raises(UsageError, match=r"pip install 'assay\[hf\]'"):
        open_registry("hf://team")
