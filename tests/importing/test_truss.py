"""Truss configs: every type of quantization, where the checkpoint comes from, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from foreign_recipes import CONFIG

from assay.errors import RecipeError

Import = Callable[..., Any]


def test_a_whole_config(imported: Import) -> None:
    recipe, found = imported(CONFIG, None)
    assert recipe.name == "llama-3.1-8b-instruct"
    assert recipe.model.source == "hf:meta-llama/Llama-3.1-8B-Instruct"
    assert recipe.model.revision == "0e9e39f249a16976918f6564b8830bc894c89659"
    assert recipe.calibration.model_dump(exclude={"seed", "config", "revision"}) == {
        "source": "hf",
        "name": "baseten/quant_calibration_dataset_v1",
        "split": "train",
        "field": "text",
        "samples": 512,
        "length": 1024,
    }
    assert (recipe.target.format, recipe.target.engine) == ("modelopt", "tensorrt-llm")
    assert found.source == "Truss" and set(found.chosen) == {"evaluate", "gate"}
    assert [(problem.line, problem.message.partition(":")[0]) for problem in found.left_out] == [
        (2, "resources"),
        (3, "secrets"),
        (5, "trt_llm.inference_stack"),
        (12, "trt_llm.build.max_seq_len"),
        (13, "trt_llm.build.tensor_parallel_count"),
        (19, "trt_llm.build.plugin_configuration"),
        (20, "trt_llm.runtime"),
    ]


@pytest.mark.parametrize(
    ("kind", "scheme", "cache", "overrides"),
    [
        ("fp8", "FP8", None, 0),
        ("fp8_kv", "FP8", "fp8", 0),
        ("fp8_mlp_only", "FP8", None, 1),
        ("fp4", "NVFP4", None, 0),
        ("fp4_kv", "NVFP4", "fp8", 0),
        ("fp4_mlp_only", "NVFP4", None, 1),
    ],
)
def test_types_of_quantization(imported: Import, kind: str, scheme: str, cache: str | None, overrides: int) -> None:
    quantize = imported(CONFIG.replace("fp8_kv", kind), None)[0].quantize
    assert (quantize.method, quantize.scheme, quantize.range, quantize.kv_cache) == ("rtn", scheme, "minmax", cache)
    assert [entry.model_dump(exclude_none=True) for entry in quantize.overrides] == [
        {"match": "*.self_attn.*", "scheme": "none"}
    ][:overrides]


def test_what_truss_calibrates_on_unless_told(imported: Import) -> None:
    short = "trt_llm: {build: {checkpoint_repository: {source: HF, repo: org/model}, quantization_type: fp8}}\n"
    recipe, _ = imported(short, None)
    found = recipe.calibration
    assert (found.name, found.config, found.split, found.field) == ("abisee/cnn_dailymail", "3.0.0", "train", "article")
    assert (found.samples, found.length, recipe.name) == (1024, 1536, "model-fp8")


def test_a_checkpoint_from_elsewhere_has_to_be_named(imported: Import) -> None:
    text = CONFIG.replace("source: HF", "source: S3").replace("meta-llama/Llama-3.1-8B-Instruct", "s3://bucket/model")
    with pytest.raises(RecipeError, match=r"9: source is 'S3'; Assay does not fetch from there.*--model ./directory"):
        imported(text, None)
    recipe, found = imported(text, "hf:org/same")
    assert recipe.model.source == "hf:org/same" and recipe.model.revision is None
    assert any("--model says where" in problem.message for problem in found.left_out)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        (
            "fp8_kv",
            "no_quant",
            14,
            "no_quant quantizes nothing, so there is nothing to judge; choose one of fp8, fp8_kv",
        ),
        ("    quantization_type: fp8_kv\n", "", 6, "no_quant quantizes nothing"),
        ("fp8_kv", "smooth_quant", 14, "smooth_quant is a type that Truss itself no longer builds"),
        ("fp8_kv", "weights_int4_kv_int8", 14, "no longer builds"),
        ("fp8_kv", "fp6", 14, "quantization_type is 'fp6'; allowed: fp8, fp8_kv, fp8_mlp_only, fp4"),
        (
            "base_model: decoder",
            "base_model: encoder_bert",
            7,
            "base_model 'encoder_bert' is no decoder; allowed: decoder",
        ),
        (
            "quantization_type",
            "quantisation_type",
            14,
            "unknown key 'quantisation_type' (did you mean 'quantization_type'?)",
        ),
        ("calib_size", "calib_sise", 16, "unknown key 'calib_sise' (did you mean 'calib_size'?)"),
        ("512", "lots", 16, "calib_size is 'lots'; it must be a whole number from 1"),
        ("source: HF", "source: hub", 9, "source is 'hub'; allowed: HF, GCS"),
        ("  repo: meta-llama/Llama-3.1-8B-Instruct\n", "  repo: [a]\n", 10, "repo is a list; it must be a text"),
    ],
)
def test_what_has_no_like_is_refused_with_its_line(imported: Import, old: str, new: str, line: int, words: str) -> None:
    assert old in CONFIG
    with pytest.raises(RecipeError) as error:
        imported(CONFIG.replace(old, new), None)
    assert any(problem.line == line and words in problem.message for problem in error.value.problems), str(error.value)


def test_a_config_that_quantizes_nothing(imported: Import) -> None:
    with pytest.raises(RecipeError, match="there is no trt_llm: this Truss quantizes nothing"):
        imported("model_name: x\nrequirements: [torch]\n", None)


def test_a_config_without_a_checkpoint(imported: Import) -> None:
    with pytest.raises(RecipeError, match="there is no checkpoint_repository; name the model: --model"):
        imported("trt_llm: {build: {quantization_type: fp8}}\n", None)
