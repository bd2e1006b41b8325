import pytest
import torch

from assay.targets.words import pack_words, unpack_words


def test_golden_words() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert pack_words(codes, 4).tolist() == [[0x76543210, 0xFEDCBA98 - (1 << 32)]]
    assert pack_words(codes[:, :4], 8).tolist() == [[0x03020100]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (2, 9), (4, 16)])
def test_words_give_back_the_codes_and_are_padded_with_zeros(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_words(codes, bits)
    per_word = 32 // bits
    assert words.shape == (shape[0], -(-shape[1] // per_word))
    assert torch.equal(unpack_words(words, bits, shape[1]), codes)
    padding = unpack_words(words, bits, words.shape[1] * per_word)[:, shape[1] :]
    assert not padding.any()
    transposed = pack_words(codes.T, bits)
    assert torch.equal(unpack_words(transposed, bits, shape[0]), codes.T)
