"""A registry on the Hugging Face Hub: a model repository per NAME, whose files a loader can use as they lie there.

Source: huggingface_hub, and the Hub's HTTP interface as that library speaks it.  On the branch main the files of the
model that was published last lie at the top; below `.assay/` lie what an OCI layout has beside them (index.json,
manifests, configs, what is said about models: blobs/sha256/) and hub.json, which tells the commit of every other model.
What is published is what index.json says.  A publish is one commit on the parent that was read (compare-and-swap), so
that model, evidence and tags appear in one step.  Git tags repeat the index's tags for other tools; nobody can set them
in the same step, and whoever moves one changes nothing for readers of the index.
The Hub is not believed: all bytes are hashed by whoever reads them.

Left out on purpose: deleting; branches other than main; models of others (they have no index).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from assay.errors import AssayError, IntegrityError, NotSupportedError, UnreachableError, UsageError
from assay.files import CHUNK_BYTES, open_regular, readable_json, sha256_bytes
from assay.registry.base import Attachment, Change, Part, Registry
from assay.registry.hub import COMMIT, MAIN, Draft, Hub, Stored
from assay.registry.index import MAX_INDEX_BYTES, Index, Named, parse_index
from assay.registry.indexed import IndexedRepository
from assay.registry.modelpack import DOC, FILEPATH, MODEL_TYPE, describe_model, media_type
from assay.registry.oci import DIGEST, MANIFEST_TYPE, MAX_JSON_BYTES, Descriptor, describe, parse_json, parse_manifest
from assay.registry.reference import is_name, parse_address
from assay.registry.stream import ResumingStream, step_aside

STREAMS: Final = 4
# Files up to this size are read into memory, checked, and committed from there; the Hub takes larger ones by LFS alone.
SMALL_BYTES: Final = 16 << 20
_ROUNDS: Final = 20
_FOLDER = ".assay/"
_INDEX = f"{_FOLDER}index.json"
_FACTS = f"{_FOLDER}hub.json"
_BLOBS = f"{_FOLDER}blobs/sha256/"
# Files by which git treats others.
_GIT_FILES = frozenset({".gitattributes", ".gitignore"})
_ORG = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,94}[A-Za-z0-9])?")


@dataclass(frozen=True)
class _View:
    """A repository at one commit; no commit when there is no repository.

    current: the model whose files lie at the top.  commits: model → the commit that has its files.
    """

    commit: str | None = None
    index: Index = field(default_factory=Index)
    current: str | None = None
    commits: dict[str, str] = field(default_factory=dict[str, str])

    def commit_of(self, model: str) -> str | None:
        return self.commits.get(model)


class HubRegistry(Registry):
    """hf://ORG"""

    def __init__(self, address: Path | str, *, writing: bool = False) -> None:
        org = parse_address(address).place
        self.location = f"hf://{org}"
        if not _ORG.fullmatch(org):
            raise UsageError(
                f"{self.location}: {org!r} is not a user or an organization. Write hf://ORG as a registry, hf://ORG/NAME:TAG for a model."
            )
        self._hub = Hub(org, self.location)
        self._writing = writing

    @classmethod
    def open(cls, address: Path | str) -> HubRegistry:
        """The models of a user or an organization, to read; whether the Hub answers shows with the first question."""
        return cls(address)

    @classmethod
    def create(cls, address: Path | str) -> HubRegistry:
        """The models of a user or an organization, to write; a repository is made, private, by the first publish to it."""
        return cls(address, writing=True)

    @classmethod
    def check(cls, address: Path | str) -> None:
        """Ask the Hub who we are, and whether that is a member of the organization."""
        registry = cls(address)
        registry._hub.check_member()

    def names(self) -> tuple[str, ...]:
        """The repositories that Assay has published to, as far as we may see them, sorted."""
        return tuple(sorted(name for name in self._hub.names(_INDEX) if is_name(name)))

    def repository(self, name: str) -> HubRepository:
        """One model repository; it need not exist yet."""
        return HubRepository(self._hub, name, writing=self._writing)

    def holding(self, digest: str) -> HubRepository:
        """NotSupportedError: a digest is known within a repository only."""
        raise NotSupportedError(f"{self.location}: a digest alone leads nowhere on the Hub. Write NAME@{digest}.")


class HubRepository(IndexedRepository):
    """One model repository."""

    streams = STREAMS
    # The branch of what was published last.
    reserved_tags = frozenset({MAIN})

    def __init__(self, hub: Hub, name: str, *, writing: bool) -> None:
        super().__init__(hub.location, name)
        self._hub = hub
        self._writing = writing
        self._repo = f"{hub.org}/{name}"
        self._view = _View()
        self._tree: tuple[str | None, dict[str, Stored]] = (None, {})
        # Digest of a layer → commit and path.
        self._layers: dict[str, tuple[str | None, str]] = {}
        # What has been put and not committed: path → part, and its upload with the commit that it was prepared on.
        self._ready = False
        self._parts: dict[str, Part] = {}
        self._uploads: dict[str, tuple[str | None, Any]] = {}

    # Reading

    def read_index(self) -> Index:
        view = self._refresh()
        if view.commit is None and not self._writing:
            raise UsageError(
                f"{self.location}: there is no repository {self._repo} on the Hub, or not for this token. Publish to it first, or "
                "log in (hf auth login, HF_TOKEN) with an account that may see it."
            )
        return view.index

    def read_manifest(self, descriptor: Descriptor) -> bytes:
        data = self.read_json_blob(descriptor)
        manifest = parse_manifest(data, f"{self.location}: {descriptor.digest}")
        if manifest.artifact_type == MODEL_TYPE:
            commit = self._view.commit_of(descriptor.digest)
            for layer in manifest.layers:
                self._layers[layer.digest] = (commit, layer.annotations.get(FILEPATH, ""))
        return data

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> BinaryIO:
        commit, path = self._place(descriptor)
        if commit is None:
            raise IntegrityError(f"{self.where(descriptor)}: {_FACTS} does not tell the commit of this file's model.")
        stream = ResumingStream(
            lambda position: self._hub.rest(self._repo, commit, path, position),
            descriptor.size,
            self.where(descriptor),
            self._hub.broken,
            offset,
        )
        return cast("BinaryIO", io.BufferedReader(stream, CHUNK_BYTES))

    def where(self, descriptor: Descriptor) -> str:
        commit, path = self._place(descriptor)
        return f"{self.location}/{self.name}/{path}" + (f" (commit {commit[:12]})" if commit else "")

    def strangers(self, model: Descriptor) -> tuple[str, ...]:
        view = self._refresh()
        home = view.commit_of(model.digest)
        if home is None:
            return ()
        published = self._hub.files(self._repo, home)
        # Loaders take main where they are told no revision.
        found = self._files() if view.current == model.digest else published
        layers = set(_layer_paths(self.read_manifest(model), model.digest))
        added = {path for path in found.keys() - layers if not path.startswith(_FOLDER) and path not in _GIT_FILES}
        changed = {path for path in layers if found.get(path) != published.get(path)}
        return tuple(sorted(added | changed))

    def _place(self, descriptor: Descriptor) -> tuple[str | None, str]:
        """The commit and the path of a blob."""
        if self._view.commit is None:
            self._refresh()
        return self._layers.get(descriptor.digest) or (self._view.commit, _blob_path(descriptor.digest))

    def _refresh(self) -> _View:
        """The repository as it is now."""
        commit = self._hub.head(self._repo)
        if commit != self._view.commit:
            self._view = self._read_view(commit) if commit else _View()
        return self._view

    def _read_view(self, commit: str) -> _View:
        data = self._hub.read(self._repo, commit, _INDEX, MAX_INDEX_BYTES)
        if data is None:
            return _View(commit)
        where = f"{self.location}/{self.name}/{_FACTS} (commit {commit[:12]})"
        facts = self._hub.read(self._repo, commit, _FACTS, MAX_JSON_BYTES)
        if facts is None:
            raise IntegrityError(f"{where}: it is missing. This repository is damaged.")
        current, commits = _parse_facts(facts, where)
        if current and current not in commits:
            # It is of the same commit as this file: who wrote it could not know its own commit.
            commits[current] = self._hub.last_commit(self._repo, commit, _FACTS)
        return _View(commit, parse_index(data, f"{self.location}/{self.name}/{_INDEX}"), current, commits)

    def _files(self) -> dict[str, Stored]:
        """The files of the commit in view, by path."""
        commit = self._view.commit
        if self._tree[0] != commit:
            self._tree = (commit, self._hub.files(self._repo, commit) if commit else {})
        return self._tree[1]

    # Writing

    def put(self, part: Part) -> bool:
        path = part.descriptor.annotations.get(FILEPATH) or _blob_path(part.descriptor.digest)
        if not self._ready:
            self._make_ready()
        if path in _GIT_FILES or (path.startswith(_FOLDER) and not path.startswith(_BLOBS)):
            raise NotSupportedError(f"{path}: a file of this name cannot be published to the Hub, which has its own.")
        self._parts[path] = part
        if (stored := self._files().get(path)) and _holds(stored, part):
            return False
        self._upload(path, part)
        return True

    def _make_ready(self) -> None:
        """Make the repository where there is none; UsageError where it holds a model of somebody else."""
        if self._refresh().commit is None:
            self._hub.create(self._repo)
            if self._refresh().commit is None:
                raise AssayError(f"{self.location}: {self._repo} is there, and these credentials may not see it.")
        files = self._files()
        if ".gitignore" in files:
            raise UsageError(
                f"{self.location}: {self._repo} has a .gitignore, by which the Hub could leave out files of a model. Remove it there."
            )
        foreign = [path for path in files if path not in _GIT_FILES and media_type(path) != DOC]
        if foreign and _INDEX not in files:
            raise UsageError(
                f"{self.location}: {self._repo} holds a model that Assay did not publish ({foreign[0]}). Choose another name."
            )
        self._ready = True

    def _upload(self, path: str, part: Part) -> Any:
        """Send a file, or keep it for the commit where that is how the Hub takes it."""
        content = _read_checked(part) if part.descriptor.size <= SMALL_BYTES else cast("Path", part.content)
        operation = self._hub.upload(self._repo, path, content)
        if f"sha256:{operation.upload_info.sha256.hex()}" != part.descriptor.digest:
            raise IntegrityError(f"{part.content}: it must not change while it is published; publish it again.")
        self._uploads[path] = (self._view.commit, operation)
        return operation

    def _name(self, model: bytes, attachments: Sequence[Attachment], tags: Sequence[str], force: bool) -> Change:
        descriptor = describe_model(model)
        attached = [attachment.descriptor(descriptor) for attachment in attachments]
        manifests = [model, *(attachment.manifest(descriptor) for attachment in attachments)]
        written = sum(self.put(Part(describe(manifest, MANIFEST_TYPE), manifest)) for manifest in manifests)
        named = self._commit(model, tags, attached, force)
        self._repeat_tags(tags)
        self._parts, self._uploads = {}, {}
        return Change(named.model_is_new, named.tags_set, named.attached, written)

    def _commit(self, model: bytes, tags: Sequence[str], attached: Sequence[Descriptor], force: bool) -> Named:
        """Put what is staged under main's head; from the start again when somebody else was faster."""
        descriptor = describe_model(model)
        tried: Named | None = None
        additions, deletions = dict[str, Part](), list[str]()
        for attempt in range(1, _ROUNDS):
            view = self._refresh()
            if tried and view.index == tried.index:
                self._check_committed(view.commit, additions, deletions)  # the answer to our commit was lost
                return tried
            named = view.index.publish(self.name, tags, descriptor, attached, force=force, where=self.location)
            additions, deletions = self._difference(view, model, named)
            if not additions and not deletions:
                return named
            tried = named
            operations = [self._operation(path, part) for path, part in additions.items()]
            verb = "Publish" if named.model_is_new or named.tags_set else "Attach to"
            title = f"{verb} {self.name}@{descriptor.digest[:19]}"
            draft = Draft(title, descriptor.digest, operations, deletions)
            commit = self._hub.commit(self._repo, view.commit, draft)
            if commit:
                self._check_committed(commit, additions, deletions)
                return named
            step_aside(attempt)
        raise UnreachableError(
            f"{self.location}: the Hub takes no commit to {self._repo}, or others commit again and again. Run the same command again."
        )

    def _difference(self, view: _View, model: bytes, named: Named) -> tuple[dict[str, Part], list[str]]:
        """Files to add to the commit in view, and files to delete from it."""
        digest = sha256_bytes(model)
        layers = {layer.annotations[FILEPATH]: layer for layer in parse_manifest(model, digest).layers}
        files = self._files()
        wanted = {path: part for path, part in self._parts.items() if path.startswith(_BLOBS)}
        deletions: list[str] = []
        placed = self._goes_to_the_top(view, digest, layers, named)
        if placed:
            wanted |= {path: self._parts[path] for path in layers}
            deletions = [path for path in self._layers_at_the_top(view) if path not in layers and path in files]
        elif view.commit_of(digest) is None:
            raise AssayError(
                f"{self.location}: the files of {digest} were not put into {self._repo}; publish it again."
            )
        additions = {path: part for path, part in wanted.items() if not self._is_there(path, part)}
        if additions or deletions or named.index != view.index:
            commits = dict(view.commits)
            if placed:
                commits.pop(digest, None)
            facts = _write_facts(digest if placed else view.current, commits)
            for path, data in ((_INDEX, named.index.to_bytes()), (_FACTS, facts)):
                part = Part(describe(data, "application/json"), data)
                if not self._is_there(path, part):
                    additions[path] = part
        return additions, deletions

    def _goes_to_the_top(self, view: _View, digest: str, layers: dict[str, Descriptor], named: Named) -> bool:
        """Whether this commit is to put the model's files at the top: it was published now, or they were damaged there."""
        if not all(
            path in self._parts and self._parts[path].descriptor.digest == layers[path].digest for path in layers
        ):
            return False  # nobody put them: more is said about a model that is there
        if view.current == digest:
            # A model card may be edited on the Hub: the published one stays in its own commit.
            return any(
                layer.media_type != DOC and not self._is_there(path, self._parts[path])
                for path, layer in layers.items()
            )
        return named.model_is_new or bool(named.tags_set) or view.commit_of(digest) is None

    def _layers_at_the_top(self, view: _View) -> Iterable[str]:
        """The paths of the model that is current."""
        if view.current is None:
            return ()
        data = self._hub.read(self._repo, cast("str", view.commit), _blob_path(view.current), MAX_JSON_BYTES)
        if data is None or sha256_bytes(data) != view.current:
            raise IntegrityError(f"{self.location}: the manifest {view.current} of {self._repo} is missing or damaged.")
        return _layer_paths(data, view.current)

    def _is_there(self, path: str, part: Part) -> bool:
        stored = self._files().get(path)
        return stored is not None and _holds(stored, part)

    def _operation(self, path: str, part: Part) -> Any:
        """The upload of a file.  One that was prepared on another commit may be taken for unchanged: not used again."""
        commit, operation = self._uploads.get(path, (None, None))
        return operation if operation is not None and commit == self._view.commit else self._upload(path, part)

    def _check_committed(self, commit: str | None, additions: dict[str, Part], deletions: list[str]) -> None:
        """AssayError unless a commit has what was sent; hashes as the Hub states them, whoever reads takes their own."""
        files = self._hub.files(self._repo, cast("str", commit))
        lost = [path for path, part in additions.items() if path not in files or not _holds(files[path], part)]
        lost += [path for path in deletions if path in files]
        if lost:
            raise AssayError(
                f"{self.location}: the Hub took a commit to {self._repo} and has other bytes of {', '.join(lost)}."
            )

    def _repeat_tags(self, tags: Sequence[str]) -> None:
        """Let git's tags say what the index says, for tools that know no index."""
        if not tags:
            return
        view = self._refresh()
        found = self._hub.tags(self._repo)
        for _, tag, model in view.index.models(self.name):
            commit = view.commit_of(model.digest)
            if tag and tag in tags and commit and found.get(tag) != commit:
                self._hub.set_tag(self._repo, tag, commit, moves=tag in found)


def _holds(stored: Stored, part: Part) -> bool:
    """Whether a file need not be sent again; whoever reads it hashes it."""
    if stored.size != part.descriptor.size:
        return False
    if stored.sha256:
        return f"sha256:{stored.sha256}" == part.descriptor.digest
    return stored.size <= SMALL_BYTES and stored.blob_id == _git_id(_read_checked(part))


def _read_checked(part: Part) -> bytes:
    """The bytes of a small part; IntegrityError when they are not what was promised."""
    content = part.content
    if isinstance(content, Path):
        with open_regular(content) as stream:
            content = stream.read(part.descriptor.size + 1)
    if sha256_bytes(content) != part.descriptor.digest:
        where = part.content if isinstance(part.content, Path) else "the bytes to store"
        raise IntegrityError(f"{where}: it must not change while it is published; publish it again.")
    return content


def _layer_paths(manifest: bytes, where: str) -> list[str]:
    layers = parse_manifest(manifest, where).layers
    return [path for layer in layers if (path := layer.annotations.get(FILEPATH))]


def _blob_path(digest: str) -> str:
    return _BLOBS + digest.removeprefix("sha256:")


def _git_id(data: bytes) -> str:
    """What git calls a file: here a hint whether it changed, never a proof."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _write_facts(current: str | None, commits: dict[str, str]) -> bytes:
    return readable_json({"version": 1, "current": current, "commits": commits})


def _parse_facts(data: bytes, where: str) -> tuple[str | None, dict[str, str]]:
    """The current model, and the commits of models; IntegrityError when they are not what we write."""
    value = parse_json(data, where)
    current, commits = value.get("current"), value.get("commits")
    if value.get("version") != 1 or not isinstance(commits, dict):
        raise IntegrityError(f"{where}: not what this release writes there (version 1).")
    pairs = cast("dict[Any, Any]", commits).items()
    sound = all(DIGEST.fullmatch(key) and isinstance(text, str) and COMMIT.fullmatch(text) for key, text in pairs)
    if not sound or not (current is None or (isinstance(current, str) and DIGEST.fullmatch(current))):
        raise IntegrityError(f"{where}: a digest or a commit in it is none.")
    return current, dict(cast("dict[str, str]", commits))
