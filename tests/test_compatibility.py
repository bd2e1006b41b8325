"""What a recipe asks of a model or target that cannot be done is refused by name and line, before anything is computed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from assay.compatibility import check_model, shape_problems
from assay.errors import IntegrityError, Problem, RecipeError
from assay.models.architectures import DecoderShape, decoder_shape
from assay.recipe import GroupedScheme
from assay.recipe_file import load_recipe

RECIPE = """\
version: 1
name: tiny
model: {source: ./model}
calibration: {source: python-docs, samples: 8, length: 64}
quantize:
  scheme: W4A16
  group_size: 32
  method: rtn
  overrides:
    - {match: lm_head, scheme: W8A16}
target: {format: onnxruntime-genai}
evaluate:
  length: 128
  quality:
    - {metric: kl_divergence, tokens: 500}
  speed:
    - {metric: decode_tokens_per_second, prompt_tokens: 64, new_tokens: 16}
    - {metric: time_to_first_token, prompt_tokens: 64}
    - {metric: size_on_disk}
gate: {kl_divergence: {max: 0.1}}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SHAPE = decoder_shape(CONFIG, "here")


@pytest.fixture
def problems(tmp_path: Path) -> Callable[..., list[Problem]]:
    """Problems of the recipe above with one text replaced by another."""

    def check(
        old: str = "", new: str = "", shape: DecoderShape = SHAPE, assignments: tuple[str, ...] = ()
    ) -> list[Problem]:
        assert old in RECIPE
        path = tmp_path / "tiny.yaml"
        path.write_text(RECIPE.replace(old, new))
        recipe, document = load_recipe(path, assignments)
        found = shape_problems(recipe, shape, document)
        assert all(problem.file == str(path) or problem.file.startswith("--set") for problem in found)
        return found

    return check


Check = Callable[..., list[Problem]]


def test_a_recipe_that_fits_has_no_problem(problems: Check) -> None:
    assert problems() == []


def test_a_group_size_that_does_not_divide_is_named_with_sizes_that_do(problems: Check) -> None:
    shape = decoder_shape(CONFIG | {"head_dim": 48}, "here")  # o_proj has 192 inputs, too
    assert problems("group_size: 32", "group_size: 64", shape) == []
    (problem,) = problems("group_size: 32", "group_size: 128", shape)
    assert (problem.line, problem.message) == (
        7,
        "group_size 128 does not divide the inputs of down_proj (320 inputs), gate_proj (192 inputs), k_proj (192 inputs), "
        "lm_head (192 inputs), o_proj (192 inputs), q_proj (192 inputs), up_proj (192 inputs), v_proj (192 inputs) "
        "(15 Linears); sizes that work: 32, 64, channel.",
    )


def test_inputs_that_no_group_size_divides_leave_the_whole_row(problems: Check) -> None:
    shape = decoder_shape(CONFIG | {"intermediate_size": 100}, "here")
    (problem,) = problems(shape=shape)
    assert (
        problem.message
        == "group_size 32 does not divide the inputs of down_proj (100 inputs) (2 Linears); sizes that work: channel."
    )
    assert problems("group_size: 32", "group_size: channel", shape) == []


def test_each_group_size_that_does_not_divide_is_a_problem_at_its_own_line(problems: Check) -> None:
    shape = decoder_shape(CONFIG | {"hidden_size": 96, "head_dim": 48}, "here")
    old = "    - {match: lm_head, scheme: W8A16}"
    found = problems(
        old,
        f"{old}\n    - {{match: '*.down_proj', scheme: W8A16, group_size: 128}}",
        shape,
        ("quantize.group_size=64",),
    )
    assert [(problem.line, problem.file.startswith("--set"), problem.message[:14]) for problem in found] == [
        (0, True, "group_size 64 "),
        (11, False, "group_size 128"),
    ]
    assert "down_proj (320 inputs) (2 Linears); sizes that work: 32, 64, channel." in found[1].message


def test_the_size_that_was_asked_for_need_not_be_written_down(problems: Check) -> None:
    shape = decoder_shape(CONFIG | {"hidden_size": 96, "head_dim": 48}, "here")
    (problem,) = problems("  group_size: 32\n", "", shape)
    assert (problem.line, problem.message[:14]) == (5, "group_size 64 ")


def test_an_override_that_matches_nothing_is_named_with_what_there_is(problems: Check) -> None:
    old = "    - {match: lm_head, scheme: W8A16}"
    found = problems(old, f"{old}\n    - {{match: '*.q_prj', scheme: W8A16}}\n    - {{match: head, scheme: none}}")
    assert [problem.line for problem in found] == [11, 12]
    assert found[0].message == (
        "the override '*.q_prj' matches no module; there are lm_head and, in each layer, self_attn.q_proj, self_attn.k_proj, "
        "self_attn.v_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj."
    )
    assert "the override 'head' matches no module" in found[1].message


def test_an_override_behind_one_that_wins_still_matches(problems: Check) -> None:
    old = "    - {match: lm_head, scheme: W8A16}"
    assert problems(old, f"{old}\n    - {{match: 'lm_*', scheme: none}}") == []


def test_overrides_that_leave_nothing_are_a_problem(problems: Check) -> None:
    (problem,) = problems("{match: lm_head, scheme: W8A16}", "{match: '*', scheme: none}")
    assert (problem.line, problem.message) == (9, "the overrides leave nothing to quantize.")


@pytest.mark.parametrize(
    "override",
    [
        "{match: '*.q_proj', scheme: W8A16}",
        "{match: '*.v_proj', scheme: none}",
        "{match: '*.k_proj', scheme: W4A16, group_size: channel}",
        "{match: 'model.layers.1.self_attn.[qk]_proj', scheme: W8A16}",
        "{match: '*.v_proj', scheme: W4A16_ASYM}",
    ],
)
def test_q_k_and_v_are_one_product_for_onnxruntime(problems: Check, override: str) -> None:
    old = "{match: lm_head, scheme: W8A16}"
    (problem,) = problems(old, override)
    layer = 1 if "layers.1" in override else 0
    names = ", ".join(f"model.layers.{layer}.self_attn.{letter}_proj" for letter in "qkv")
    assert problem.line == 9
    assert problem.message.startswith(
        f"onnxruntime-genai computes {names} as one product, so they need the same scheme"
    )
    assert 'let one override match all of them, e.g. "*.self_attn.[qkv]_proj".' in problem.message


def test_the_advice_on_q_k_and_v_works(problems: Check) -> None:
    assert problems("{match: lm_head, scheme: W8A16}", '{match: "*.self_attn.[qkv]_proj", scheme: W8A16}') == []


@pytest.mark.parametrize(
    ("match", "example"), [("*.q_proj", "*.self_attn.[qkv]_proj"), ("*.gate_proj", "*.mlp.[gu]*_proj")]
)
def test_what_serving_engines_fuse_needs_one_scheme(tmp_path: Path, match: str, example: str) -> None:
    """Known before anything is quantized; and what the message proposes is right."""

    def found(pattern: str) -> list[Problem]:
        changed = RECIPE.replace("onnxruntime-genai", "compressed-tensors").replace(
            "match: lm_head", f"match: '{pattern}'"
        )
        changed = re.sub(r"    - {metric: (decode|time).*\n", "", changed)
        (tmp_path / "apart.yaml").write_text(changed)
        recipe, document = load_recipe(tmp_path / "apart.yaml")
        return list(shape_problems(recipe, SHAPE, document))

    (problem,) = found(match)
    assert (
        "serving engines such as vLLM compute model.layers.0." in problem.message and f'"{example}"' in problem.message
    )
    assert found(example) == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [("samples: 8, length: 64", "samples: 8, length: 257", 4), ("length: 128", "length: 257", 13)],
)
def test_windows_longer_than_the_context_are_a_problem(problems: Check, old: str, new: str, line: int) -> None:
    (problem,) = problems(old, new)
    assert (problem.line, problem.message) == (line, "length 257 exceeds the model's context of 256 tokens.")
    assert problems(old, new.replace("257", "256")) == []


def test_every_length_that_is_too_long_is_a_problem(problems: Check) -> None:
    short = decoder_shape(CONFIG | {"max_position_embeddings": 32}, "here")
    assert [problem.line for problem in problems(shape=short)] == [4, 13, 17, 18]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("prompt_tokens: 64, new_tokens: 16", "prompt_tokens: 241, new_tokens: 16", 17),
        (
            "{metric: time_to_first_token, prompt_tokens: 64}",
            "{metric: time_to_first_token, prompt_tokens: [8, 256]}",
            18,
        ),
    ],
)
def test_prompts_longer_than_the_context_are_a_problem(problems: Check, old: str, new: str, line: int) -> None:
    (problem,) = problems(old, new)
    assert (problem.line, problem.message) == (
        line,
        "a request of 257 tokens exceeds the model's context of 256 tokens.",
    )


def test_an_unknown_context_refuses_nothing(problems: Check) -> None:
    unknown = decoder_shape({key: value for key, value in CONFIG.items() if key != "max_position_embeddings"}, "here")
    assert problems("samples: 8, length: 64", "samples: 8, length: 9999", unknown) == []


@pytest.fixture
def recipe_at(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """The recipe above beside a model directory with this config.json."""

    def make(config: dict[str, object]) -> Path:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        (tmp_path / "tiny.yaml").write_text(RECIPE)
        return tmp_path / "tiny.yaml"

    return make


def check(path: Path) -> DecoderShape | None:
    return check_model(*load_recipe(path), path.parent, fetch=False)


def test_a_model_that_fits_gives_its_shape(recipe_at: Callable[..., Path]) -> None:
    assert check(recipe_at(CONFIG)) == SHAPE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            "GPT2LMHeadModel of model_type 'gpt2' is not supported yet",
        ),
        ({"auto_map": {"AutoModel": "evil.Evil"}}, "the model brings its own Python code"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_a_model_that_is_not_supported_is_a_problem_at_its_line(
    recipe_at: Callable[..., Path], changes: dict[str, object], words: str
) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        check(recipe_at(CONFIG | changes))
    assert [(problem.line, problem.message[:9]) for problem in caught.value.problems] == [(3, "./model: ")]


def test_a_model_that_is_not_there_is_a_problem_at_its_line(recipe_at: Callable[..., Path]) -> None:
    path = recipe_at(CONFIG)
    path.write_text(RECIPE.replace("./model", "./modle"))
    with pytest.raises(RecipeError, match="modle does not exist") as caught:
        check(path)
    assert [problem.line for problem in caught.value.problems] == [3]


def test_every_problem_with_the_model_is_told_at_once(recipe_at: Callable[..., Path]) -> None:
    path = recipe_at(CONFIG | {"intermediate_size": 100, "max_position_embeddings": 100})
    path.write_text(RECIPE.replace("match: lm_head", "match: nothing"))
    with pytest.raises(RecipeError) as caught:
        check(path)
    assert sorted(problem.line for problem in caught.value.problems) == [7, 10, 13]


def test_a_quantized_model_is_a_problem_unless_the_recipe_says_to_make_it_float(recipe_at: Callable[..., Path]) -> None:
    path = recipe_at(CONFIG | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(RecipeError, match=r"already quantized \(gptq\).*model\.dequantize: true") as caught:
        check(path)
    assert [problem.line for problem in caught.value.problems] == [3]
    path.write_text(RECIPE.replace("./model}", "./model, dequantize: true}"))
    assert check(path) == SHAPE


def test_a_float_model_needs_no_dequantizing(recipe_at: Callable[..., Path]) -> None:
    path = recipe_at(CONFIG)
    path.write_text(RECIPE.replace("./model}", "./model, dequantize: true}"))
    with pytest.raises(RecipeError, match="says nothing of quantized weights; remove this line"):
        check(path)


def test_a_damaged_model_is_no_fault_of_the_recipe(recipe_at: Callable[..., Path]) -> None:
    path = recipe_at(CONFIG)
    (path.parent / "model" / "config.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"config\.json: not valid JSON"):
        check(path)


def test_a_scheme_of_fixed_groups_names_the_linears_that_they_do_not_divide(problems: Check) -> None:
    (problem,) = problems(
        "scheme: W4A16\n  group_size: 32", "scheme: FP8_BLOCK", assignments=checkpoint("compressed-tensors")
    )
    assert problem.message.startswith("FP8_BLOCK has one scale for every 128 inputs, which does not divide those of ")
    assert "another scheme in overrides" in problem.message


HEAD = "    - {match: lm_head, scheme: W8A16}"


def checkpoint(target: str) -> tuple[str, ...]:
    return (f"target={{format: {target}}}", "evaluate.speed=[]")


@pytest.mark.parametrize(
    ("target", "old", "new", "problem"),
    [
        (
            "onnxruntime-genai",
            "scheme: W4A16\n  group_size: 32",
            "scheme: FP8",
            "6: onnxruntime-genai cannot hold FP8; schemes that work: W4A16, W4A16_ASYM, W8A16. compressed-tensors takes FP8.",
        ),
        (
            "awq",
            "scheme: W4A16\n  group_size: 32",
            "scheme: MXFP4",
            "6: awq cannot hold MXFP4; schemes that work: W4A16, W4A16_ASYM. compressed-tensors takes MXFP4.",
        ),
        (
            "awq",
            "lm_head, scheme: W8A16",
            "lm_head, scheme: W4A16",
            "10: awq keeps lm_head in floats: most of its readers look for a plain lm_head.weight; compressed-tensors takes it.",
        ),
        (
            "awq",
            HEAD,
            "    - {match: '*.1.mlp.down_proj', scheme: W4A16, group_size: 64}",
            "10: awq has one scheme and group size for all, but model.layers.1.mlp.down_proj would differ from "
            "model.layers.0.self_attn.q_proj; compressed-tensors takes it.",
        ),
        (
            "gptq",
            "lm_head, scheme: W8A16",
            "lm_head, scheme: W4A16_ASYM",
            "10: gptq has one scheme and group size for all, but lm_head would differ from model.layers.0.self_attn.q_proj; "
            "compressed-tensors takes it.",
        ),
        (
            "gptq",
            HEAD,
            "    - {match: '*.down_proj', scheme: none}",
            "10: gptq has no list of Linears that stay as they are, but model.layers.0.mlp.down_proj and 1 more would; "
            "compressed-tensors takes it, and so does awq.",
        ),
        (
            "modelopt",
            HEAD,
            "    - {match: lm_head, scheme: none}",
            "6: modelopt cannot hold W4A16; schemes that work: FP8, NVFP4. compressed-tensors takes W4A16.",
        ),
    ],
)
def test_what_a_format_cannot_say_is_refused_at_its_line(
    problems: Check, target: str, old: str, new: str, problem: str
) -> None:
    assignments = () if target == "onnxruntime-genai" else checkpoint(target)
    assert problem in [f"{found.line}: {found.message}" for found in problems(old, new, assignments=assignments)]


@pytest.mark.parametrize(("target", "packed"), [("awq", "100 outputs"), ("gptq", "100 outputs")])
def test_words_that_are_not_filled_are_refused(problems: Check, target: str, packed: str) -> None:
    shape = decoder_shape(CONFIG | {"intermediate_size": 100}, "here")
    override = "    - {match: lm_head, scheme: none}"
    found = problems(HEAD, override, shape, (*checkpoint(target), "quantize.group_size=channel"))
    assert [problem.message for problem in found] == [
        f"{target} packs codes into words of 32 bits, which the {packed} of model.layers.0.mlp.gate_proj do not fill; "
        "compressed-tensors takes it."
    ]
    assert problems(HEAD, override, assignments=checkpoint(target)) == []


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("awq", "has no place for the scales of a key/value cache"),
        ("gptq", "has no place for the scales of a key/value cache"),
        ("onnxruntime-genai", "keeps its key/value cache in floats"),
        ("compressed-tensors", None),
    ],
)
def test_a_quantized_cache_needs_a_place_for_its_scales(problems: Check, target: str, reason: str | None) -> None:
    old, new = "  method: rtn", "  method: rtn\n  kv_cache: fp8"
    found = problems(old, new, assignments=checkpoint(target))
    wanted = [f"{target} {reason}; remove kv_cache, or compile for compressed-tensors."] if reason else []
    assert [problem.message for problem in found if "kv_cache" in problem.message] == wanted
    assert all(problem.line == 9 for problem in found if "kv_cache" in problem.message)


@pytest.mark.parametrize(
    ("scheme", "target", "engine", "reason"),
    [
        ("W8A8", "compressed-tensors", "tensorrt-llm", "would take the INT8 weights for FP8"),
        (
            "W4A16",
            "compressed-tensors",
            "tensorrt-llm",
            "asks a compressed-tensors checkpoint how its activations are quantized",
        ),
        ("FP8", "compressed-tensors", "tensorrt-llm", "with one scale for the whole tensor; use target modelopt"),
        ("FP8", "modelopt", "tensorrt-llm", None),
        ("FP8", "compressed-tensors", "vllm", None),
        ("W4A16", "gptq", "tensorrt-llm", "TensorRT-LLM loads no gptq checkpoints"),
        ("W4A16", "gptq", "vllm", None),
        ("W4A16_ASYM", "gptq", "vllm", "vLLM loads no gptq checkpoint with zero points of its own"),
        ("W4A16_ASYM", "gptq", "sglang", "would take every zero point of gptq_v2 for one more than it is"),
        ("W4A16_ASYM", "gptq", None, None),
        ("W4A16_ASYM", "awq", "vllm", None),
    ],
)
def test_what_an_engine_does_not_read_is_refused_at_its_name(
    tmp_path: Path, scheme: str, target: str, engine: str | None, reason: str | None
) -> None:
    found = at_engine(tmp_path, scheme, target, engine, SHAPE)
    assert len(found) == (reason is not None)
    for problem in found:
        assert problem.line == (9 if scheme.startswith("W4") else 8)
        assert problem.message.startswith(
            f"{engine} cannot serve {scheme} (model.layers.0.self_attn.q_proj and 13 more) from "
        )
        assert reason is not None and reason in problem.message


def test_blocks_that_are_not_whole_are_refused_for_vllm(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    shape = decoder_shape(CONFIG | sizes, "here")
    assert at_engine(tmp_path, "FP8_BLOCK", "compressed-tensors", "vllm", shape) == []
    ragged = decoder_shape(CONFIG | sizes | {"num_key_value_heads": 1}, "here")
    (problem,) = at_engine(tmp_path, "FP8_BLOCK", "compressed-tensors", "vllm", ragged)
    assert problem.message == (
        "vllm cannot serve FP8_BLOCK (model.layers.0.self_attn.k_proj and 3 more) from compressed-tensors: vLLM needs whole "
        "blocks of 128 rows and columns; use FP8_DYNAMIC."
    )
    assert at_engine(tmp_path, "FP8_BLOCK", "compressed-tensors", "sglang", ragged) == []


def at_engine(tmp_path: Path, scheme: str, target: str, engine: str | None, shape: DecoderShape) -> list[Problem]:
    """Problems of a recipe of one scheme for one target and engine."""
    group_size = "  group_size: 32\n" if scheme in get_args(GroupedScheme) else ""
    text = RECIPE.replace("scheme: W4A16\n  group_size: 32\n", f"scheme: {scheme}\n{group_size}")
    text = text.replace(f"  overrides:\n{HEAD}\n", "")
    text = text.replace("{format: onnxruntime-genai}", f"{{format: {target}, engine: {engine or 'null'}}}")
    text = re.sub(r"    - {metric: (decode|time).*\n", "", text)
    (tmp_path / "engine.yaml").write_text(text)
    recipe, document = load_recipe(tmp_path / "engine.yaml")
    return list(shape_problems(recipe, shape, document))


def test_a_family_that_the_builder_was_not_tried_with_is_refused(problems: Check) -> None:
    shape = decoder_shape(CONFIG | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}, "here")
    (problem,) = problems(shape=shape)
    assert problem.line == 11
    assert problem.message == (
        "onnxruntime-genai takes models of type llama, mistral, qwen2, qwen3 here, not granite; compressed-tensors takes it."
    )


def test_tasks_of_the_harness_need_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = "  tasks:\n    - {name: arc, kind: lm_eval, task: arc_easy}\n  speed:\n"
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("  speed:\n", task), encoding="utf-8")
    recipe, document = load_recipe(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as caught:
        check_model(recipe, document, tmp_path, fetch=False)
    (problem,) = caught.value.problems
    assert problem.line == 17 and "need the extra `lm-eval`: pip install 'assay[lm-eval]'" in problem.message
