"""The header of a GGUF file, read with the standard library alone: what the model is, and whether the file is whole.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian; block sizes from its type table.
Left out on purpose: the values of arrays (only their lengths are kept), the weights themselves, big-endian files.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from assay.errors import IntegrityError, NotSupportedError, UsageError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Far above any real model, and low enough that a hostile file costs neither much time nor much memory.
MAX_HEADER_BYTES = 1 << 27
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = (1 << 16) - 1
MAX_DIMENSIONS = 4

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
# ggml type id → name, weights per block, bytes per block.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies and how it is stored."""

    name: str
    shape: tuple[int, ...]  # as torch counts: rows first. The file holds the reverse.
    type_id: int
    offset: int  # bytes from the start of the data section
    size_bytes: int

    @property
    def type_name(self) -> str:
        """ggml's name for how the values are stored: F32, Q4_1, …"""
        return GGML_TYPES[self.type_id][0]


@dataclass(frozen=True)
class GgufHeader:
    """Everything in a GGUF file before its weights, but for the contents of arrays."""

    version: int
    metadata: dict[str, int | float | str | bool]
    array_lengths: dict[str, int]
    tensors: tuple[GgufTensor, ...]
    alignment: int
    data_offset: int  # bytes from the start of the file


def read_gguf_header(path: Path) -> GgufHeader:
    """Read a GGUF file's header and check that every tensor lies within the file.

    Raises UsageError when it is no GGUF file, NotSupportedError for a version or type that is not known here, and
    IntegrityError when it is cut short or contradicts itself.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such file. Name a file that ends in .gguf.")
        with path.open("rb") as stream:
            return _read_stream(path, stream)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_stream(path: Path, stream: BinaryIO) -> GgufHeader:
    if (first_bytes := stream.read(len(MAGIC))) != MAGIC:
        lfs = (
            " It looks like a Git LFS pointer: get the real file with `git lfs pull`." if first_bytes == b"vers" else ""
        )
        raise UsageError(f"{path}: not a GGUF file: it does not begin with the bytes GGUF.{lfs}")
    file_size = os.fstat(stream.fileno()).st_size
    with mmap.mmap(stream.fileno(), min(file_size, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as buffer:
        header = _parse(_Cursor(path, buffer, len(MAGIC), file_size))
    for tensor in header.tensors:
        end = header.data_offset + tensor.offset + tensor.size_bytes
        if end > file_size:
            raise IntegrityError(
                f"{path}: cut short: the tensor {tensor.name!r} ends at byte {end:,}, the file at byte {file_size:,}. "
                "Download it again."
            )
    return header


@dataclass
class _Cursor:
    """A place in the header; every step is checked against the end of the file."""

    path: Path
    buffer: mmap.mmap
    position: int
    file_size: int

    def number(self, layout: struct.Struct) -> Any:
        start = self.position
        self.skip(layout.size)
        return layout.unpack_from(self.buffer, start)[0]

    def string(self, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.number(_U64)
        start = self.position
        if length > max_bytes:
            raise self.damaged(f"the string at byte {start:,} claims to be {length:,} bytes long")
        self.skip(length)
        try:
            return self.buffer[start : self.position].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"the string at byte {start:,} is not UTF-8") from error

    def skip(self, size: int) -> None:
        if size > len(self.buffer) - self.position:
            raise self.ends_early()
        self.position += size

    def skip_strings(self, count: int) -> None:
        # A vocabulary has 10⁵ of them: this loop is most of the time that reading takes.
        position, last, length_at = self.position, len(self.buffer) - _U64.size, _U64.unpack_from
        for _ in range(count):
            if position > last:
                raise self.ends_early()
            position += 8 + length_at(self.buffer, position)[0]
        self.skip(position - self.position)

    def ends_early(self) -> IntegrityError:
        if self.file_size > len(self.buffer):
            return self.damaged(f"its header does not end within {MAX_HEADER_BYTES >> 20} MiB")
        return IntegrityError(f"{self.path}: cut short: it ends within its header. Download it again.")

    def damaged(self, what: str) -> IntegrityError:
        return IntegrityError(f"{self.path}: damaged: {what}. Download it again.")


def _parse(cursor: _Cursor) -> GgufHeader:
    version = cursor.number(_U32)
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        kind = "a big-endian file" if swapped else f"GGUF version {version}"
        raise NotSupportedError(
            f"{cursor.path}: {kind} cannot be read; versions 2 and 3, little-endian, can. Convert it with llama.cpp."
        )
    tensor_count, key_count = cursor.number(_U64), cursor.number(_U64)
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise cursor.damaged(f"it claims to hold {tensor_count:,} tensors and {key_count:,} metadata keys")
    metadata: dict[str, int | float | str | bool] = {}
    array_lengths: dict[str, int] = {}
    for _ in range(key_count):
        key = cursor.string(MAX_NAME_BYTES)
        if key in metadata or key in array_lengths:
            raise cursor.damaged(f"the metadata key {key!r} is there twice")
        kind = cursor.number(_U32)
        if kind == _ARRAY:
            array_lengths[key] = _skip_array(cursor, key)
        else:
            metadata[key] = _scalar(cursor, key, kind)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, not a power of two")
    tensors: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        tensor = _tensor(cursor, alignment)
        if tensor.name in tensors:
            raise cursor.damaged(f"the tensor {tensor.name!r} is there twice")
        tensors[tensor.name] = tensor
    data_offset = -(-cursor.position // alignment) * alignment
    return GgufHeader(version, metadata, array_lengths, tuple(tensors.values()), alignment, data_offset)


def _scalar(cursor: _Cursor, key: str, kind: int) -> int | float | str | bool:
    if kind == _STRING:
        return cursor.string()
    if (layout := _SCALARS.get(kind)) is None:
        raise cursor.damaged(f"the metadata key {key!r} has the unknown type {kind}")
    return cursor.number(layout)


def _skip_array(cursor: _Cursor, key: str) -> int:
    """Step over an array and return how many elements it has."""
    kind, count = cursor.number(_U32), cursor.number(_U64)
    if kind == _STRING:
        cursor.skip_strings(count)
    elif (layout := _SCALARS.get(kind)) is not None:
        cursor.skip(count * layout.size)
    else:
        raise cursor.damaged(f"the metadata array {key!r} has elements of the unknown type {kind}")
    return count


def _tensor(cursor: _Cursor, alignment: int) -> GgufTensor:
    name, dimensions = cursor.string(MAX_NAME_BYTES), cursor.number(_U32)
    if dimensions > MAX_DIMENSIONS:
        raise cursor.damaged(f"the tensor {name!r} has {dimensions} dimensions; {MAX_DIMENSIONS} is the most")
    innermost_first = [cursor.number(_U64) for _ in range(dimensions)]
    type_id, offset = cursor.number(_U32), cursor.number(_U64)
    if type_id not in GGML_TYPES:
        raise NotSupportedError(
            f"{cursor.path}: the tensor {name!r} is stored as ggml type {type_id}, which is not known here. "
            "Use a file in F16, BF16, Q8_0 or Q4_1."
        )
    type_name, block_weights, block_bytes = GGML_TYPES[type_id]
    row_weights = innermost_first[0] if innermost_first else 1
    if row_weights % block_weights:
        raise cursor.damaged(f"the tensor {name!r} has rows of {row_weights} weights, not whole {type_name} blocks")
    if offset % alignment:
        raise cursor.damaged(f"the tensor {name!r} begins at {offset}, which is not a multiple of {alignment}")
    size_bytes = math.prod(innermost_first) // block_weights * block_bytes
    return GgufTensor(name, tuple(reversed(innermost_first)), type_id, offset, size_bytes)
