"""The schema: every shipped recipe is valid, and every mistake is named with its line and what is allowed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from assay.errors import EXIT_USAGE, RecipeError
from assay.files import canonical_json, sha256_bytes
from assay.recipe import QUALITY_GATES, Gate, QualityGates, Recipe, TimeToFirstTokenMetric
from assay.recipe_errors import MAX_PROBLEMS
from assay.recipe_file import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))

TEXT = """\
version: 1
name: small
model:
  source: hf:org/name
  revision: main
calibration: {source: python-docs, samples: 4, length: 64, seed: 0}
quantize:
  method: gptq
  scheme: W4A16
  group_size: 64
  overrides:
    - {match: lm_head, scheme: W8A16}
    - {match: "*.down_proj", scheme: none}
target: {format: onnxruntime-genai}
evaluate:
  quality:
    - {metric: kl_divergence, tokens: 100}
    - {metric: cloze_accuracy, samples: 10}
  speed:
    - {metric: decode_tokens_per_second}
gate:
  kl_divergence: {max: 0.1}
  decode_tokens_per_second: {min_speedup: 1.5}
publish: {registry: artifacts/store, tags: [latest, v1.0]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def load(file: Path, text: str, *assignments: str) -> Recipe:
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, assignments)[0]


def refused(file: Path, text: str, *assignments: str) -> list[str]:
    """The problems of a recipe as "line: message", "0: …" for those that come from an assignment."""
    with pytest.raises(RecipeError) as caught:
        load(file, text, *assignments)
    assert caught.value.exit_code == EXIT_USAGE
    return [f"{problem.line}: {problem.message}" for problem in caught.value.problems]


def changed(old: str, new: str) -> str:
    assert TEXT.count(old) == 1, old
    return TEXT.replace(old, new)


def test_every_recipe_is_found() -> None:
    assert len(RECIPES) == 13
    assert not list((Path(__file__).parents[1] / "recipes").rglob("*.yml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_named_like_its_file(path: Path) -> None:
    recipe, document = load_recipe(path)
    assert recipe.name == path.stem
    assert document.file == str(path)


def test_what_a_recipe_says_is_what_is_read(file: Path) -> None:
    recipe = load(file, TEXT)
    assert recipe.quantize.method == "gptq"
    assert (recipe.quantize.scheme, recipe.quantize.group_size, recipe.quantize.damping) == ("W4A16", 64, 0.01)
    assert [override.scheme for override in recipe.quantize.overrides] == ["W8A16", "none"]
    assert [metric.metric for metric in recipe.evaluate.quality] == ["kl_divergence", "cloze_accuracy"]
    assert recipe.evaluate.text.source == "python-docs"
    assert recipe.publish is not None
    assert recipe.publish.tags == ("latest", "v1.0")
    assert list(recipe.gate.declared()) == ["kl_divergence", "decode_tokens_per_second"]


@pytest.mark.parametrize("target", ["compressed-tensors", "awq", "gptq", "modelopt"])
def test_a_checkpoint_may_name_the_engine_that_is_to_serve_it(file: Path, target: str) -> None:
    text = changed("    - {metric: decode_tokens_per_second}", "    - {metric: size_on_disk}")
    text = text.replace("  decode_tokens_per_second: {min_speedup: 1.5}\n", "")
    silent = load(file, text.replace("onnxruntime-genai", target)).target
    named = load(file, text.replace("onnxruntime-genai", f"{target}, engine: vllm")).target
    assert (silent.format, silent.engine, named.engine) == (target, None, "vllm")


METRICS = (
    "decode_tokens_per_second, inter_token_latency, time_per_output_token, end_to_end_latency, time_to_first_token, "
    "prefill_tokens_per_second, prefix_reuse, energy_per_output_token, encode_latency, encode_throughput, load_time, peak_memory, "
    "size_on_disk"
)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        # Unknown keys
        (
            "  group_size: 64",
            "  groupsize: 64",
            "10: unknown key 'groupsize' (did you mean 'group_size'?); allowed: scheme, group_size, range, transform, "
            "strength, overrides, kv_cache, method, damping, correction.",
        ),
        (
            "publish:",
            "Publish:",
            "24: unknown key 'Publish' (did you mean 'publish'?); allowed: version, name, model, calibration, "
            "quantize, target, evaluate, gate, publish.",
        ),
        ("revision: main", "branch: main", "5: unknown key 'branch'; allowed: source, revision, dequantize."),
        ("max: 0.1", "maximum: 0.1, max: 0.1", "22: unknown key 'maximum' (did you mean 'max'?); allowed: max."),
        ("tokens: 100", "token: 100", "17: unknown key 'token' (did you mean 'tokens'?); allowed: metric, tokens."),
        ("seed: 0", "python-docs: 0", "6: unknown key 'python-docs'; allowed: source, samples, length, seed."),
        (
            "match: lm_head,",
            "match: lm_head, method: rtn,",
            "12: unknown key 'method'; allowed: match, scheme, group_size.",
        ),
        # Wrong words
        ("version: 1", "version: 2", "1: version is 2; allowed: 1."),
        (
            "scheme: W4A16\n",
            "scheme: w4a16\n",
            "9: quantize.scheme is 'w4a16' (did you mean 'W4A16'?); allowed: 'W4A16', 'W4A16_ASYM', 'W8A16', 'W8A8', "
            "'W8A8_STATIC', 'FP8', 'FP8_DYNAMIC', 'FP8_BLOCK', 'MXFP4A16', 'MXFP4', 'NVFP4A16' or 'NVFP4'.",
        ),
        (
            "scheme: W8A16",
            "scheme: W3A16",
            "12: quantize.overrides.0.scheme is 'W3A16' (did you mean 'W8A16'?); allowed: 'W4A16', 'W4A16_ASYM', "
            "'W8A16', 'W8A8', 'W8A8_STATIC', 'FP8', 'FP8_DYNAMIC', 'FP8_BLOCK', 'MXFP4A16', 'MXFP4', 'NVFP4A16', 'NVFP4' or 'none'.",
        ),
        ("group_size: 64", "group_size: 48", "10: quantize.group_size is 48; allowed: 32, 64, 128 or 'channel'."),
        ("method: gptq", "method: gtpq", "8: quantize.method is 'gtpq' (did you mean 'gptq'?); allowed: rtn, gptq."),
        ("method: gptq", "method: RTN", "8: quantize.method is 'RTN' (did you mean 'rtn'?); allowed: rtn, gptq."),
        ("  method: gptq\n", "", "7: quantize.method is missing; allowed: rtn, gptq."),
        (
            "format: onnxruntime-genai",
            "format: tensorrt",
            "14: target.format is 'tensorrt'; allowed: onnxruntime-genai, onnxruntime, compressed-tensors, awq, gptq, modelopt.",
        ),
        (
            "metric: decode_tokens_per_second",
            "metric: [decode]",
            f"20: evaluate.speed.0.metric is a list; allowed: {METRICS}.",
        ),
        ("metric: decode_tokens_per_second", "metric: 3", f"20: evaluate.speed.0.metric is 3; allowed: {METRICS}."),
        ("metric: decode_tokens_per_second", "metric: ~", f"20: evaluate.speed.0.metric is empty; allowed: {METRICS}."),
        # Wrong types: nothing is coerced
        ("samples: 4", "samples: '4'", "6: calibration.samples is '4'; it must be a valid integer."),
        ("samples: 4", "samples: 4.0", "6: calibration.samples is 4.0; it must be a valid integer."),
        ("samples: 4", "samples: true", "6: calibration.samples is true; it must be a valid integer."),
        ("samples: 4", "samples: ", "6: calibration.samples is empty; it must be a valid integer."),
        ("samples: 4", "samples: {a: 1}", "6: calibration.samples is a mapping; it must be a valid integer."),
        ("max: 0.1", "max: '0.1'", "22: gate.kl_divergence.max is '0.1'; it must be a valid number."),
        ("name: small", "name: 7", "2: name is 7; it must be a valid string."),
        (
            "kl_divergence: {max: 0.1}",
            "kl_divergence: 0.1",
            "22: gate.kl_divergence is 0.1; it must be a mapping with keys from: max.",
        ),
        (
            "target: {format: onnxruntime-genai}",
            "target: onnxruntime-genai",
            "14: target is 'onnxruntime-genai'; it must be a mapping with keys from: format, device, accuracy_level, engine.",
        ),
        (
            "{metric: decode_tokens_per_second}",
            "decode_tokens_per_second",
            "20: evaluate.speed.0 is 'decode_tokens_per_second'; it must be a mapping with keys from: metric, "
            "prompt_tokens, new_tokens, prefix_tokens, shapes.",
        ),
        ("[latest, v1.0]", "latest", "24: publish.tags is 'latest'; it must be a list."),
        # Out of range
        ("samples: 4", "samples: 0", "6: calibration.samples is 0; it must be greater than 0."),
        (
            "samples: 4",
            f"samples: {10**20}",
            f"6: calibration.samples is {10**20}; it must be less than or equal to 1000000000.",
        ),
        ("seed: 0", "seed: -1", "6: calibration.seed is -1; it must be greater than or equal to 0."),
        ("length: 64", "length: 4", "6: calibration.length is 4; it must be greater than or equal to 8."),
        ("max: 0.1", "max: 0", "22: gate.kl_divergence.max is 0; it must be greater than 0."),
        ("match: lm_head", "match: ''", "12: quantize.overrides.0.match is ''; it must have at least 1 character."),
        (
            "name: small",
            "name: Not Small",
            "2: name is 'Not Small'; write a-z, 0-9, dots, dashes and underscores, at most 100, a letter or digit "
            "first and last.",
        ),
        (
            "hf:org/name",
            "https://huggingface.co/org/name",
            "4: model.source is 'https://huggingface.co/org/name'; write hf:ORG/NAME, ./directory, ./file.gguf, "
            "package:MODULE/FILE.gguf or package:MODULE/DIRECTORY.",
        ),
        (
            "[latest, v1.0]",
            "[latest, -x]",
            "24: publish.tags.1 is '-x'; write letters, digits, dots, dashes and underscores, at most 128, not a dot "
            "or a dash first.",
        ),
        # Missing
        (
            "name: small\n",
            "",
            "1: name is missing; write a-z, 0-9, dots, dashes and underscores, at most 100, a letter "
            "or digit first and last.",
        ),
        ("target: {format: onnxruntime-genai}\n", "", "1: target is missing."),
        ("{max: 0.1}", "{}", "22: gate.kl_divergence.max is missing."),
        (
            "  speed:\n    - {metric: decode_tokens_per_second}\n",
            "",
            "21: the gate decode_tokens_per_second has no "
            "measurement; add {metric: decode_tokens_per_second} to evaluate.speed.",
        ),
        # Contradictions
        (
            "{format: onnxruntime-genai}",
            "{format: compressed-tensors}",
            "20: decode_tokens_per_second means nothing for compressed-tensors here: transformers, which evaluates it, computes "
            "with dequantized weights, as no serving engine does. Remove it; size_on_disk can be measured.",
        ),
        (
            "{format: onnxruntime-genai}",
            "{format: awq}",
            "20: decode_tokens_per_second means nothing for awq here: transformers, which evaluates it, computes "
            "with dequantized weights, as no serving engine does. Remove it; size_on_disk can be measured.",
        ),
        (
            "{format: onnxruntime-genai}",
            "{format: modelopt, engine: trtllm}",
            "14: target.engine is 'trtllm' (did you mean 'tensorrt-llm'?); allowed: 'vllm', 'sglang' or 'tensorrt-llm'.",
        ),
        (
            "registry: artifacts/store",
            "registry: ftp://host/models",
            "24: ftp://host/models: no registry has such an address. Allowed: a directory, "
            "oci://HOST[:PORT]/PATH, oci+http://HOST[:PORT]/PATH, s3://BUCKET/PREFIX, hf://ORG.",
        ),
        (
            "  kl_divergence: {max: 0.1}",
            "  top1_agreement: {min: 0.9}",
            "22: the gate top1_agreement has no measurement; add {metric: top1_agreement} to evaluate.quality.",
        ),
        (
            "  kl_divergence: {max: 0.1}\n",
            "",
            "21: no quality is gated; add at least one of kl_divergence, top1_agreement, cloze_accuracy, greedy_agreement, tasks.",
        ),
        (
            "metric: cloze_accuracy, samples: 10",
            "metric: kl_divergence",
            "18: the metric kl_divergence is there already; remove one of the two.",
        ),
        (
            "scheme: none}",
            "scheme: none, group_size: 32}",
            "13: scheme none leaves the weights as they are; remove group_size.",
        ),
        ("hf:org/name", "./model.gguf", "5: only an hf: source has revisions; remove this line."),
        (
            "  kl_divergence: {max: 0.1}",
            "  kl_divergence: {max: 0.1}\n  slices: {top1_agreement: {min: 0.5}}",
            "23: the gate top1_agreement has no measurement; add {metric: top1_agreement} to evaluate.quality.",
        ),
        (
            "  kl_divergence: {max: 0.1}",
            "  kl_divergence: {max: 0.1}\n  slices: {kl_divergence: {max: 0.5}}",
            "23: there are no slices without evaluate.text.tag, the field that tells them apart; add it.",
        ),
        (
            "  kl_divergence: {max: 0.1}",
            "  kl_divergence: {max: 0.1}\n  slices: {peak_memory: {max_ratio: 1}}",
            "23: unknown key 'peak_memory'; allowed: kl_divergence, top1_agreement, cloze_accuracy, greedy_agreement, "
            "embedding_cosine, similarity_rank, retrieval_agreement, retrieval_accuracy, class_agreement, class_accuracy, tasks.",
        ),
        (
            "  kl_divergence: {max: 0.1}",
            "  kl_divergence: {max: 0.1}\n  structured: {max_new_invalid: 0}",
            "23: the gate structured has no measurement; add structured: {} to evaluate.",
        ),
        (
            "  quality:\n",
            "  structured: {samples: 1}\n  quality:\n",
            "16: evaluate.structured.samples is 1; it must be greater than or equal to 2.",
        ),
        (
            "  quality:\n",
            "  structured: {items: {source: json}}\n  quality:\n",
            "16: evaluate.structured.items.source is 'json' (did you mean 'jsonl'?); allowed: extraction, jsonl.",
        ),
        (
            "{metric: decode_tokens_per_second}",
            "{metric: decode_tokens_per_second}\n    - {metric: time_to_first_token, prompt_tokens: [64, 256, 64]}",
            "21: the prompt length 64 is there already; remove one of the two.",
        ),
        (
            "{metric: decode_tokens_per_second}",
            "{metric: decode_tokens_per_second}\n    - {metric: time_to_first_token, prompt_tokens: []}",
            "21: evaluate.speed.1.prompt_tokens is empty; list at least 1.",
        ),
        (
            "{metric: decode_tokens_per_second}",
            "{metric: decode_tokens_per_second}\n    - {metric: time_to_first_token, prompt_tokens: [64, many]}",
            "21: evaluate.speed.1.prompt_tokens.1 is 'many'; it must be a valid integer.",
        ),
        (
            "{metric: decode_tokens_per_second}",
            "{metric: decode_tokens_per_second}\n    - {metric: inter_token_latency, prompt_tokens: [64, 256], new_tokens: 32}",
            "21: inter_token_latency asks for 32 new tokens after a prompt of 256, decode_tokens_per_second for 64; one request "
            "serves both, so give them the same new_tokens, or prompts of other lengths.",
        ),
        (
            "{metric: decode_tokens_per_second}",
            "{metric: decode_tokens_per_second}\n    - {metric: prefix_reuse, prompt_tokens: 64, prefix_tokens: 64}",
            "21: a prefix of 64 tokens leaves nothing of a prompt of 64 to compute; make it shorter than prompt_tokens.",
        ),
        (
            "  speed:",
            "  currency: EUR\n  speed:",
            "19: a currency belongs to a price; add price_per_hour, or remove this line.",
        ),
        (
            "  speed:",
            "  price_per_hour: 0.1\n  currency: euro\n  speed:",
            "20: evaluate.currency is 'euro'; write the price's currency as three letters, such as EUR.",
        ),
        (
            "  speed:",
            "  price_per_hour: 0\n  speed:",
            "19: evaluate.price_per_hour is 0; it must be greater than 0.",
        ),
        (
            "metric: decode_tokens_per_second}\n",
            "metric: load_time}\n  price_per_hour: 0.1\n",
            "21: what tokens cost follows from decode_tokens_per_second, which is not measured; add {metric: "
            "decode_tokens_per_second} to evaluate.speed, or remove this line.",
        ),
        (
            "decode_tokens_per_second: {min_speedup: 1.5}",
            "energy_per_output_token: {max_ratio: 0.9}",
            "23: the gate energy_per_output_token has no measurement; add {metric: energy_per_output_token} to evaluate.speed.",
        ),
        (
            "hf:org/name\n  revision: main",
            "./model.gguf\n  dequantize: true",
            "5: a GGUF file is always made float first; remove this line.",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_is_allowed(file: Path, old: str, new: str, problem: str) -> None:
    found = refused(file, changed(old, new))
    assert problem in found
    assert len(found) <= 2


def test_a_gate_of_structured_output_asks_for_something_and_is_of_quality(file: Path) -> None:
    measured = changed("  quality:\n", "  structured: {}\n  quality:\n")
    only = measured.replace("  kl_divergence: {max: 0.1}\n", "  structured: {max_new_invalid: 0, max_drop: 0.1}\n")
    declared = load(file, only).gate.declared()
    assert [criterion.model_dump() for name, criterion in declared.items() if name.startswith("structured.")] == [
        {"max_new_invalid": 0},
        {"max_drop": 0.1},
    ]
    nothing = measured.replace("  kl_divergence: {max: 0.1}\n", "  structured: {}\n  kl_divergence: {max: 0.1}\n")
    assert "23: this gate asks for nothing; add max_new_invalid or max_drop." in refused(file, nothing)


def test_a_prompt_length_is_a_number_or_a_list(file: Path) -> None:
    def lengths(text: str) -> tuple[int, ...]:
        recipe = load(file, TEXT, f"evaluate.speed.0={{metric: time_to_first_token, prompt_tokens: {text}}}", *without)
        metric = recipe.evaluate.speed[0]
        assert isinstance(metric, TimeToFirstTokenMetric)
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        return metric.prompt_tokens

    without = ("gate.decode_tokens_per_second=null",)
    assert (lengths("64"), lengths("[64]"), lengths("[64, 256, 1024]")) == ((64,), (64,), (64, 256, 1024))


def test_an_empty_list_of_metrics_is_refused(file: Path) -> None:
    text = changed("  quality:\n", "  quality: []\n  unused:\n")
    assert "16: evaluate.quality is empty; list at least 1." in refused(file, text)


def test_a_wrong_item_is_not_also_a_list_that_is_too_short(file: Path) -> None:
    found = refused(file, TEXT, "evaluate.quality=[{metric: nonsense}]")
    assert len(found) == 1
    assert "evaluate.quality.0.metric is 'nonsense'" in found[0]


def test_all_mistakes_are_shown_at_once_in_the_order_of_the_file(file: Path) -> None:
    text = TEXT.replace("name: small", "name: Small").replace("seed: 0", "sed: 0").replace("method: gptq", "method: x")
    text = text.replace("tokens: 100", "tokens: -1").replace("max: 0.1", "max: high").replace("version: 1\n", "")
    with pytest.raises(RecipeError) as caught:
        load(file, text)
    assert [problem.line for problem in caught.value.problems] == [1, 1, 5, 7, 16, 21]
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith(f"{file}:5: unknown key 'sed' (did you mean 'seed'?)")
    assert lines[5] == f"{file}:21: gate.kl_divergence.max is 'high'; it must be a valid number."


def test_contradictions_are_shown_together_too(file: Path) -> None:
    text = TEXT.replace("hf:org/name", "./here").replace("kl_divergence: {max: 0.1}", "peak_memory: {max_ratio: 0.5}")
    assert [problem.split(":")[0] for problem in refused(file, text)] == ["5", "21", "22"]


def test_a_file_that_is_something_else_gives_a_list_one_can_read(file: Path) -> None:
    found = refused(file, "".join(f"key{number}: {'x' * 500}\n" for number in range(2000)))
    assert len(found) == MAX_PROBLEMS
    assert max(map(len, found)) < 250


def test_long_values_are_cut_in_messages(file: Path) -> None:
    (problem,) = refused(file, changed("name: small", f"name: {'x' * 5000}"))
    assert len(problem) < 250


def test_assignments_are_validated_like_the_file_and_named(file: Path) -> None:
    recipe = load(file, TEXT, "evaluate.quality.0.tokens=7", "quantize={method: rtn, scheme: W8A16}", "publish=")
    assert recipe.evaluate.quality[0].model_dump() == {"metric": "kl_divergence", "tokens": 7}
    assert recipe.quantize.method == "rtn"
    assert recipe.publish is None
    with pytest.raises(RecipeError) as caught:
        load(file, TEXT, "calibration.samples=many", "calibation.seed=1", "gate.kl_divergence=null")
    shown = str(caught.value).splitlines()
    assert shown[0] == "--set calibration.samples=many: calibration.samples is 'many'; it must be a valid integer."
    assert shown[1].startswith("--set calibation.seed=1: unknown key 'calibation' (did you mean 'calibration'?)")
    with pytest.raises(RecipeError, match="no quality is gated"):
        load(file, TEXT, "gate.kl_divergence=null")


def test_a_recipe_never_changes(file: Path) -> None:
    recipe = load(file, TEXT)
    for part, name in [(recipe, "name"), (recipe.model, "source"), (recipe.evaluate.quality[0], "tokens")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, "x")
    assert hash(recipe) == hash(load(file, TEXT))


def models_within(model: type[BaseModel]) -> set[type[BaseModel]]:
    return {model}.union(*(models_within(child) for child in model.__subclasses__()))


def test_every_class_of_the_schema_is_strict_and_frozen() -> None:
    (strict,) = Recipe.__bases__
    classes = models_within(strict)
    assert len(classes) > 30
    for model in classes:
        config = model.model_config
        assert (config.get("extra"), config.get("frozen"), config.get("strict")) == ("forbid", True, True)


def test_infinite_numbers_are_refused_wherever_they_come_from() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Gate.model_validate({"kl_divergence": {"max": float("inf")}})


def test_the_digest_is_of_what_the_recipe_says(file: Path) -> None:
    digest = load(file, TEXT).digest()
    assert digest.startswith("sha256:")
    assert len(digest) == 7 + 64
    data = yaml.safe_load(TEXT)
    reordered = dict(
        reversed([(key, dict(reversed(v.items())) if isinstance(v, dict) else v) for key, v in data.items()])
    )
    same = [
        "# another comment\n" + TEXT.replace("\n", "\r\n"),
        json.dumps(reordered),
        TEXT.replace("{max: 0.1}", "{max: 1.0e-1}"),
        TEXT.replace("length: 64, ", "length: 64,   ").replace("method: gptq", "method: 'gptq'"),
        TEXT.replace("format: onnxruntime-genai", "format: onnxruntime-genai, accuracy_level: 4"),
    ]
    assert {load(file, text).digest() for text in same} == {digest}
    different = [
        TEXT.replace("seed: 0", "seed: 1"),
        TEXT.replace("{max: 0.1}", "{max: 0.2}"),
        TEXT.replace("revision: main", "revision: other"),
        TEXT.replace("name: small", "name: smaller"),
        TEXT.replace("lm_head", "embed"),
    ]
    assert len({load(file, text).digest() for text in different} | {digest}) == len(different) + 1


def test_every_gate_names_a_metric_that_can_be_measured() -> None:
    schema = Recipe.model_json_schema()
    metrics = {
        definition["properties"]["metric"]["const"]
        for definition in schema["$defs"].values()
        if "const" in definition.get("properties", {}).get("metric", {})
    }
    assert set(Gate.model_fields) - {"slices", "structured", "tasks"} == metrics
    assert set(QUALITY_GATES) == set(QualityGates.model_fields) < metrics


def test_the_json_schema_for_editors_knows_every_key() -> None:
    schema = Recipe.model_json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


def test_reading_a_recipe_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; from pathlib import Path; start = time.process_time(); import pydantic, yaml\n"
        "type('Model', (pydantic.BaseModel,), {})\n"
        "libraries = time.process_time() - start; import assay.recipe_file\n"
        "assay.recipe_file.load_recipe(Path(sys.argv[1]))\n"
        "print(time.process_time() - start, libraries, *({'torch', 'numpy', 'transformers', 'gguf'} & sys.modules.keys()))"
    )
    seconds: list[tuple[float, float]] = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", code, RECIPES[0]], capture_output=True, text=True, check=True)
        whole, libraries, *heavy = run.stdout.split()
        assert not heavy
        seconds.append((float(whole), float(libraries)))
    whole, libraries = (min(column) for column in zip(*seconds, strict=True))
    # Or, on a machine that is slow just now, in proportion to what the libraries take.
    assert whole < max(0.3, 1.6 * libraries)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["gptq", "W8A16", "python-docs", "jsonl", "kl_divergence", "metric", "none"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["source", "metric", "scheme", "max", "path", "kl_divergence", "x"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


def places(data: Any, place: str = "") -> list[str]:
    """The path of every value, as an assignment names it, and of a key that is not there."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    inner = [found for key, value in items for found in places(value, f"{place}.{key}".lstrip("."))]
    return [place or "unknown", f"{place}.metric".lstrip("."), *inner]


def assignment(place: str, value: Any) -> str:
    return f"{place}={json.dumps(value, ensure_ascii=False)}"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.builds(assignment, st.sampled_from(places(yaml.safe_load(TEXT))), VALUES), min_size=1, max_size=3))
def test_no_change_to_a_recipe_raises_anything_but_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, assignments: list[str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    try:
        recipe = load(file, TEXT, *assignments)
    except RecipeError as error:
        assert error.problems
        assert all("\n" not in problem.message and len(problem.message) < 600 for problem in error.problems)
    else:
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80))
def test_no_bytes_raise_anything_but_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(b"version: 1\nname: " + data)
    with pytest.raises(RecipeError):
        load_recipe(file)


# Tasks

TASKS = """\
  tasks:
    - {name: arc, kind: multiple_choice, items: {source: jsonl, path: arc.jsonl}, samples: 100}
    - {name: facts, kind: exact_match, items: {source: hf, name: org/facts, split: test}, extract: '\\d+'}
    - {name: piqa, kind: lm_eval, task: piqa, metric: acc_norm}
  speed:
"""
WITH_TASKS = changed("  speed:\n", TASKS).replace("gate:\n", "gate:\n  tasks: {arc: {max_drop: 0.02}}\n")


def test_tasks_are_read_and_gated_by_name(file: Path) -> None:
    recipe = load(file, WITH_TASKS)
    assert [(task.name, task.kind) for task in recipe.evaluate.tasks] == [
        ("arc", "multiple_choice"),
        ("facts", "exact_match"),
        ("piqa", "lm_eval"),
    ]
    assert recipe.gate.tasks is not None and recipe.gate.tasks["arc"].max_drop == 0.02
    assert load(file, TEXT).digest() != recipe.digest()


def test_gates_that_came_later_leave_the_digest_of_older_recipes() -> None:
    gate = Gate.model_validate_json(
        '{"kl_divergence": {"max": 0.1}, "slices": {"cloze_accuracy": {"max_drop": 0.05}}, "tasks": {"mc": {"max_drop": 0.02}}}'
    )
    assert sha256_bytes(canonical_json(gate.model_dump(mode="json"))) == (
        "sha256:024b7ac87730cf548ae996d9f34eb1cc8ea20627dd743aa2892ad828fbcbc8e4"
    )


def test_the_slices_of_a_task_are_gated_by_its_own_tag(file: Path) -> None:
    text = WITH_TASKS.replace("samples: 100}", "samples: 100, tag: topic}")
    text = text.replace("gate:\n", "gate:\n  slices: {tasks: {arc: {max_drop: 0.05}}}\n")
    slices = load(file, text).gate.slices
    assert slices is not None and slices.tasks is not None and slices.tasks["arc"].max_drop == 0.05
    for old, new, problem in (
        (
            ", tag: topic",
            "",
            "the task arc has no slices without a tag, the field that tells them apart; add it there.",
        ),
        ("slices: {tasks: {arc:", "slices: {tasks: {ark:", "there is no task 'ark' (did you mean 'arc'?)"),
        (
            "slices: {tasks:",
            "slices: {kl_divergence: {max: 1}, tasks:",
            "there are no slices without evaluate.text.tag",
        ),
        ("slices: {tasks: {arc: {max_drop: 0.05}}}", "slices: {}", "there are no slices without evaluate.text.tag"),
    ):
        with pytest.raises(RecipeError, match=re.escape(problem)):
            load(file, text.replace(old, new))


def test_a_task_is_quality_enough_to_gate(file: Path) -> None:
    text = WITH_TASKS.replace("  kl_divergence: {max: 0.1}\n", "")
    assert load(file, text).gate.declared().keys() == {"decode_tokens_per_second"}


GATE = "{arc: {max_drop: 0.02}}"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            GATE,
            "{ark: {max_drop: 0.02}}",
            "26: there is no task 'ark' (did you mean 'arc'?); evaluate.tasks has: arc, facts, piqa.",
        ),
        (
            GATE,
            "{arc: {maxdrop: 0.02, max_drop: 0.02}}",
            "26: unknown key 'maxdrop' (did you mean 'max_drop'?); allowed: max_drop.",
        ),
        (GATE, "{arc: {}}", "26: gate.tasks.arc.max_drop is missing."),
        ("name: facts", "name: arc", "21: there is a task 'arc' already; give each a name of its own."),
        (
            "name: facts",
            "name: the facts",
            "21: evaluate.tasks.1.name is 'the facts'; write letters, digits, dashes and underscores.",
        ),
        (
            "samples: 100",
            "seed: 1",
            "20: seed draws samples, and all items are asked for; add samples, or remove this line.",
        ),
        (
            "'\\d+'",
            "'(\\d+'",
            "21: extract is no regular expression: missing ), unterminated subpattern at position 0.",
        ),
        (
            "kind: exact_match",
            "kind: exact",
            "21: evaluate.tasks.1.kind is 'exact' (did you mean 'exact_match'?); allowed: multiple_choice, exact_match, lm_eval.",
        ),
        (
            "source: jsonl",
            "source: json",
            "20: evaluate.tasks.0.items.source is 'json' (did you mean 'jsonl'?); allowed: jsonl, hf.",
        ),
        ("samples: 100", "labels: [yes]", "20: evaluate.tasks.0.labels is empty; list at least 2."),
        (
            "samples: 100",
            "answers: gold",
            "20: unknown key 'answers'; allowed: name, samples, seed, group, tag, chat, kind, items, id, query, choices, gold, "
            "labels, delimiter, normalized.",
        ),
    ],
)
def test_a_mistake_in_a_task_is_named_by_its_line(file: Path, old: str, new: str, problem: str) -> None:
    assert WITH_TASKS.count(old) == 1
    assert problem in refused(file, WITH_TASKS.replace(old, new))
