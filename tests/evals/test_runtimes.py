"""What every runtime promises, on a tiny model that each of them loads."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from assay.errors import AssayError, IntegrityError, UsageError
from assay_evals.runtimes.base import Generated, Runtime, generate_text, open_runtime, runtime_version

CONTEXT = 256
PROMPT = [5, 400, 17, 301, 77, 8, 9, 250, 33, 4, 511, 1]
RUNTIMES = ["transformers", pytest.param("onnxruntime-genai", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def directory_for(tiny_model: Callable[[str], Path], genai_model: Callable[[str], Path]) -> Callable[[str], Path]:
    return lambda name: genai_model("qwen3") if name == "onnxruntime-genai" else tiny_model("qwen3")


@pytest.fixture(scope="module")
def opened(directory_for: Callable[[str], Path]) -> Callable[[str], Runtime]:
    held: dict[str, Runtime] = {}

    def open_once(name: str) -> Runtime:
        if name not in held:
            held[name] = open_runtime(name, directory_for(name))
        return held[name]

    return open_once


@pytest.fixture(scope="module")
def expected_logits(tiny_model: Callable[[str], Path]) -> Callable[[list[int]], NDArray[np.float32]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"), dtype=torch.float32).eval()

    def logits(tokens: list[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()

    return logits


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("length", [1, 2, 12, CONTEXT])
def test_logits_are_the_models_after_every_prefix(
    opened: Callable[[str], Runtime],
    expected_logits: Callable[[list[int]], NDArray[np.float32]],
    name: str,
    length: int,
) -> None:
    tokens = (PROMPT * (length // len(PROMPT) + 1))[:length]
    found, expected = opened(name).logits(tokens), expected_logits(tokens)
    assert found.shape == (length, 512)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=3e-6 * float(np.abs(expected).max()), rel=0)


@pytest.mark.parametrize("name", RUNTIMES)
def test_logits_stay_what_they_were(opened: Callable[[str], Runtime], name: str) -> None:
    """A runtime that hands out its own buffer would overwrite them."""
    runtime = opened(name)
    before = runtime.logits(PROMPT)
    kept = before.copy()
    runtime.logits(PROMPT[::-1])
    np.testing.assert_array_equal(before, kept)
    np.testing.assert_array_equal(runtime.logits(PROMPT), kept)


@pytest.mark.parametrize("name", RUNTIMES)
def test_threads_change_the_time_and_nothing_else(directory_for: Callable[[str], Path], name: str) -> None:
    one, two = (open_runtime(name, directory_for(name), threads=count).logits(PROMPT) for count in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("new_tokens", [1, 9])
def test_generation_takes_the_likeliest_token_each_time(
    opened: Callable[[str], Runtime], name: str, new_tokens: int
) -> None:
    runtime = opened(name)
    generated = runtime.generate(PROMPT, new_tokens)
    assert len(generated.tokens) == len(generated.token_seconds) == new_tokens
    sequence = list(PROMPT)
    for token in generated.tokens:
        assert token == int(runtime.logits(sequence)[-1].argmax())
        sequence.append(token)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("cached", [1, 7, len(PROMPT) - 1])
def test_a_prefix_in_the_cache_changes_nothing_but_the_time(
    opened: Callable[[str], Runtime], name: str, cached: int
) -> None:
    runtime = opened(name)
    for prompt in (PROMPT, PROMPT[::-1]):
        found = runtime.generate(prompt, 9, cached=cached)
        assert found.tokens == runtime.generate(prompt, 9).tokens
        assert len(found.token_seconds) == 9


@pytest.mark.parametrize("name", RUNTIMES)
def test_only_what_is_not_in_the_cache_takes_time(opened: Callable[[str], Runtime], name: str) -> None:
    runtime, prompt = opened(name), (PROMPT * 30)[: CONTEXT - 2]
    cold = min(runtime.generate(prompt, 1).token_seconds[0] for _ in range(9))
    hit = min(runtime.generate(prompt, 1, cached=len(prompt) - 1).token_seconds[0] for _ in range(9))
    assert hit < cold / 2


@pytest.mark.parametrize("name", RUNTIMES)
def test_each_token_has_its_time(opened: Callable[[str], Runtime], name: str) -> None:
    seconds = opened(name).generate(PROMPT, 20).token_seconds
    assert seconds[0] > 0
    assert all(later > earlier for earlier, later in itertools.pairwise(seconds))


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_end_of_text_stops_generation_only_where_that_is_asked_for(
    directory_for: Callable[[str], Path], opened: Callable[[str], Runtime], tmp_path: Path, name: str
) -> None:
    first = opened(name).generate(PROMPT, 1).tokens[0]
    directory = tmp_path / "model"
    shutil.copytree(directory_for(name), directory)
    for file in directory.glob("*config.json"):
        config = json.loads(file.read_text())
        for part in (config, config.get("model", {})):
            if "eos_token_id" in part:
                part["eos_token_id"] = first
        file.write_text(json.dumps(config))
    runtime = open_runtime(name, directory)
    assert len(runtime.generate(PROMPT, 8).tokens) == 8
    stopped = runtime.generate(PROMPT, 8, stops=True)
    assert stopped.tokens == stopped.token_seconds == ()
    assert len(opened(name).generate(PROMPT, 8, stops=True).tokens) == 8
    assert runtime.begin(PROMPT, 8, stops=True).step() is None
    request = runtime.begin(PROMPT, 8, stops=False)
    assert [request.step() for _ in range(8)] == list(runtime.generate(PROMPT, 8).tokens)


@pytest.mark.parametrize("name", RUNTIMES)
def test_requests_that_take_turns_come_to_what_each_would_alone(opened: Callable[[str], Runtime], name: str) -> None:
    runtime, prompts = opened(name), [PROMPT, PROMPT[::-1], PROMPT[3:]]
    requests = [runtime.begin(prompt, 7, stops=True) for prompt in prompts]
    steps = [[request.step() for request in requests] for _ in range(7)]
    expected = [list(runtime.generate(prompt, 7).tokens) for prompt in prompts]
    assert [list(tokens) for tokens in zip(*steps, strict=True)] == expected and len(set(map(str, expected))) > 1
    with pytest.raises(UsageError, match=f"exceed the model's context of {CONTEXT}"):
        runtime.begin(PROMPT, CONTEXT, stops=True)


def test_a_model_that_ends_its_text_at_once(
    opened: Callable[[str], Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = opened("transformers")
    monkeypatch.setattr("assay_evals.runtimes.base.open_runtime", lambda *_: runtime)
    monkeypatch.setattr(runtime, "generate", lambda *_, stops: Generated((), ()))
    ended = generate_text("transformers", tmp_path, "The value of", 6)
    assert (ended.text, ended.time_to_first_token_seconds, ended.decode_tokens_per_second) == ("", None, None)


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_context_can_be_filled_and_not_overrun(opened: Callable[[str], Runtime], name: str) -> None:
    runtime = opened(name)
    assert runtime.context_length == CONTEXT
    full = (PROMPT * 30)[: CONTEXT - 4]
    assert len(runtime.generate(full, 4).tokens) == 4
    with pytest.raises(UsageError, match="252 prompt tokens and 5 new ones exceed the model's context of 256"):
        runtime.generate(full, 5)
    with pytest.raises(UsageError, match="exceed the model's context of 256"):
        runtime.logits([1] * (CONTEXT + 1))


@pytest.mark.parametrize("name", RUNTIMES)
def test_an_empty_prompt_is_refused(opened: Callable[[str], Runtime], name: str) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        opened(name).generate([], 4)
    with pytest.raises(UsageError, match="no tokens"):
        opened(name).logits([])


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("text", ["The value of the expression is bound.", "naïve — “quoted”\n\tand code: x[1:]\n", ""])
def test_text_survives_its_tokens(
    opened: Callable[[str], Runtime], tiny_model: Callable[[str], Path], name: str, text: str
) -> None:
    from transformers import AutoTokenizer

    tokens = opened(name).encode(text)
    assert tokens == AutoTokenizer.from_pretrained(tiny_model("qwen3"))(text, add_special_tokens=False).input_ids
    assert all(type(token) is int for token in tokens)
    assert opened(name).decode(tokens) == text


@pytest.mark.parametrize("name", RUNTIMES)
def test_its_name_tells_its_version(opened: Callable[[str], Runtime], name: str) -> None:
    assert opened(name).name == runtime_version(name)
    assert runtime_version(name).startswith(f"{name} ")


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_text_is_continued(directory_for: Callable[[str], Path], name: str) -> None:
    continued = generate_text(name, directory_for(name), "The value of", 6)
    assert continued.prompt == "The value of"
    assert continued.text
    assert continued.time_to_first_token_seconds > 0
    assert continued.decode_tokens_per_second is not None
    assert continued.decode_tokens_per_second > 0
    assert generate_text(name, directory_for(name), "The value of", 1).decode_tokens_per_second is None


def cut_short(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def spoil_json(path: Path) -> None:
    path.write_text("{")


def replace_with_empty_object(path: Path) -> None:
    path.write_text("{}")


BROKEN = [
    ("transformers", "config.json", Path.unlink),
    ("transformers", "config.json", spoil_json),
    ("transformers", "config.json", replace_with_empty_object),
    ("transformers", "model.safetensors", Path.unlink),
    ("transformers", "model.safetensors", cut_short),
    ("transformers", "tokenizer.json", cut_short),
    ("onnxruntime-genai", "genai_config.json", Path.unlink),
    ("onnxruntime-genai", "genai_config.json", spoil_json),
    ("onnxruntime-genai", "genai_config.json", replace_with_empty_object),
    ("onnxruntime-genai", "model.onnx", Path.unlink),
    ("onnxruntime-genai", "model.onnx", cut_short),
    ("onnxruntime-genai", "model.onnx.data", cut_short),
    ("onnxruntime-genai", "tokenizer.json", cut_short),
]


@pytest.mark.parametrize(
    ("name", "file", "spoil"),
    [
        pytest.param(*row, id=f"{row[1]} {row[2].__name__}", marks=pytest.mark.slow if "genai" in row[0] else ())
        for row in BROKEN
    ],
)
def test_a_broken_directory_is_an_error_that_names_it(
    directory_for: Callable[[str], Path], tmp_path: Path, name: str, file: str, spoil: Callable[[Path], None]
) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(directory_for(name), directory)
    spoil(directory / file)
    with pytest.raises(AssayError, match="broken") as caught:
        open_runtime(name, directory)
    assert not isinstance(caught.value, UsageError)
    if file.startswith("genai") and spoil is spoil_json:
        assert isinstance(caught.value, IntegrityError)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_the_oracle_does_not_make_up_weights(tiny_model: Callable[[str], Path], tmp_path: Path, lost: str) -> None:
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "broken"
    shutil.copytree(tiny_model("qwen3"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["another.weight"] = tensors.pop(lost)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssayError, match=f"its tensors are not the model's: {lost}, another.weight"):
        open_runtime("transformers", directory)


def test_the_package_that_reads_quantized_checkpoints_is_named_when_it_is_absent(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3"), directory)
    path = directory / "config.json"
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "format": "pack-quantized"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    monkeypatch.setitem(sys.modules, "compressed_tensors.entrypoints.convert", None)
    with pytest.raises(UsageError, match="pip install compressed-tensors"):
        open_runtime("transformers", directory)


def test_a_format_that_is_not_known_here_is_named(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3"), directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(
        AssayError, match="no reader of quant_method hqq; this release has compressed-tensors, awq, gptq, modelopt"
    ):
        open_runtime("transformers", directory)
