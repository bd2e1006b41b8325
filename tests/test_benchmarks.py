"""What the benchmarks rest on: the shuffled model is the same function with other weights, jobs take turns, one yardstick fits all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from gate_soundness import Case, cases, simulate
from padded_model import pad_model
from quantizers import (
    Turn,
    parse,
    peak_memory_bytes,
    plain_text,
    quantize_ragged_groups,
    transformers_runs,
    turns,
    windows,
)
from safetensors.torch import load_file, save_file
from shuffled_model import shuffle_channels
from transformers import AutoModelForCausalLM

from assay.files import read_json

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


def test_a_shuffled_model_computes_the_same(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    source = make_model(tmp_path / "model", "llama", dtype="float32", num_attention_heads=8)
    tokens = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    tensors = load_file(source / "model.safetensors")
    shuffled = shuffle_channels(tensors, read_json(source / "config.json"), seed=1)
    assert {name: tensor.shape for name, tensor in shuffled.items()} == {name: tensors[name].shape for name in tensors}
    assert all(
        not torch.equal(shuffled[name], tensors[name]) for name in tensors if "weight" in name and "norm" not in name
    )
    save_file(shuffled, source / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_padded_model_computes_the_same_in_sizes_that_blocks_divide(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}
    source = make_model(tmp_path / "model", "llama", dtype="float32", intermediate_size=144, **heads)
    pad_model(source, tmp_path / "padded")
    tokens = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(directory) for directory in (source, tmp_path / "padded"))
        torch.testing.assert_close(after(tokens).logits, before(tokens).logits, atol=1e-5, rtol=1e-4)
    layers = after.model.layers
    assert all(size % 128 == 0 for _, weight in layers.named_parameters() if weight.dim() == 2 for size in weight.shape)


def test_assays_jobs_and_the_peers_take_turns() -> None:
    given = ["--jobs", "rtn,gptq", "--schemes", "W4A16", "--peer-jobs", "gptq-W4A16,W8A8,NVFP4"]
    ours = [Turn("assay", "rtn", "W4A16"), Turn("assay", "gptq", "W4A16")]
    theirs = [Turn("llm-compressor", job) for job in ("gptq-W4A16", "W8A8", "NVFP4")]
    assert turns(parse(given)) == ours
    assert turns(parse([*given, "--peer", sys.executable])) == [ours[0], theirs[0], ours[1], *theirs[1:]]
    assert turns(parse([*given, "--jobs", "", "--peer", sys.executable])) == theirs


def test_directories_are_told_apart() -> None:
    arguments = parse(["--peer", sys.executable, "--jobs", "rtn,gptq"])
    assert len({turn.directory for turn in turns(arguments)}) == 2 * 2 + 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--jobs", "rtn,awp"], "--jobs: awp unknown; there are rtn,"),
        (["--peer", "/nowhere/python"], "/nowhere/python is no file"),
        (["--measure", "here"], "--measure needs --model and --evaluation"),
        (["--model", "here", "--evaluation", "text"], "--model needs --calibration and --evaluation"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(given)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_texts_are_plain_or_rows(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("twenty @-@ one , 1 @,@ 000 @.@ 5")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"text": "a @-@ b"}) + "\n" + json.dumps({"context": "c", "continuation": "d"}) + "\n"
    )
    assert plain_text(tmp_path / "wiki.txt") == "twenty-one , 1,000.5"
    assert plain_text(tmp_path / "rows.jsonl") == "a @-@ b\n\nc d"


def test_a_text_gives_as_many_windows_as_it_fills(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    model = make_model(tmp_path / "model", "llama")
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten")
    assert windows(model, text, 2, 4).shape == (2, 4)
    filled = windows(model, text, 100, 4)
    assert 2 < len(filled) < 100
    assert torch.equal(filled[:2], windows(model, text, 2, 4))
    with pytest.raises(SystemExit, match="do not fill a window of 500"):
        windows(model, text, 1, 500)


@pytest.mark.parametrize(
    ("form", "runs"),
    [(None, True), ("float-quantized", True), ("pack-quantized", False), ("nvfp4-pack-quantized", False)],
)
def test_packed_weights_are_read_by_the_oracle(tmp_path: Path, form: str | None, runs: bool) -> None:
    config = {} if form is None else {"quantization_config": {"format": form}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert transformers_runs(tmp_path) is runs


def test_a_ragged_last_group_has_a_scale_of_its_own() -> None:
    arguments = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32, dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], input_activations=arguments)
    model = torch.nn.Sequential(torch.nn.Linear(80, 8, bias=False), torch.nn.Linear(8, 4, bias=False))
    inputs = torch.randn(1, 3, 80, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 10, 80)
    apply_quantization_config(model[:1], QuantizationConfig(config_groups={"group_0": scheme}))
    quantize_ragged_groups(model)
    rounded = []
    for group in inputs.split(32, dim=-1):
        scale = group.abs().amax(-1, keepdim=True) / 448
        rounded.append((group / scale).to(torch.float8_e4m3fn).float() * scale)
    expected = torch.cat(rounded, -1)
    assert not torch.equal(expected, inputs)
    torch.testing.assert_close(model[0](inputs), torch.nn.functional.linear(expected, model[0].weight))


def test_peak_memory_is_the_processs_own() -> None:
    import_only = (
        "import sys; sys.path.insert(0, sys.argv[1]); import quantizers; print(quantizers.peak_memory_bytes())"
    )
    block = bytearray(b"x") * (256 << 20)
    child = subprocess.run([sys.executable, "-c", import_only, BENCHMARKS], check=True, capture_output=True, text=True)
    assert int(child.stdout) < 128 << 20 < len(block) <= peak_memory_bytes()


@pytest.mark.slow
def test_the_gate_is_simulated_at_its_margin_and_without_a_loss() -> None:
    known = {case.name: case for case in cases()}
    assert len(known) == len(list(cases())) > 20
    at_margin = simulate(known["cloze at the margin, 39 documents, rates varying by 0.7"], 30)
    harmless = simulate(known["power, twice as fast where 1.5 is asked"], 30)
    assert at_margin["sound"] and harmless["sound"]
    assert float(str(at_margin["share"])) < 0.3 and float(str(harmless["share"])) > 0.7


@pytest.mark.parametrize(
    ("bound", "at_most", "share", "sound"),
    [(0.05, True, 0.5, False), (0.8, False, 0.5, False), (0.05, True, 0.0, True)],
)
def test_a_gate_that_is_wrong_too_often_is_called_so(bound: float, at_most: bool, share: float, sound: bool) -> None:
    case = Case("x", "", bound, at_most, lambda random: bool(random.random() < share))
    found = simulate(case, 200)
    assert found["sound"] is sound and abs(float(str(found["share"])) - share) < 0.15
