"""A checkpoint gives exactly the stored numbers, or says which file or tensor is wrong."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from assay.errors import AssayError, IntegrityError, NotSupportedError, UsageError
from assay.models.checkpoint import INDEX, SINGLE, Checkpoint
from assay.models.decoder import Decoder

DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny tied Llama that a test may change."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


@pytest.fixture
def sharded(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny untied Qwen3 in several files."""
    source = tiny_model("qwen3")
    directory = shutil.copytree(source, tmp_path / "sharded")
    (directory / SINGLE).unlink()
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 2
    return directory


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of model.safetensors; None removes one."""
    tensors = load_file(directory / SINGLE) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / SINGLE)


def test_a_single_file_gives_the_stored_numbers(model: Path) -> None:
    checkpoint = Checkpoint(model)
    stored = load_file(model / SINGLE)
    assert set(checkpoint.files) == set(stored)
    assert checkpoint.weight_dtype is torch.bfloat16
    for linear in checkpoint.shape.linears[:-1]:
        weight = checkpoint.weight(linear.name)
        assert weight.dtype is torch.float32
        assert torch.equal(weight, stored[f"{linear.name}.weight"].float())
    assert torch.equal(checkpoint.stored(DOWN), stored[DOWN])
    assert checkpoint.stored(DOWN).dtype is torch.bfloat16


def test_shards_give_the_same_numbers_as_one_file(sharded: Path, tiny_model: Callable[[str], Path]) -> None:
    whole, parts = Checkpoint(tiny_model("qwen3")), Checkpoint(sharded)
    assert set(whole.files) == set(parts.files)
    assert len(set(parts.files.values())) > 2
    for name in whole.files:
        assert torch.equal(whole.stored(name), parts.stored(name))


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float16, torch.float16), (torch.float32, torch.float32), (torch.float64, torch.float32)],
)
def test_the_dtype_is_the_embeddings(model: Path, stored: torch.dtype, expected: torch.dtype) -> None:
    change_tensors(model, {EMBEDDING: load_file(model / SINGLE)[EMBEDDING].to(stored)})
    checkpoint = Checkpoint(model)
    assert checkpoint.weight_dtype is expected
    assert checkpoint.weight("model.embed_tokens").dtype is torch.float32


def test_a_tied_head_is_the_embedding(model: Path) -> None:
    checkpoint = Checkpoint(model)
    assert "lm_head.weight" not in checkpoint.files
    assert torch.equal(checkpoint.weight("lm_head"), checkpoint.weight("model.embed_tokens"))


def test_a_head_of_its_own_is_read(tiny_model: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_model("mistral"))
    assert torch.equal(checkpoint.weight("lm_head"), checkpoint.stored("lm_head.weight").float())
    assert not torch.equal(checkpoint.weight("lm_head"), checkpoint.weight("model.embed_tokens"))


def test_an_untied_head_is_never_taken_from_the_embedding(model: Path) -> None:
    change_config(model, tie_word_embeddings=False)
    with pytest.raises(IntegrityError, match=r"the tensor lm_head\.weight is missing"):
        Checkpoint(model).weight("lm_head")


def test_with_both_forms_there_the_single_file_counts_as_in_transformers(sharded: Path) -> None:
    tensors = {name: Checkpoint(sharded).stored(name) * 2 for name in Checkpoint(sharded).files}
    save_file(tensors, sharded / SINGLE, metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    assert torch.equal(theirs[DOWN], tensors[DOWN])
    assert torch.equal(Checkpoint(sharded).stored(DOWN), tensors[DOWN])


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(IntegrityError, match=re.escape(f"{shard}: named by {INDEX} but not there")):
        _ = Checkpoint(sharded).files


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    place = index["weight_map"][DOWN]
    index["weight_map"][DOWN] = next(file for file in index["weight_map"].values() if file != place)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=f"lacks the tensor {re.escape(DOWN)}, which {INDEX} places there"):
        Checkpoint(sharded).weight(DOWN.removesuffix(".weight"))


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 7}}',
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
    ],
)
def test_a_damaged_index_is_an_integrity_error(model: Path, index: str) -> None:
    (model / SINGLE).unlink()
    (model / INDEX).write_text(index)
    with pytest.raises(IntegrityError, match=re.escape(str(model))):
        _ = Checkpoint(model).files


def test_a_missing_tensor_is_named(model: Path) -> None:
    change_tensors(model, {DOWN: None})
    with pytest.raises(IntegrityError, match=f"the tensor {re.escape(DOWN)} is missing from the checkpoint"):
        Checkpoint(model).weight("model.layers.1.mlp.down_proj")


def test_a_cut_file_is_refused_wherever_it_is_cut(model: Path) -> None:
    whole = (model / SINGLE).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for cut in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        (model / SINGLE).write_bytes(whole[:cut])
        with pytest.raises(
            IntegrityError, match=r"model\.safetensors: not a complete safetensors file .*fetch the model again"
        ):
            Checkpoint(model).weight("model.embed_tokens")


def test_what_is_no_safetensors_file_is_refused(model: Path) -> None:
    for content in (
        b"\x80\x02" + bytes(64),
        b"PK\x03\x04" + bytes(64),
        b"version https://git-lfs.github.com/spec/v1\n" * 3,
    ):
        (model / SINGLE).write_bytes(content)
        with pytest.raises(IntegrityError, match="not a complete safetensors file"):
            Checkpoint(model).weight("model.embed_tokens")


@pytest.mark.parametrize(("value", "count"), [(float("nan"), 1), (float("inf"), 2), (float("-inf"), 3)])
def test_a_tensor_that_is_not_finite_is_named_and_counted(model: Path, value: float, count: int) -> None:
    damaged = load_file(model / SINGLE)[DOWN].clone()
    damaged.view(-1)[:count] = value
    change_tensors(model, {DOWN: damaged})
    checkpoint = Checkpoint(model)
    with pytest.raises(AssayError, match=f"the tensor {re.escape(DOWN)} holds {count} values that are NaN or infinite"):
        checkpoint.weight("model.layers.1.mlp.down_proj")
    assert checkpoint.weight("model.layers.0.mlp.down_proj").isfinite().all()


@pytest.mark.parametrize("wrong", [(128, 64), (64, 127), (64 * 128,), (1, 64, 128)])
def test_a_tensor_of_another_shape_is_named(model: Path, wrong: tuple[int, ...]) -> None:
    change_tensors(model, {DOWN: torch.zeros(wrong)})
    words = f"{DOWN} has the shape {list(wrong)}, but config.json makes it [64, 128]"
    with pytest.raises(IntegrityError, match=re.escape(words)):
        Checkpoint(model).weight("model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_numbers_without_their_scales_are_refused(model: Path, dtype: torch.dtype) -> None:
    change_tensors(model, {DOWN: torch.ones(64, 128).to(dtype)})
    with pytest.raises(NotSupportedError, match=f"is stored as {str(dtype).removeprefix('torch.')}, as in a quantized"):
        Checkpoint(model).weight("model.layers.1.mlp.down_proj")


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"bits": 4}, "an unknown method"), ("x", "an unknown")],
)
def test_a_quantized_checkpoint_is_refused(model: Path, settings: Any, kind: str) -> None:
    change_config(model, quantization_config=settings)
    with pytest.raises(NotSupportedError, match=rf"already quantized \({kind}.*Start from the original weights"):
        Checkpoint(model)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_a_pickle_is_refused_and_never_loaded(model: Path, tmp_path: Path) -> None:
    (model / SINGLE).unlink()
    torch.save(Bomb(tmp_path / "loaded"), model / "pytorch_model.bin")
    with pytest.raises(
        UsageError, match=rf"no {SINGLE} and no {INDEX}\. pytorch_model\.bin is a pickle, which Assay never loads"
    ):
        _ = Checkpoint(model).files
    assert not (tmp_path / "loaded").exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "loaded").exists(), "the file would not have told"


def test_a_pickle_under_a_safetensors_name_is_never_loaded(model: Path, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "loaded"), model / SINGLE)
    with pytest.raises(IntegrityError, match="not a complete safetensors file"):
        _ = Checkpoint(model).files
    assert not (tmp_path / "loaded").exists()


def test_a_directory_without_weights_is_a_usage_error(model: Path) -> None:
    (model / SINGLE).unlink()
    with pytest.raises(UsageError, match=rf"no {SINGLE} and no {INDEX}\.$"):
        _ = Checkpoint(model).files


def test_a_model_without_its_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json or tokenizer\.model; the tokenizer belongs to the model"):
        Checkpoint(model)
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    Checkpoint(model)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_configuration_is_an_integrity_error(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"config\.json: "):
        Checkpoint(model)


def test_a_whole_checkpoint_passes_its_check(model: Path, sharded: Path) -> None:
    Checkpoint(model).check()
    Checkpoint(sharded).check()


def test_a_check_reads_every_shard_and_misses_no_matrix(sharded: Path) -> None:
    *_, last = sorted(sharded.glob("model-*.safetensors"))
    data = last.read_bytes()
    last.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match="not a complete safetensors file"):
        Checkpoint(sharded).check()
    last.write_bytes(data)
    index = json.loads((sharded / INDEX).read_text())
    place = index["weight_map"].pop(DOWN)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=f"the tensor {re.escape(DOWN)} is missing"):
        Checkpoint(sharded).check()
    other = next(file for file in index["weight_map"].values() if file != place)
    (sharded / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {DOWN: other}}))
    with pytest.raises(IntegrityError, match=f"lacks the tensor {re.escape(DOWN)}"):
        Checkpoint(sharded).check()


LAST_DOWN = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w2.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.down_proj.weight",
}
FUSED_DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fused(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny model whose experts are stored in transformers' layout, fused, in several files."""
    source = tiny_model(family)
    directory = shutil.copytree(source, tmp_path / "fused")
    (directory / SINGLE).unlink()
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(directory, save_original_format=False, max_shard_size="200KB")
    assert FUSED_DOWN in json.loads((directory / INDEX).read_text())["weight_map"]
    return directory


def test_fused_experts_give_the_same_numbers_under_the_names_of_the_hub(
    family: str, fused: Path, tiny_model: Callable[[str], Path]
) -> None:
    apart, together = Checkpoint(tiny_model(family)), Checkpoint(fused)
    together.check()
    assert LAST_DOWN[family] in apart.files
    assert set(together.files) == set(apart.files) == set(load_file(tiny_model(family) / SINGLE))
    for name in apart.files:
        assert torch.equal(together.stored(name), apart.stored(name))
        assert together.stored(name).is_contiguous()
    for linear in together.shape.linears:
        assert torch.equal(together.weight(linear.name), apart.weight(linear.name))


def test_a_missing_router_is_named(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model(family), tmp_path / "model")
    _, router = Checkpoint(directory).shape.routers
    change_tensors(directory, {f"{router}.weight": None})
    with pytest.raises(IntegrityError, match=rf"the tensor {re.escape(router)}\.weight is missing from the checkpoint"):
        Checkpoint(directory).check()


def test_a_missing_expert_is_named(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_model(family), tmp_path / "model")
    change_tensors(directory, {LAST_DOWN[family]: None})
    words = f"the tensor {re.escape(LAST_DOWN[family])} is missing from the checkpoint"
    with pytest.raises(IntegrityError, match=words):
        Checkpoint(directory).check()
    with pytest.raises(IntegrityError, match=words):
        Decoder(Checkpoint(directory)).layer(1)


def test_fused_experts_of_another_number_are_named(family: str, fused: Path) -> None:
    path = fused / json.loads((fused / INDEX).read_text())["weight_map"][FUSED_DOWN]
    tensors = load_file(path)
    tensors[FUSED_DOWN] = tensors[FUSED_DOWN][:3].clone()
    save_file(tensors, path)
    inner = tensors[FUSED_DOWN].shape[2]
    words = f"{path}: the tensor {FUSED_DOWN} has the shape [3, 64, {inner}], but config.json makes it [4, 64, {inner}]"
    with pytest.raises(IntegrityError, match=re.escape(words)):
        Checkpoint(fused).weight(LAST_DOWN[family].removesuffix(".weight"))


def test_fused_experts_that_their_shard_lacks_are_named(family: str, fused: Path) -> None:
    index = json.loads((fused / INDEX).read_text())
    place = index["weight_map"].pop(FUSED_DOWN)
    (fused / INDEX).write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=f"the tensor {re.escape(LAST_DOWN[family][:-8])}.* is missing"):
        Checkpoint(fused).weight(LAST_DOWN[family].removesuffix(".weight"))
    index["weight_map"][FUSED_DOWN] = next(file for file in index["weight_map"].values() if file != place)
    (fused / INDEX).write_text(json.dumps(index))
    for read in (Checkpoint(fused).check, lambda: Decoder(Checkpoint(fused)).layer(1)):
        with pytest.raises(
            IntegrityError, match=f"lacks the tensor {re.escape(FUSED_DOWN)}, which {INDEX} places there"
        ):
            read()
