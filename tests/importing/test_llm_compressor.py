"""Recipes of llm-compressor: every modifier that has its like, every preset, and what is refused by name and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from foreign_recipes import AWQ, FP8_CACHE, GPTQ, OLD_AWQ, SMOOTH

from assay.errors import RecipeError
from assay.importing.schemes import PRESETS
from assay.quantize.schemes import weight_scheme
from assay.targets.compressed_tensors_formats import arguments_of

Import = Callable[..., Any]


def quantizer(fields: str, kind: str = "QuantizationModifier") -> str:
    """A recipe of one modifier with the given fields, a line each."""
    lines = "".join(f"      {line}\n" for line in fields.splitlines())
    return f"default_stage:\n  default_modifiers:\n    {kind}:\n{lines}"


# Modifiers


def test_gptq(imported: Import) -> None:
    recipe, found = imported(GPTQ)
    assert recipe.name == "qwen3-8b-w4a16" and recipe.model.source == "hf:Qwen/Qwen3-8B"
    quantize = recipe.quantize
    assert (quantize.method, quantize.scheme, quantize.group_size) == ("gptq", "W4A16", 128), "their groups are of 128"
    assert (quantize.damping, quantize.correction, quantize.range) == (0.01, 0, "minmax")
    assert (quantize.overrides, quantize.transform, quantize.kv_cache) == ((), "none", None)
    assert (recipe.target.format, recipe.target.engine) == ("compressed-tensors", "vllm")
    assert [problem.line for problem in found.left_out] == [7 + 1, 9 + 1, 12 + 1]
    assert {problem.message.split(":")[0].rpartition(".")[2] for problem in found.left_out} == {
        "bypass_divisibility_checks",
        "block_size",
        "batched_quantization",
    }
    assert found.source == "llm-compressor" and set(found.chosen) == {"calibration", "target", "evaluate", "gate"}
    assert "is not on this machine" in str(found.note)


def test_awq_goes_before_rounding(imported: Import) -> None:
    recipe, found = imported(AWQ)
    assert (recipe.quantize.method, recipe.quantize.transform, recipe.quantize.scheme) == ("rtn", "awq", "W4A16_ASYM")
    assert any("mappings" in problem.message for problem in found.left_out)
    assert recipe.quantize.strength is None


def test_an_awq_modifier_that_quantizes_too(imported: Import) -> None:
    quantize = imported(OLD_AWQ)[0].quantize
    assert (quantize.method, quantize.transform, quantize.scheme) == ("rtn", "awq", "W4A16_ASYM")
    assert (quantize.group_size, quantize.range) == (64, "mse")


def test_smoothquant_with_its_strength(imported: Import) -> None:
    quantize = imported(SMOOTH)[0].quantize
    assert (quantize.method, quantize.transform, quantize.strength) == ("gptq", "smoothquant", 0.8)
    assert (quantize.scheme, quantize.group_size, quantize.range, quantize.damping) == ("W8A8", None, "mse", 0.1)
    assert imported(SMOOTH.replace("smoothing_strength: 0.8", "algorithm: smoothquant"))[0].quantize.strength == 0.5


def test_a_quantized_cache(imported: Import) -> None:
    quantize = imported(FP8_CACHE)[0].quantize
    assert (quantize.method, quantize.scheme, quantize.kv_cache) == ("rtn", "FP8_DYNAMIC", "fp8")


# Number formats


def test_presets_are_those_of_compressed_tensors() -> None:
    assert set(PRESETS) < set(PRESET_SCHEMES)


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES))
def test_a_preset_and_its_arguments_are_the_same_scheme(imported: Import, name: str) -> None:
    group = json.loads(preset_name_to_scheme(name, ["Linear"]).model_dump_json())
    if name not in PRESETS:
        for fields in (f"scheme: {name}", f"config_groups: {json.dumps({'group_0': group})}"):
            with pytest.raises(RecipeError):
                imported(quantizer(f"{fields}\nignore: [lm_head]"))
        return
    named = imported(quantizer(f"scheme: {name.lower()}\nignore: lm_head"))[0].quantize
    spelled = imported(quantizer(f"config_groups: {json.dumps({'group_0': group})}\nignore: [lm_head]"))[0].quantize
    assert (named.scheme, named.group_size) == PRESETS[name] == (spelled.scheme, spelled.group_size)


@pytest.mark.parametrize(
    ("name", "group_size"),
    [
        *((name, size) for name in ("W4A16", "W4A16_ASYM", "W8A16") for size in (32, 64, 128, "channel")),
        *((name, None) for name in ("W8A8", "W8A8_STATIC", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "MXFP4")),
        *((name, None) for name in ("NVFP4A16", "NVFP4")),
    ],
)
def test_what_assay_writes_into_a_checkpoint_is_read_as_what_it_was(
    imported: Import, name: str, group_size: int | str | None
) -> None:
    group = arguments_of(weight_scheme(name, group_size)) | {"targets": ["Linear"]}
    quantize = imported(quantizer(f"config_groups: {json.dumps({'group_0': group})}\nignore: [lm_head]"))[0].quantize
    assert (quantize.scheme, quantize.group_size) == (name, group_size)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("{num_bits: 4, group_size: 256}", "groups of 256 weights; allowed: 32, 64, 128, or strategy: channel"),
        (
            "{num_bits: 3, group_size: 128}",
            "symmetric 3-bit int (a scale for each group of 128) weights with unquantized",
        ),
        ("{num_bits: 4, group_size: 128, type: flaot}", "no scheme of Assay has symmetric 4-bit flaot"),
        ("{num_bits: 4, groupsize: 128}", "unknown key 'groupsize' (did you mean 'group_size'?)"),
        ("{num_bits: four}", "weights.num_bits is 'four'; it must be a whole number"),
        ("{num_bits: 4, type: float, group_size: 32, scale_dtype: torch.float16}", "scales of torch.uint8"),
        ("{num_bits: 8, symmetric: 'yes'}", "asymmetric 8-bit int"),
        ("[4]", "weights is a list; it must be a mapping"),
        ("null", "this group quantizes no weights"),
    ],
)
def test_a_number_format_without_its_like_is_refused(imported: Import, arguments: str, words: str) -> None:
    text = quantizer(f"config_groups:\n  group_0:\n    targets: [Linear]\n    weights: {arguments}")
    with pytest.raises(RecipeError) as error:
        imported(text)
    (problem,) = error.value.problems
    assert words in problem.message and problem.line in (5, 7)


def test_observers_are_ranges(imported: Import) -> None:
    assert imported(quantizer("scheme: W4A16\nweight_observer: imatrix_mse"))[0].quantize.range == "activation_weighted"
    assert imported(quantizer("scheme: W4A16\nobserver: {weights: mse}"))[0].quantize.range == "mse"
    with pytest.raises(RecipeError, match="the observer 'percentile' has none like it in Assay; allowed: minmax"):
        imported(quantizer("scheme: W4A16\nweight_observer: percentile"))


def test_settings_without_a_place_are_listed(imported: Import) -> None:
    text = quantizer(
        "scheme: W8A8\nactorder: group\ninput_observer: mse\nobserver: {weights: mse, input: mse}", "GPTQModifier"
    )
    _, found = imported(text)
    lines = [(problem.line, problem.message.rpartition("GPTQModifier.")[2]) for problem in found.left_out]
    assert [(line, message.partition(":")[0]) for line, message in lines] == [
        (5, "actorder"),
        (6, "input_observer"),
        (7, "observer"),
    ]
    weights = "{num_bits: 4, group_size: 128, actorder: group, observer_kwargs: {grid: 20}}"
    _, found = imported(quantizer(f"config_groups: {{g: {{targets: [Linear], weights: {weights}}}}}"))
    assert [problem.message.partition(":")[0].rpartition(".")[2] for problem in found.left_out] == [
        "actorder",
        "observer_kwargs",
    ]


# What is refused


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (quantizer("sparsity: 0.5", "SparseGPTModifier"), 3, "SparseGPTModifier cannot be imported: it prunes weights"),
        (quantizer("sparsity: 0.5", "WandaPruningModifier"), 3, "it prunes weights"),
        (quantizer("iters: 200", "AutoRoundModifier"), 3, "GPTQModifier is the nearest. Allowed: QuantizationModifier"),
        (quantizer("rotations: [R1]", "SpinQuantModifier"), 3, "Assay has no rotations"),
        (quantizer("x: 1", "os.system"), 3, "os.system cannot be imported: Assay does not know it"),
        (quantizer("scheme: W4A8"), 4, "the scheme 'W4A8' has none like it in Assay; schemes that have: W4A16,"),
        (quantizer("scheme: W4A16\nignroe: [lm_head]"), 5, "unknown key 'ignroe' (did you mean 'ignore'?)"),
        (quantizer("targets: [Linear]"), 3, "QuantizationModifier says no number format; add scheme, or config_groups"),
        (quantizer("scheme: W4A16\nconfig_groups: {}"), 4, "there are both scheme and config_groups"),
        (quantizer("scheme: W4A16\nend: 2.0"), 5, "end is of training"),
        (quantizer("scheme: W4A16\ntargets: 5"), 5, "targets is 5; it must be a text or a list of texts"),
        (quantizer("scheme: W4A16\ndampening_frac: 2", "GPTQModifier"), 5, "it must be a number from 1e-09 to 1"),
        (quantizer("scheme: W4A16\nkv_cache_scheme: {num_bits: 8, type: int}"), 5, "a cache of symmetric 8-bit int"),
        (quantizer("scheme: W4A16\nignore: [Linear]"), 5, "every Linear is ignored"),
        (quantizer("scheme: W4A16\ntargets: [Embedding]"), 3, "the target 'Embedding' means no Linear"),
        (GPTQ + "        QuantizationModifier: {scheme: FP8}\n", 14, "GPTQModifier quantizes already"),
        (SMOOTH + "        AWQModifier: {}\n", 19, "SmoothQuantModifier is there already, and Assay has one transform"),
        (GPTQ + "        SmoothQuantModifier: {}\n", 14, "SmoothQuantModifier comes after GPTQModifier"),
        (SMOOTH.replace("0.8", "0.8\n          algorithm: log_equalization"), 7, "allowed: smoothquant"),
        (SMOOTH.replace("0.8", "0.8\n          calibration_function: os.system"), 7, "a recipe names no functions"),
        ("default_stage:\n  modifiers:\n    GPTQModifier: {scheme: W4A16}\n", 2, "only keys that end in _modifiers"),
        ("default_stage:\n  a_modifiers:\n    SmoothQuantModifier: {}\n", 1, "nothing is quantized"),
        ("default_stage: {a_modifiers: {GPTQModifier: {scheme: W4A16}}}\nargs: {}\n", 2, "unknown key 'args'"),
        ("default_stage: {a_modifiers: {GPTQModifier: [W4A16]}}\n", 1, "it must be a mapping"),
    ],
)
def test_what_has_no_like_is_refused_with_its_line(imported: Import, text: str, line: int, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        imported(text)
    assert [(problem.line, words in problem.message) for problem in error.value.problems][:1] == [(line, True)], str(
        error.value
    )


def test_every_problem_is_named_at_once(imported: Import) -> None:
    text = quantizer("scheme: W4A16\nblok_size: 1\nend: 3") + "    SparseGPTModifier: {}\n    QuIPModifier: {}\n"
    with pytest.raises(RecipeError) as error:
        imported(text)
    assert [problem.line for problem in error.value.problems] == [5, 6, 7, 8]


@pytest.mark.parametrize(
    "text",
    [
        GPTQ.replace("auto", "!!python/object/apply:os.system ['touch owned']"),
        AWQ.replace(
            "20", "20\n          offload_device: !!python/object/apply:llmcompressor.sentinel.Sentinel [not_provided]"
        ),
    ],
)
def test_no_python_object_is_ever_made(
    imported: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"the tag !!python/object/apply:.* is not allowed.* Remove the tag"):
        imported(text)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GPTQ.replace("[Linear]", "&a [Linear]"), "anchors and aliases are not allowed"),
        (GPTQ.replace("targets:", "targets: [Linear]\n          targets:"), "the key 'targets' is there already"),
        ("a" * (1 << 20) + "\n", "larger than 1 MiB"),
        ("- GPTQModifier\n", "a recipe of llm-compressor or Truss config is a mapping that begins with"),
        ("", "a recipe of llm-compressor or Truss config is a mapping that begins with"),
        ("hello: world\n", "neither a recipe of llm-compressor (stages, such as default_stage) nor a Truss config"),
        ("version: 1\nquantize: {}\n", "this is a recipe of Assay already"),
    ],
)
def test_a_file_is_read_as_strictly_as_a_recipe(imported: Import, text: str, words: str) -> None:
    with pytest.raises(RecipeError) as error:
        imported(text)
    assert words in str(error.value)
