import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from assay.quantize.packing import pack, unpack


def codes_of(rows: int, columns: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def test_golden_bytes() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 8, 7]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[0x21, 0x43], [0x0F, 0x78]]
    assert pack(codes, 8).tolist() == codes.tolist()


def test_an_odd_last_column_shares_its_byte_with_a_zero() -> None:
    assert pack(torch.tensor([[1, 2, 13]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0D]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 2, 7, 32, 33])
def test_unpacking_undoes_packing(bits: int, columns: int) -> None:
    codes = codes_of(3, columns, bits)
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_leaves_out_padding(bits: int) -> None:
    codes = codes_of(3, 5, bits)
    padded = torch.nn.functional.pad(pack(codes, bits), (0, 3))
    assert torch.equal(unpack(padded, bits, 5), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 64, 256])
def test_as_int32_the_bytes_are_those_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = codes_of(5, columns, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    ours = pack(codes, bits).view(torch.int32)
    assert torch.equal(ours, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(ours, bits, torch.Size(codes.shape)), signed)
