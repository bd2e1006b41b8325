"""A registry on a server: OCI distribution over HTTPS.

Source: OCI distribution-spec 1.1.  A commit goes in this order: blobs, the model's manifest by its digest, what is said
about it, tags.  Whatever is cut off in between leaves a registry in which every name leads to something whole.
Blobs go up as one streamed PUT (servers differ on chunks) and come down in a stream that goes on by Range after a cut.
A server cannot compare and swap a tag: two publishers of one version at the same moment can both believe they set it.
Left out on purpose: uploads that go on after a cut (a new session is started), deleting, digests other than sha256.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final, cast
from urllib.parse import quote, urlsplit

import httpx2

from assay.errors import AccessDeniedError, AssayError, IntegrityError, NotSupportedError, UsageError
from assay.files import CHUNK_BYTES, open_regular, sha256_bytes, sha256_file
from assay.registry.base import Attachment, Change, Part, Registry, Repository
from assay.registry.credentials import find_credentials
from assay.registry.index import Entry, Index, parse_index
from assay.registry.modelpack import describe_model
from assay.registry.oci import INDEX_TYPE, MANIFEST_TYPE, Descriptor, parse_json
from assay.registry.reference import Address, Reference, check_move, is_name, is_tag, parse_address, some_of
from assay.registry.stream import Rest, ResumingStream
from assay.registry.transport import Answer, AttemptError, Patience, Transport, is_loopback, repeatable

STREAMS: Final = 4
_HOST = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:\d{1,5})?")
# A repository's name, from the distribution-spec.
_PATH = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*")
_FALLBACK_TAG = re.compile(r"sha256-[0-9a-f]{64}.*")
_NEXT = re.compile(r'<([^>]+)>\s*;\s*rel="?next"?')
# Names that people write → hosts that serve them.
_SERVED_BY = {"docker.io": "registry-1.docker.io"}
_PAGE = 1000
_MAX_PAGES = 100
_ROUNDS = 10


class RemoteRegistry(Registry):
    """oci://HOST[:PORT][/PATH]; a repository's name on the server is PATH/NAME."""

    def __init__(self, address: Address, *, writing: bool) -> None:
        host, _, path = address.place.partition("/")
        self.location = f"{address.scheme}://{address.place}"
        if not _HOST.fullmatch(host):
            hint = " Credentials do not belong in an address: use docker login." if "@" in host else ""
            raise UsageError(f"{address.scheme}:// must be followed by HOST or HOST:PORT.{hint}")
        if path and not _PATH.fullmatch(path):
            raise UsageError(f"{self.location}: {path!r} cannot be a path on a registry; allowed: a-z 0-9 . _ - and /.")
        encrypted = address.scheme == "oci" and not is_loopback(urlsplit(f"//{host}").hostname)
        origin = f"{'https' if encrypted else 'http'}://{_SERVED_BY.get(host, host)}"
        self._path = f"{path}/" if path else ""
        self._actions = "pull,push" if writing else "pull"
        self._transport = Transport(origin, self.location, lambda: find_credentials(host))

    @classmethod
    def open(cls, address: Path | str) -> RemoteRegistry:
        """The registry, to read; whether its server answers shows with the first question."""
        return cls(parse_address(address), writing=False)

    @classmethod
    def create(cls, address: Path | str) -> RemoteRegistry:
        """The registry, to write; servers make repositories when they are written to."""
        return cls(parse_address(address), writing=True)

    @classmethod
    def check(cls, address: Path | str) -> None:
        """Ask whether the server is there and knows us; whether we may write to it shows when we do."""
        registry = cls.create(address)
        answer = registry._transport.send("GET", "/v2/", "")
        if answer.status != 200:
            raise AssayError(
                f"{registry._transport.failure('GET', '/v2/', answer)} This is no registry that speaks the OCI distribution protocol."
            )

    def names(self) -> tuple[str, ...]:
        """The NAMEs directly below the path; NotSupportedError when the server does not list them."""
        try:
            found = list_pages(self._transport, "/v2/_catalog", "repositories", "registry:catalog:*")
        except AccessDeniedError:
            found = None
        if found is None:
            raise NotSupportedError(
                f"{self.location}: this server does not list its repositories. Ask for one: {self.location}/NAME:TAG."
            )
        names = (name.removeprefix(self._path) for name in found if name.startswith(self._path))
        return tuple(sorted(name for name in names if is_name(name)))

    def repository(self, name: str) -> RemoteRepository:
        """One repository; UsageError when servers do not allow its name."""
        path = self._path + name
        if not _PATH.fullmatch(path):
            raise UsageError(
                f"{name!r} cannot be a repository on a registry; allowed: a-z 0-9, with . _ __ or dashes between them."
            )
        return RemoteRepository(self._transport, name, path, self._actions)

    def holding(self, digest: str) -> Repository:
        """NotSupportedError: a server knows a digest only within a repository."""
        raise NotSupportedError(f"{self.location}: a digest alone leads nowhere on a server. Write NAME@{digest}.")


class RemoteRepository(Repository):
    """One repository on a server."""

    streams = STREAMS

    def __init__(self, transport: Transport, name: str, path: str, actions: str) -> None:
        super().__init__(transport.name, name)
        self._transport = transport
        self._root = f"/v2/{path}"
        self._scope = f"repository:{path}:{actions}"
        self._manifests: dict[str, bytes] = {}

    # Reading

    def models(self) -> tuple[tuple[str | None, Descriptor], ...]:
        """Those with a tag: servers do not list what has none."""
        tags = [tag for tag in self._tags() if is_tag(tag) and not _FALLBACK_TAG.fullmatch(tag)]
        with ThreadPoolExecutor(STREAMS) as pool:
            found = list(pool.map(self._find, tags))
        return tuple((tag, descriptor) for tag, descriptor in zip(tags, found, strict=True) if descriptor)

    def resolve(self, reference: Reference) -> Descriptor:
        found = self._find(reference.digest or reference.tag or "")
        if found is None:
            tags = [tag for tag in self._tags() if not _FALLBACK_TAG.fullmatch(tag)]
            there = f"Tags of {self.name}: {some_of(tags)}." if tags else f"There is nothing under {self.name}."
            raise UsageError(f"{self.location}: there is no {reference}. {there}")
        return found

    def referrers(self, digest: str, artifact_type: str | None = None) -> tuple[Descriptor, ...]:
        found = [entry.descriptor for entry in self._referrers(digest)[0]]
        return tuple(descriptor for descriptor in found if artifact_type in (None, descriptor.artifact_type))

    def read_manifest(self, descriptor: Descriptor) -> bytes:
        data = self._manifests.get(descriptor.digest)
        if data is None:
            answer = self._get_manifest(descriptor.digest)
            if answer is None:
                raise IntegrityError(f"{self.location}: the manifest {descriptor.digest} is missing from {self.name}.")
            data = answer
        if (len(data), sha256_bytes(data)) != (descriptor.size, descriptor.digest):
            raise IntegrityError(
                f"{self.location}: sent {len(data)} bytes with the digest {sha256_bytes(data)} as {self.name}@{descriptor.digest} "
                f"({descriptor.size} bytes)."
            )
        return data

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> BinaryIO:
        stream = ResumingStream(
            lambda position: self._rest(descriptor, position),
            descriptor.size,
            self.where(descriptor),
            (AttemptError,),
            offset,
        )
        return cast("BinaryIO", io.BufferedReader(stream, CHUNK_BYTES))

    def where(self, descriptor: Descriptor) -> str:
        return f"{self.location}/{self.name}@{descriptor.digest}"

    def strangers(self, model: Descriptor) -> tuple[str, ...]:
        return ()

    # Writing

    def check_tags(self, digest: str, tags: Sequence[str], *, force: bool = False) -> None:
        for tag in dict.fromkeys(tags):
            if old := self._find(tag):
                check_move(f"{self.location}: {self.name}", tag, old.digest, digest, force=force)

    def put(self, part: Part) -> bool:
        if self._has(part.descriptor):
            return False
        patience = Patience()
        while (failure := self._upload(part)) is not None:
            patience.wait(*failure)
            if self._has(part.descriptor):  # the answer alone was lost
                break
        return True

    def _name(self, model: bytes, attachments: Sequence[Attachment], tags: Sequence[str], force: bool) -> Change:
        descriptor = describe_model(model)
        known = {found.digest for found in self.referrers(descriptor.digest)}
        written = [self._put_manifest(model, descriptor.digest)]
        attached = [attachment.descriptor(descriptor) for attachment in attachments]
        for attachment, found in zip(attachments, attached, strict=True):
            written.append(self._put_manifest(attachment.manifest(descriptor), found.digest))
        self._list_referrers(descriptor.digest, attached)
        tags_set = tuple(tag for tag in dict.fromkeys(tags) if self._set_tag(tag, model, force))
        self._list_referrers(descriptor.digest, attached)
        new = tuple(found.digest for found in attached if found.digest not in known)
        return Change(written[0], tags_set, new, sum(written))

    # The pieces

    def _send(
        self, method: str, url: str, *, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        return self._transport.send(method, url, self._scope, headers=headers, body=body)

    def _content(self, answer: Answer, method: str, url: str, expected: int = 200) -> bytes:
        if answer.status != expected:
            raise AssayError(self._transport.failure(method, url, answer))
        return answer.body

    def _blob(self, descriptor: Descriptor) -> str:
        return f"{self._root}/blobs/{descriptor.digest}"

    def _tags(self) -> list[str]:
        return sorted(list_pages(self._transport, f"{self._root}/tags/list", "tags", self._scope) or [])

    def _get_manifest(self, reference: str, accept: str = MANIFEST_TYPE) -> bytes | None:
        """A manifest's bytes by tag or digest, or None."""
        url = f"{self._root}/manifests/{reference}"
        answer = self._send("GET", url, headers={"Accept": accept})
        return None if answer.status == 404 else self._content(answer, "GET", url)

    def _find(self, reference: str) -> Descriptor | None:
        """What a tag or a digest names; by the bytes that come, not by what the server says of them."""
        data = self._get_manifest(reference, f"{MANIFEST_TYPE}, {INDEX_TYPE}")
        if data is None:
            return None
        found = describe_model(data)
        if reference.startswith("sha256:") and found.digest != reference:
            raise IntegrityError(
                f"{self.location}: sent bytes with the digest {found.digest} as {self.name}@{reference}."
            )
        self._manifests[found.digest] = data
        return found

    def _has(self, descriptor: Descriptor) -> bool:
        url = self._blob(descriptor)
        answer = self._send("HEAD", url)
        if answer.status not in (200, 404):
            raise AssayError(self._transport.failure("HEAD", url, answer))
        return answer.status == 200 and answer.headers.get("content-length") in (None, str(descriptor.size))

    def _rest(self, descriptor: Descriptor, position: int) -> Rest:
        """A blob from a byte on; AttemptError when asking again may help."""
        url, where = self._blob(descriptor), self.where(descriptor)
        headers = {"Range": f"bytes={position}-"} if position else {}
        with contextlib.ExitStack() as stack:
            try:
                response = stack.enter_context(self._transport.open("GET", url, self._scope, headers=headers))
                status = response.status_code
                if status in (404, 416):
                    what = "missing" if status == 404 else f"shorter than the {descriptor.size} bytes promised"
                    raise IntegrityError(f"{where}: this blob is {what}. Publish the artifact again.")
                here = response.headers.get("content-range", "").startswith(f"bytes {position}-")
                if status == 200 or (status == 206 and here):
                    pieces = self._pieces(response)
                    return Rest(pieces, stack.pop_all().close, position if status == 206 else 0)
                answer = self._transport.read(response)
            except httpx2.TransportError as error:
                raise AttemptError(self._transport.describe(error)) from error
        failure = self._transport.failure("GET", url, answer)
        if repeatable(status):
            raise AttemptError(failure, answer.headers.get("retry-after"))
        raise AssayError(failure)

    def _pieces(self, response: httpx2.Response) -> Iterator[bytes]:
        try:
            yield from response.iter_raw()
        except httpx2.TransportError as error:
            raise AttemptError(self._transport.describe(error)) from error

    def _upload(self, part: Part) -> tuple[str, str | None] | None:
        """One attempt; a failure that may pass, with the server's Retry-After, or None when it is done."""
        descriptor, url = part.descriptor, f"{self._root}/blobs/uploads/"
        # Without `from`, which nothing tells: servers may look for the blob in other repositories themselves.
        answer = self._send("POST", f"{url}?mount={quote(descriptor.digest)}", headers={"Content-Length": "0"})
        if answer.status == 201:
            return None
        self._content(answer, "POST", url, 202)
        location = self._transport.absolute(answer.headers.get("location", ""))
        target = f"{location}{'&' if '?' in location else '?'}digest={quote(descriptor.digest)}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor.size)}
        try:
            with self._transport.open(
                "PUT", target, self._scope, headers=headers, body=lambda: _content_of(part)
            ) as sent:
                answer = self._transport.read(sent)
        except httpx2.TransportError as error:
            return self._transport.describe(error), None
        if answer.status == 201:
            return None
        failure = self._transport.failure("PUT", target, answer)
        if answer.has_error("DIGEST_INVALID") and _digest_of(part) != descriptor.digest:
            raise IntegrityError(f"{part.content}: it must not change while it is published. Publish it again.")
        if repeatable(answer.status) or answer.has_error("DIGEST_INVALID") or answer.status == 404:
            # Damaged on the way, or a session that the server lost.
            return failure, answer.headers.get("retry-after")
        raise AssayError(failure)

    def _put_manifest(self, data: bytes, digest: str) -> bool:
        """Store a manifest by its digest; False when it was there."""
        if self._get_manifest(digest) == data:
            return False
        self._write_manifest(digest, data, MANIFEST_TYPE)
        if self._get_manifest(digest) != data:
            raise IntegrityError(f"{self.location}: {self.name}@{digest} reads back other than it was written.")
        return True

    def _write_manifest(self, reference: str, data: bytes, media_type: str) -> None:
        url = f"{self._root}/manifests/{reference}"
        answer = self._send("PUT", url, headers={"Content-Type": media_type}, body=data)
        self._content(answer, "PUT", url, 201)

    def _set_tag(self, tag: str, model: bytes, force: bool) -> bool:
        digest = sha256_bytes(model)
        old = self._find(tag)
        if old and old.digest == digest:
            return False
        if old:
            check_move(f"{self.location}: {self.name}", tag, old.digest, digest, force=force)
        self._write_manifest(tag, model, MANIFEST_TYPE)
        found = self._find(tag)
        if found is None or found.digest != digest:
            raise AssayError(
                f"{self.location}: {self.name}:{tag} was set to {digest} and is now {found.digest if found else 'gone'}: somebody "
                "else published at the same moment. The artifact is there by its digest."
            )
        return True

    # Referrers.  Where the server has no call for them: an index under a tag made of the subject's digest.

    def _referrers(self, digest: str) -> tuple[list[Entry], bool]:
        """Who refers to a manifest, and whether the server has the call that tells."""
        url: str | None = f"{self._root}/referrers/{digest}"
        entries: list[Entry] = []
        for _ in range(_MAX_PAGES):
            answer = self._send("GET", url, headers={"Accept": INDEX_TYPE})
            if answer.status in (404, 405):
                data = self._get_manifest(digest.replace(":", "-"), INDEX_TYPE)
                index = parse_index(data, f"{self.location}: referrers of {digest}") if data else Index()
                return list(index.entries), False
            entries += parse_index(self._content(answer, "GET", url), f"{self.location}: referrers").entries
            if (url := _next_page(answer)) is None:
                break
        return entries, True

    def _list_referrers(self, digest: str, attached: Sequence[Descriptor]) -> None:
        """See to it that all of these are listed.

        Without the call, whoever read the index before we wrote it may overwrite what we wrote; others need about as
        long for that as we do, so that it shows a little later, and is done again.
        """
        for _ in range(_ROUNDS):
            started = time.monotonic()
            entries, has_call = self._referrers(digest)
            listed = {entry.descriptor.digest for entry in entries}
            missing = [found for found in attached if found.digest not in listed]
            if not missing:
                return
            if not has_call:
                grown = Index((*entries, *(Entry(found.to_json(), found) for found in missing)))
                self._write_manifest(digest.replace(":", "-"), grown.to_bytes(), INDEX_TYPE)
            time.sleep(min(2.0, (time.monotonic() - started) * random.uniform(2, 4)))
        raise AssayError(
            f"{self.location}: {self.name}@{digest} is there, but the server keeps losing what refers to it "
            f"({', '.join(found.digest for found in attached)}). Run the same command again."
        )


def list_pages(transport: Transport, url: str, key: str, scope: str) -> list[str] | None:
    """All texts of a paged list; None when the server has no such list."""
    found: list[str] = []
    page: str | None = f"{url}?n={_PAGE}"
    for _ in range(_MAX_PAGES):
        answer = transport.send("GET", page, scope)
        if answer.status in (404, 405):
            return found or None
        if answer.status != 200:
            raise AssayError(transport.failure("GET", page, answer))
        values = parse_json(answer.body, f"{transport.name}: {key}").get(key)
        if values is None:  # as some servers write a list with nothing in it
            values = []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in cast("list[object]", values)):
            raise IntegrityError(f"{transport.name}: {key} is not a list of names.")
        found += cast("list[str]", values)
        if (page := _next_page(answer)) is None:
            return found
    raise AssayError(f"{transport.name}: more than {_MAX_PAGES} pages of {key}.")


def _next_page(answer: Answer) -> str | None:
    """The path of the next page; a host that the server names in it is not followed."""
    found = _NEXT.search(answer.headers.get("link", ""))
    if not found:
        return None
    parts = urlsplit(found[1])
    return f"{parts.path}?{parts.query}"


def _content_of(part: Part) -> Iterator[bytes]:
    if isinstance(part.content, bytes):
        yield part.content
        return
    left = part.descriptor.size
    with open_regular(part.content) as stream:
        while left:
            chunk = stream.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise IntegrityError(f"{part.content}: it must not change while it is published. Publish it again.")
            left -= len(chunk)
            yield chunk


def _digest_of(part: Part) -> str:
    return sha256_bytes(part.content) if isinstance(part.content, bytes) else sha256_file(part.content)
