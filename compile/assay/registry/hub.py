"""What a registry on the Hugging Face Hub needs of huggingface_hub, with errors that a person can act on.

The library is imported when the first registry is opened.  Token, endpoint and timeouts are what it finds in
environment and configuration.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from assay.errors import AccessDeniedError, AssayError, IntegrityError, UnreachableError, UsageError
from assay.files import CHUNK_BYTES
from assay.registry.stream import Rest, read_whole

MAIN: Final = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
# Answers to a commit after which main may be another, or may not.
_UNDECIDED = frozenset({409, 412, 500, 502, 503, 504})


@dataclass(frozen=True)
class Stored:
    """A file of a commit.  sha256: of its bytes, for those kept as LFS.  blob_id: git's SHA-1, for the others."""

    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True)
class Draft:
    """A commit to be made.  additions: from `Hub.upload`; deletions: paths."""

    title: str
    text: str
    additions: Sequence[Any]
    deletions: Sequence[str]


class Hub:
    """The repositories of one user or organization.  broken: what a connection that broke is raised as."""

    def __init__(self, org: str, location: str) -> None:
        self.org = org
        self.location = location
        try:
            self._library: Any = import_module("huggingface_hub")
            errors: Any = import_module("huggingface_hub.errors")
            utils: Any = import_module("huggingface_hub.utils")
            http: Any = import_module("httpx2")
        except ImportError as error:
            raise UsageError(
                "hf:// needs the package huggingface-hub, which is not installed: pip install 'assay[hf]'."
            ) from error
        self._errors, self._utils = errors, utils
        self.broken: tuple[type[Exception], ...] = (http.TransportError,)
        if not sys.stderr.isatty():
            utils.disable_progress_bars()
        self._api = self._library.HfApi(endpoint=self._library.constants.ENDPOINT, library_name="assay")

    # Reading

    def check_member(self) -> None:
        """UsageError unless we are this user, or a member of this organization."""
        with self._explained(""):
            try:
                who = self._api.whoami()
            except self._errors.LocalTokenNotFoundError as error:
                raise AccessDeniedError(
                    f"{self.location}: no token for the Hub. Log in (hf auth login), or set HF_TOKEN."
                ) from error
        places = [str(who.get("name")), *(str(org.get("name")) for org in who.get("orgs", ()))]
        if self.org not in places:
            raise UsageError(
                f"{self.location}: the token is of {places[0]}, who is not a member of {self.org}. Allowed: "
                f"{', '.join(f'hf://{place}' for place in places)}."
            )

    def names(self, path: str) -> list[str]:
        """The repositories that have a file of this path."""
        with self._explained(""):
            found = list(self._api.list_models(author=self.org, expand=["siblings"]))
        having = (model for model in found if any(file.rfilename == path for file in model.siblings or ()))
        return [str(model.id).partition("/")[2] for model in having]

    def head(self, repo: str) -> str | None:
        """The commit of main; None when there is no such repository for us."""
        with self._explained(repo):
            try:
                return str(self._api.repo_info(repo, revision=MAIN, timeout=self._timeout()).sha)
            except self._errors.GatedRepoError:
                raise
            except self._errors.RepositoryNotFoundError:
                return None

    def files(self, repo: str, commit: str) -> dict[str, Stored]:
        with self._explained(repo):
            return {
                entry.path: Stored(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
                for entry in self._api.list_repo_tree(repo, recursive=True, revision=commit)
                if hasattr(entry, "blob_id")
            }

    def last_commit(self, repo: str, commit: str, path: str) -> str:
        """The last commit, up to one, that changed a file."""
        with self._explained(repo):
            found = self._api.get_paths_info(repo, [path], expand=True, revision=commit)
        if not found or found[0].last_commit is None or not COMMIT.fullmatch(found[0].last_commit.oid):
            raise AssayError(f"{self.location}: the Hub does not tell which commit changed {path} of {repo} last.")
        return found[0].last_commit.oid

    def read(self, repo: str, commit: str, path: str, limit_bytes: int) -> bytes | None:
        """A small file's bytes, up to one more than the limit; None when there is none."""
        where = f"{self.location}: {path} of {repo}"
        try:
            return read_whole(lambda position: self.rest(repo, commit, path, position), limit_bytes, where, self.broken)
        except MissingError:
            return None

    def rest(self, repo: str, commit: str, path: str, position: int) -> Rest:
        """A file of a commit from a byte on.  The request is sent now, so that what is missing shows now."""
        url = f"{self._api.endpoint}/{repo}/resolve/{commit}/{quote(path)}"
        headers = self._utils.build_hf_headers(library_name="assay") | {"Accept-Encoding": "identity"}
        if position:
            headers["Range"] = f"bytes={position}-"
        with contextlib.ExitStack() as stack, self._explained(repo):
            answer = stack.enter_context(
                self._utils.http_stream_backoff("GET", url, headers=headers, timeout=self._timeout())
            )
            if answer.status_code == 416:
                raise MissingError(
                    f"{self.location}: {path} of {repo} has no byte {position}: it is shorter than promised."
                )
            try:
                self._utils.hf_raise_for_status(answer)
            except (self._errors.RemoteEntryNotFoundError, self._errors.RevisionNotFoundError) as error:
                what = "this file" if isinstance(error, self._errors.RemoteEntryNotFoundError) else "its commit"
                raise MissingError(
                    f"{self.location}: {what} is missing from {repo}: {path} at {commit[:12]}. Publish the artifact again."
                ) from error
            begins = answer.headers.get("Content-Range", "bytes 0-").removeprefix("bytes ").partition("-")[0]
            # Not closed by `with`: the library would take an error of the body for one of its own request.
            pieces = answer.iter_raw(CHUNK_BYTES)
            return Rest(pieces, stack.pop_all().close, int(begins) if begins.isdigit() else position)

    def tags(self, repo: str) -> dict[str, str]:
        """Tag → commit, as git has them."""
        with self._explained(repo):
            return {ref.name: ref.target_commit for ref in self._api.list_repo_refs(repo).tags}

    # Writing

    def create(self, repo: str) -> None:
        """Make a private repository; fine when it is there."""
        with self._explained(repo):
            self._api.create_repo(repo, private=True, exist_ok=True)

    def upload(self, repo: str, path: str, content: bytes | Path) -> Any:
        """An addition for `commit`, whose bytes are sent now unless they go with the commit itself."""
        with self._explained(repo):
            operation = self._library.CommitOperationAdd(path, content)
            try:
                self._api.preupload_lfs_files(repo, [operation], revision=MAIN, free_memory=False)
            except RuntimeError as error:
                # What the library says of an upload in a thread hides what was wrong.
                raise error.__cause__ or error from None
            return operation

    def commit(self, repo: str, parent: str | None, draft: Draft) -> str | None:
        """One commit on main; None when main is not at the parent any more, or when that is not known."""
        deletions = [self._library.CommitOperationDelete(path, is_folder=False) for path in draft.deletions]
        with self._explained(repo), warnings.catch_warnings():
            # Of a model card without metadata: the Hub shows that, too.
            warnings.simplefilter("ignore")
            try:
                made = self._api.create_commit(
                    repo,
                    [*draft.additions, *deletions],
                    commit_message=draft.title,
                    commit_description=draft.text,
                    revision=MAIN,
                    parent_commit=parent,
                )
            except self._errors.HfHubHTTPError as error:
                if error.response.status_code in _UNDECIDED:
                    return None
                raise
            except self.broken:
                return None
            except ValueError as error:
                raise UsageError(
                    f"{self.location}: the Hub refuses what is to be published to {repo}: {error}"
                ) from error
        return str(made.oid)

    def set_tag(self, repo: str, tag: str, commit: str, *, moves: bool) -> None:
        """Point a git tag to a commit; what somebody else does to it at this moment is left to them."""
        with self._explained(repo):
            if moves:
                with contextlib.suppress(self._errors.RevisionNotFoundError):
                    self._api.delete_tag(repo, tag=tag)
            self._api.create_tag(repo, tag=tag, revision=commit, exist_ok=True)

    def _timeout(self) -> float:
        return float(self._library.constants.HF_HUB_DOWNLOAD_TIMEOUT)

    @contextlib.contextmanager
    def _explained(self, repo: str) -> Generator[None]:
        """Turn what the library raises into what a person can act on."""
        place = f"{self.location}: {repo}" if repo else self.location
        try:
            yield
        except self._errors.OfflineModeIsEnabled as error:
            raise AssayError(f"{place}: HF_HUB_OFFLINE is set, and this needs the Hub. Unset it.") from error
        except self._errors.HFValidationError as error:
            raise UsageError(f"{place}: {error}") from error
        except self._errors.HfHubHTTPError as error:
            status = error.response.status_code
            said = str(error.server_message or "").strip()[:200]
            if status in (401, 403):
                raise AccessDeniedError(
                    f"{place}: access denied ({status}). {said} Log in (hf auth login) or set HF_TOKEN to a token that may read, and to "
                    "publish write, this repository."
                ) from error
            if status == 404:
                raise UsageError(
                    f"{place}: there is no such thing on the Hub, or not for this token. {said}"
                ) from error
            kind = UnreachableError if status in (408, 429) or status >= 500 else AssayError
            raise kind(f"{place}: the Hub answered {status}. {said} The same command may work later.") from error
        except self.broken as error:
            raise UnreachableError(
                f"{place}: the Hub does not answer ({type(error).__name__}: {error}). The same command may work later."
            ) from error


class MissingError(IntegrityError):
    """A file or a commit is not there."""
