"""A registry in a bucket: an OCI image layout below a prefix of S3, or of a store that speaks its protocol.

Sources: Amazon S3 API reference (conditional writes, multipart uploads, checksums); OCI image-layout.md 1.1.
The index is one object that is replaced by compare-and-swap (If-Match), so that many publishers at once lose nothing
and a copy of the prefix (`aws s3 sync`) is a registry in a directory.  A store that takes a write against its condition
is refused.  Blobs are written once (If-None-Match), checked against the digest before the last request of an upload,
and checked again by whoever reads them: an ETag says which version an object is, never that its bytes are right.
Credentials, region, endpoint and the number of retries are what boto3 finds in environment and configuration.

Left out on purpose: deleting; uploads that go on after a process died (they start again).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from assay.errors import (
    AccessDeniedError,
    AssayError,
    IntegrityError,
    NotSupportedError,
    UnreachableError,
    UsageError,
)
from assay.files import CHUNK_BYTES, canonical_json, open_regular
from assay.registry.base import Part
from assay.registry.index import MAX_INDEX_BYTES, Index, parse_index
from assay.registry.indexed import IndexedRegistry, SharedIndexRepository
from assay.registry.oci import Descriptor, parse_json
from assay.registry.reference import parse_address
from assay.registry.stream import Rest, ResumingStream, read_whole, step_aside

STREAMS: Final = 4
# A blob up to this long is one request; a longer one goes up in parts of it, or larger where it would take too many.
PART_BYTES = 16 << 20
_MAX_PARTS: Final = 10_000
_MAX_BLOB_BYTES: Final = 5 << 40
_ROUNDS: Final = 40
# No upload takes so long: its publisher was killed, and its parts are paid for.
_ABANDONED_AFTER: Final = timedelta(days=7)
_LAYOUT = "oci-layout"
_INDEX = "index.json"
_BLOBS = "blobs/sha256/"
_LAYOUT_JSON = canonical_json({"imageLayoutVersion": "1.0.0"})
# What no object has.
_NO_ETAG = f'"{"0" * 32}"'
_PREFIX = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_UNCHANGED = frozenset({"304", "NotModified"})
_LOST = frozenset({"PreconditionFailed", "412"})
_CONFLICT = frozenset({"ConditionalRequestConflict", "OperationAborted", "409"})
_ABSENT = frozenset({"NoSuchKey", "404"})
_IGNORED = frozenset({"NotImplemented", "501"})
_DENIED = frozenset(
    {
        "403",
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
# What was asked again by the library, and often enough.
_LATER = frozenset({"500", "502", "503", "504", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"})
_ELSEWHERE = frozenset(
    {"301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
)


@dataclass(frozen=True)
class _Held:
    """An object that is there.  sha256: base64, of the whole object, where the store states it."""

    size: int
    etag: str
    sha256: str | None


class S3Registry(IndexedRegistry):
    """s3://BUCKET[/PREFIX]"""

    def __init__(self, address: Path | str) -> None:
        place = parse_address(address).place
        self.location = f"s3://{place}"
        self._bucket, _, prefix = place.partition("/")
        if prefix and not (_PREFIX.fullmatch(prefix) and not {".", ".."} & set(prefix.split("/"))):
            raise UsageError(
                f"{self.location}: {prefix!r} cannot be a prefix; allowed: A-Z a-z 0-9 . _ - and / between."
            )
        self._prefix = f"{prefix}/" if prefix else ""
        self._parsed: tuple[str, Index] | None = None
        boto3 = _import_boto3()
        with self._explained():
            config = import_module("botocore.config").Config(user_agent_extra="assay", max_pool_connections=2 * STREAMS)
            self._client = boto3.client("s3", config=config)

    @classmethod
    def open(cls, address: Path | str) -> S3Registry:
        """The registry below a prefix, to read; UsageError when there is none."""
        registry = cls(address)
        if not registry._has_layout():
            raise UsageError(f"{registry.location}: there is no registry here (no {_LAYOUT}). Publish something first.")
        return registry

    @classmethod
    def create(cls, address: Path | str) -> S3Registry:
        """The registry below a prefix, to write; made where nothing else is.

        NotSupportedError when the store does not keep to conditions: publishers would overwrite each other unnoticed.
        """
        registry = cls(address)
        if not registry._has_layout():
            registry._refuse_strangers()
            # The layout comes last: with it, everything else is there.
            registry._write(_INDEX, Index().to_bytes(), {"IfNoneMatch": "*"})
            registry._write(_LAYOUT, _LAYOUT_JSON, {"IfNoneMatch": "*"})
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": _NO_ETAG}):
            # Nothing is lost where it is taken: the bytes are those that are there.
            if registry._write(_LAYOUT, _LAYOUT_JSON, condition):
                raise registry._not_conditional()
        registry._sweep()
        return registry

    @classmethod
    def check(cls, address: Path | str) -> None:
        """Ask for the bucket and what is there; whether we may write shows when we do."""
        registry = cls(address)
        if not registry._has_layout():
            registry._refuse_strangers()

    # Reading

    def repository(self, name: str) -> S3Repository:
        """The models of one NAME; they share the blobs of the whole prefix."""
        return S3Repository(self, name)

    def index(self) -> Index:
        """What is published, as of now."""
        return self._index()[1]

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> BinaryIO:
        """A blob's bytes, not verified but for their number."""
        stream = ResumingStream(
            lambda position: self._rest(descriptor, position),
            descriptor.size,
            self.blob_address(descriptor),
            _broken(),
            offset,
        )
        return cast("BinaryIO", io.BufferedReader(stream, CHUNK_BYTES))

    def blob_address(self, descriptor: Descriptor) -> str:
        """Where a blob lies."""
        return f"s3://{self._bucket}/{self._prefix}{_blob(descriptor)}"

    # Writing

    def put(self, part: Part) -> bool:
        """Store a blob; True when bytes were written, False when they were there already."""
        descriptor = part.descriptor
        if descriptor.size > _MAX_BLOB_BYTES:
            raise NotSupportedError(f"{part.content}: an object on S3 has at most {_MAX_BLOB_BYTES} bytes.")
        for attempt in range(1, _ROUNDS):
            held = self._head(_blob(descriptor))
            if held and self._is_whole(descriptor, held):
                return False
            if self._upload(part, {"IfMatch": held.etag} if held else {"IfNoneMatch": "*"}):
                return True
            step_aside(attempt)
        raise AssayError(f"{self.blob_address(descriptor)}: others write this blob again and again; try again later.")

    def change(self, decide: Callable[[Index], Index]) -> None:
        """Replace the index by what `decide` makes of it, in one step; what it raises leaves everything as it was.

        Asked again with the index as it is then when somebody else was faster.
        """
        tried: Index | None = None
        for attempt in range(1, _ROUNDS):
            etag, before = self._index()
            if before == tried:
                return  # only the answer was lost
            tried = decide(before)
            if tried == before:
                return
            data = tried.to_bytes()
            if len(data) > MAX_INDEX_BYTES:
                raise AssayError(
                    f"{self.location}: its index would exceed {MAX_INDEX_BYTES} bytes. Start another registry."
                )
            if self._write(_INDEX, data, {"IfMatch": etag}):
                return
            step_aside(attempt)
        raise AssayError(f"{self.location}: others change its index again and again; run the same command again.")

    # The pieces

    def _has_layout(self) -> bool:
        data = self._read(_LAYOUT)
        if data is None:
            return False
        where = f"{self.location}/{_LAYOUT}"
        if parse_json(data[1], where).get("imageLayoutVersion") != "1.0.0":
            raise IntegrityError(f"{where}: not an OCI image layout of version 1.0.0.")
        return True

    def _refuse_strangers(self) -> None:
        """UsageError when something else lies here.  What a killed writer left is ours, and what another makes just now."""
        with self._explained():
            found = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1000)
        keys = [str(entry["Key"]).removeprefix(self._prefix) for entry in found.get("Contents", ())]
        if any(key and key not in (_INDEX, _LAYOUT) and not key.startswith(_BLOBS) for key in keys):
            raise UsageError(f"{self.location}: not a registry, and not empty. Choose a new prefix for it.")

    def _not_conditional(self) -> AssayError:
        return NotSupportedError(
            f"{self.location}: this store takes a write whose condition (If-None-Match, If-Match) is not met, so that two "
            "publishers could overwrite each other unnoticed. Nothing was published. Use a store that keeps to conditions, "
            "as Amazon S3 does, or a registry in a directory."
        )

    def _index(self) -> tuple[str, Index]:
        """The index, and which version of it this is."""
        known = self._parsed
        where = f"{self.location}/{_INDEX}"
        found = self._read(_INDEX, unless=known[0] if known else None)
        if found is None:
            raise IntegrityError(f"{where}: it is missing. This registry is damaged.")
        if known and found[0] == known[0]:
            return known
        self._parsed = (found[0], parse_index(found[1], where))
        return self._parsed

    def _read(self, key: str, unless: str | None = None) -> tuple[str, bytes] | None:
        """The ETag and the bytes of a small object; no bytes when it is still the version `unless`; None when there is none."""
        etag = ""

        def connect(_: int) -> Rest:
            nonlocal etag
            condition = {"IfNoneMatch": unless} if unless else {}
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **condition)
            except _library_error() as error:
                # The library has asked again by itself: only an answer that breaks off is asked for again here.
                raise _explain_library(self.location, error) from error
            etag = str(answer["ETag"])
            return _rest_in(answer["Body"])

        with self._explained():
            try:
                data = read_whole(connect, MAX_INDEX_BYTES, f"{self.location}/{key}", _broken())
            except _client_error() as error:
                if unless and _code(error) in _UNCHANGED:
                    return unless, b""
                if _code(error) in _ABSENT:
                    return None
                raise
        return etag, data

    def _write(self, key: str, data: bytes, condition: dict[str, str]) -> bool:
        """Write a small object; False when the condition is not met."""
        return self._conditional(
            self._client.put_object,
            Key=self._prefix + key,
            Body=data,
            ChecksumSHA256=_base64(hashlib.sha256(data).digest()),
            **condition,
        )

    def _conditional(self, send: Any, **arguments: Any) -> bool:
        """Send a write with a condition; False when the condition is not met or another write was under way."""
        with self._explained():
            try:
                send(Bucket=self._bucket, **arguments)
            except _client_error() as error:
                if _code(error) in _LOST | _CONFLICT:
                    return False
                # The object that If-Match speaks of is gone.
                if "IfMatch" in arguments and _code(error) in _ABSENT:
                    return False
                if _code(error) in _IGNORED:
                    raise self._not_conditional() from error
                raise
        return True

    def _head(self, key: str) -> _Held | None:
        with self._explained():
            try:
                answer = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key, ChecksumMode="ENABLED")
            except _client_error() as error:
                if _code(error) in _ABSENT:
                    return None
                raise
        checksum = answer.get("ChecksumSHA256")
        whole = checksum if checksum and "-" not in checksum else None
        return _Held(int(answer["ContentLength"]), str(answer["ETag"]), whole)

    def _is_whole(self, descriptor: Descriptor, held: _Held) -> bool:
        """Whether an object is this blob: by its size and what the store calculated of it, and else by reading it.

        One that went up in parts has no digest of the whole, and is not read again: its size must do here.
        """
        if held.size != descriptor.size or held.size > PART_BYTES:
            return held.size == descriptor.size
        if held.sha256:
            return held.sha256 == _base64(bytes.fromhex(descriptor.digest.removeprefix("sha256:")))
        with contextlib.suppress(IntegrityError):
            self.repository("any").copy_blob(descriptor, None)
            return True
        return False

    def _upload(self, part: Part, condition: dict[str, str]) -> bool:
        """Store a blob that is not there; False when somebody else did so meanwhile."""
        descriptor = part.descriptor
        pieces = _read_parts(part)
        if descriptor.size > PART_BYTES:
            return self._upload_parts(descriptor, pieces, condition)
        return self._write(_blob(descriptor), b"".join(pieces), condition)

    def _upload_parts(self, descriptor: Descriptor, pieces: Iterator[bytes], condition: dict[str, str]) -> bool:
        """Send parts, a few at once, then make them an object; what goes wrong before that leaves none."""
        place = {"Bucket": self._bucket, "Key": self._prefix + _blob(descriptor)}
        with self._explained():
            begun = self._client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")
            place["UploadId"] = begun["UploadId"]
            try:
                parts = self._send_parts(place, pieces)
                return self._conditional(
                    self._client.complete_multipart_upload,
                    Key=place["Key"],
                    UploadId=place["UploadId"],
                    MultipartUpload={"Parts": parts},
                    **condition,
                ) or self._give_up(place)
            except BaseException:
                self._give_up(place)
                raise

    def _send_parts(self, place: dict[str, Any], pieces: Iterator[bytes]) -> list[dict[str, Any]]:
        def send(number: int, data: bytes) -> dict[str, Any]:
            checksum = _base64(hashlib.sha256(data).digest())
            answer = self._client.upload_part(**place, PartNumber=number, Body=data, ChecksumSHA256=checksum)
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

        done: list[dict[str, Any]] = []
        flying: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(STREAMS) as pool:
            for number, data in enumerate(pieces, 1):
                # No more parts in memory than are on their way.
                if len(flying) == STREAMS:
                    done.append(flying.popleft().result())
                flying.append(pool.submit(send, number, data))
            return done + [future.result() for future in flying]

    def _give_up(self, place: dict[str, Any]) -> bool:
        """Let the store forget the parts; when that fails, too, a later sweep does it."""
        with contextlib.suppress(_client_error(), _library_error()):
            self._client.abort_multipart_upload(**place)
        return False

    def _sweep(self) -> None:
        """Let the store forget the parts that killed publishers left a week ago, where we may."""
        with contextlib.suppress(_client_error(), _library_error()):
            found = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._prefix + _BLOBS)
            for upload in found.get("Uploads", ()):
                if datetime.now(UTC) - upload["Initiated"] > _ABANDONED_AFTER:
                    self._give_up({"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})

    def _rest(self, descriptor: Descriptor, position: int) -> Rest:
        """A blob from a byte on.  The request is sent now, so that what is missing shows now."""
        key = self._prefix + _blob(descriptor)
        with self._explained():
            try:
                wanted = {"Range": f"bytes={position}-"} if position else {}
                answer = self._client.get_object(Bucket=self._bucket, Key=key, **wanted)
            except _client_error() as error:
                if _code(error) in _ABSENT | {"InvalidRange", "416"}:
                    raise IntegrityError(
                        f"{self.blob_address(descriptor)}: this blob is missing or shorter than the {descriptor.size} bytes "
                        "promised. Publish the artifact again to mend the registry."
                    ) from error
                raise
        begins = str(answer.get("ContentRange", "bytes 0-")).removeprefix("bytes ").partition("-")[0]
        return _rest_in(answer["Body"], int(begins) if begins.isdigit() else position)

    @contextlib.contextmanager
    def _explained(self) -> Generator[None]:
        """Turn what the library raises into what a person can act on."""
        try:
            yield
        except _client_error() as error:
            raise self._explain(_code(error), error) from error
        except _library_error() as error:
            raise _explain_library(self.location, error) from error

    def _explain(self, code: str, error: Any) -> AssayError:
        details = error.response.get("Error", {})
        operation, message = error.operation_name, str(details.get("Message", "")).strip()[:200]
        said = f"{operation} was answered with {code}: {message}"
        if code == "NoSuchBucket":
            return UsageError(f"{self.location}: there is no bucket {self._bucket!r}. Make it first, or name another.")
        if code == "RequestTimeTooSkewed":
            now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
            return AssayError(
                f"{self.location}: this machine's clock ({now} UTC) is more than 15 minutes off the store's, which refuses its "
                "signatures. Set the clock (NTP) and run the same command again."
            )
        if code in _DENIED:
            return AccessDeniedError(
                f"{self.location}: access denied ({said}). Needed are s3:ListBucket on the bucket and s3:GetObject, to publish also "
                "s3:PutObject and s3:AbortMultipartUpload on what is below the prefix; `aws sts get-caller-identity` shows who you are."
            )
        if code in _ELSEWHERE:
            return UsageError(f"{self.location}: the bucket is in another region ({said}). Set AWS_REGION to it.")
        if code in _LATER:
            return UnreachableError(f"{self.location}: {said} The same command may work later.")
        return AssayError(f"{self.location}: {said}")


class S3Repository(SharedIndexRepository):
    """One NAME below a prefix."""

    streams = STREAMS

    def __init__(self, registry: S3Registry, name: str) -> None:
        super().__init__(registry, name)
        self._registry = registry

    def open_blob(self, descriptor: Descriptor, offset: int = 0) -> BinaryIO:
        return self._registry.open_blob(descriptor, offset)

    def where(self, descriptor: Descriptor) -> str:
        return self._registry.blob_address(descriptor)

    def put(self, part: Part) -> bool:
        return self._registry.put(part)


def _read_parts(part: Part) -> Iterator[bytes]:
    """The content in pieces as long as the parts of an upload; IntegrityError at the end unless it is what was promised.

    Each piece is held back until the next one is read, so that the last is given out only after the check.
    """
    descriptor = part.descriptor
    size = max(PART_BYTES, -(-descriptor.size // _MAX_PARTS))
    digest, count, held = hashlib.sha256(), 0, b""
    with contextlib.ExitStack() as stack:
        content = part.content
        stream = io.BytesIO(content) if isinstance(content, bytes) else stack.enter_context(open_regular(content))
        while piece := stream.read(size):
            digest.update(piece)
            count += len(piece)
            if count > descriptor.size:
                break
            if held:
                yield held
            held = piece
    if (count, f"sha256:{digest.hexdigest()}") != (descriptor.size, descriptor.digest):
        where = "the bytes to store" if isinstance(part.content, bytes) else part.content
        raise IntegrityError(f"{where}: it must not change while it is published; publish it again.")
    yield held


def _rest_in(body: Any, begins: int = 0) -> Rest:
    """The body of an answer, in pieces."""
    return Rest(iter(lambda: cast("bytes", body.read(CHUNK_BYTES)), b""), body.close, begins)


def _blob(descriptor: Descriptor) -> str:
    return _BLOBS + descriptor.digest.removeprefix("sha256:")


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


# The library, imported when it is needed


def _import_boto3() -> Any:
    try:
        return import_module("boto3")
    except ImportError as error:
        raise UsageError("s3:// needs the package boto3, which is not installed: pip install 'assay[s3]'.") from error


def _client_error() -> Any:
    """What an answer that says no is raised as."""
    return import_module("botocore.exceptions").ClientError


def _library_error() -> Any:
    """What the library raises for everything that is not an answer."""
    return import_module("botocore.exceptions").BotoCoreError


def _broken() -> tuple[type[Exception], ...]:
    """What a connection that broke is raised as."""
    errors: Any = import_module("botocore.exceptions")
    return (errors.ConnectionError, errors.HTTPClientError, errors.IncompleteReadError, OSError)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _explain_library(location: str, error: Exception) -> AssayError:
    errors: Any = import_module("botocore.exceptions")
    if isinstance(error, (errors.NoCredentialsError, errors.PartialCredentialsError, errors.CredentialRetrievalError)):
        return AccessDeniedError(
            f"{location}: no credentials that can be used ({error}). Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
            "or log in (aws sso login)."
        )
    if isinstance(error, (errors.ConnectionError, errors.HTTPClientError)):
        return UnreachableError(f"{location}: the store does not answer ({error}). The same command may work later.")
    return UsageError(f"{location}: {error}")
