from __future__ import annotations

import io

import pytest

from assay.errors import IntegrityError
from assay.files import CHUNK_BYTES, sha256_bytes
from assay.registry.oci import Descriptor, Manifest, copy_verified, describe, parse_json, parse_manifest


def test_a_manifest_reads_back_as_it_was_written() -> None:
    blob = Descriptor("text/plain", sha256_bytes(b"x"), 1, {"title": "x"}, "some/type")
    manifest = Manifest("some/type", describe(b"{}", "text/json"), (blob, blob), {"key": "text"}, subject=blob)
    assert parse_manifest(manifest.to_bytes(), "here") == manifest


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_exactly_what_was_promised_is_copied(size: int) -> None:
    data = bytes(size)
    sink = io.BytesIO()
    copy_verified(io.BytesIO(data), sink, describe(data, "x/y"), "here")
    assert sink.getvalue() == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"promise", "ends 1 bytes short of the 8"),
        (b"promisedX", "longer than the 8 bytes"),
        (b"Promised", "promised was"),
    ],
)
def test_anything_else_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(IntegrityError, match=f"here: .*{message}"):
        copy_verified(io.BytesIO(data), None, describe(b"promised", "x/y"), "here")


def test_a_stream_without_end_is_read_to_one_byte_more_than_promised() -> None:
    stream = io.BytesIO(bytes(10_000_000))
    with pytest.raises(IntegrityError, match="longer than"):
        copy_verified(stream, None, describe(b"promised", "x/y"), "here")
    assert stream.tell() == 9


def test_json_that_readers_could_take_differently_is_refused() -> None:
    assert parse_json(b'{"a":{"b":1}}', "here") == {"a": {"b": 1}}
    with pytest.raises(IntegrityError, match="a key is repeated"):
        parse_json(b'{"a":{"b":1,"b":2}}', "here")
    with pytest.raises(IntegrityError, match="NaN is not JSON"):
        parse_json(b'{"a":NaN}', "here")
    with pytest.raises(IntegrityError, match="not a JSON object"):
        parse_json(b"[]", "here")
    with pytest.raises(IntegrityError, match="at most 5 are read"):
        parse_json(b'{"a":1}', "here", limit_bytes=5)
