"""What every target promises, for every family and scheme: the artifact is the quantizer's numbers, and it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from assay.errors import AssayError, NotSupportedError
from assay.files import sha256_file
from assay.models.architectures import ARCHITECTURES
from assay.models.checkpoint import TOKENIZER_FILES
from assay.quantize.schemes import assign_schemes
from assay.recipe import Recipe
from assay.requirements import check_host
from assay.targets import TARGETS
from assay.targets.realized import verify
from assay_evals.runtimes.base import open_runtime

COMPRESSED = {"format": "compressed-tensors"}
GENAI = {"format": "onnxruntime-genai", "accuracy_level": 0}
# Its model builder takes 10 s for each family: slow.
GENAI_ROW = pytest.param(GENAI, id="onnxruntime-genai", marks=pytest.mark.slow)
COMPRESSED_ROW = pytest.param(COMPRESSED, id="compressed-tensors")
AWQ_ROW, GPTQ_ROW, MODELOPT_ROW = (pytest.param({"format": name}, id=name) for name in ("awq", "gptq", "modelopt"))
MIXING_ROWS = [COMPRESSED_ROW, GENAI_ROW]
INTEGER_ROWS = [*MIXING_ROWS, AWQ_ROW, GPTQ_ROW]
TARGET_ROWS = [*INTEGER_ROWS, MODELOPT_ROW]
FAMILY_ROWS = ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("mistral", "qwen2", "qwen3"))]
# Those that only checkpoints are written for here.
OTHER_FAMILIES = [
    pytest.param(family, marks=pytest.mark.slow)
    for family in ("mixtral", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3")
]
SCHEMES = ["W4A16", "W4A16_ASYM", "W8A16"]
GROUPS = [32, pytest.param(64, marks=pytest.mark.slow), "channel"]
HEADS: dict[str, list[dict[str, Any]]] = {
    "float head": [],
    "8-bit head": [{"match": "lm_head", "scheme": "W8A16"}],
    "asymmetric head": [{"match": "lm_head", "scheme": "W4A16_ASYM"}],
}
# As much as a target can hold at once.
RICH: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"scheme": "W4A16_ASYM", "overrides": HEADS["8-bit head"]},
    "onnxruntime-genai": {"scheme": "W4A16_ASYM", "overrides": HEADS["8-bit head"]},
    "awq": {"scheme": "W4A16_ASYM"},
    "gptq": {"scheme": "W4A16_ASYM", "overrides": HEADS["asymmetric head"]},
    "modelopt": {"scheme": "NVFP4", "group_size": None},
}
# The heads that there may be beside these schemes of the layers.
COMBINATIONS = [
    *((row, scheme, head) for row in MIXING_ROWS for scheme in SCHEMES for head in ("float head", "8-bit head")),
    *((AWQ_ROW, scheme, "float head") for scheme in SCHEMES[:2]),
    *((GPTQ_ROW, scheme, "float head") for scheme in SCHEMES),
    (GPTQ_ROW, "W4A16_ASYM", "asymmetric head"),
    (GPTQ_ROW, "W8A16", "8-bit head"),
]
CASES = [
    pytest.param(
        *row.values,
        scheme,
        HEADS[head],
        family,
        marks=[*row.marks, *([pytest.mark.slow] if family != "llama" else [])],
        id=f"{row.id}-{scheme}-{head}-{family}",
    )
    for row, scheme, head in COMBINATIONS
    # The layouts of words know nothing of families.
    for family in (("llama",) if row in (AWQ_ROW, GPTQ_ROW) else ("llama", "mistral", "qwen2", "qwen3"))
]
PROMPT = [5, 400, 17, 301, 77, 8, 9, 250, 33, 4, 511, 1]


def close_to(expected: np.ndarray, share: float) -> Any:
    return pytest.approx(expected, abs=share * float(np.abs(expected).max()), rel=0)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("target", "scheme", "head", "family"), CASES)
def test_an_artifact_holds_and_computes_the_quantizers_numbers(
    bench: Any,
    recipe_for: Callable[..., Recipe],
    *,
    target: dict[str, Any],
    family: str,
    scheme: str,
    group_size: int | str,
    head: list[dict[str, Any]],
) -> None:
    check(bench, recipe_for(target, scheme=scheme, group_size=group_size, overrides=head), family)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_every_other_family_is_held_and_computed(bench: Any, recipe_for: Callable[..., Recipe], family: str) -> None:
    check(bench, recipe_for(COMPRESSED, **RICH["compressed-tensors"]), family)


@pytest.mark.slow
@pytest.mark.parametrize("target", [AWQ_ROW, GPTQ_ROW])
@pytest.mark.parametrize("family", ["mixtral", "phi3"])
def test_experts_and_fused_linears_fit_other_layouts(
    bench: Any, recipe_for: Callable[..., Recipe], target: dict[str, Any], family: str
) -> None:
    check(bench, recipe_for(target, **RICH[target["format"]]), family)


def check(bench: Any, recipe: Recipe, family: str) -> None:
    directory, realization = bench.build(recipe, family)
    checkpoint, modules = bench.checkpoint(family), bench.modules(recipe, family)

    stored = bench.target(recipe).read_back(directory, checkpoint.shape)
    assert set(stored) == set(modules)
    for name, module in modules.items():
        assert torch.equal(stored[name].weight, module.weight.dequantize()), name
        assert stored[name].bits == module.weight.scheme.bits

    schemes = assign_schemes(recipe.quantize, checkpoint.shape).schemes
    assert check_host({"requires": realization.requires}, "m") == (), "where it was built it runs"
    rows = {row["name"]: row["scheme"] for row in realization.layers}
    assert rows == {linear.name: "none" for linear in checkpoint.shape.linears} | {
        name: assigned.name for name, assigned in schemes.items()
    }

    runtime = open_runtime(TARGETS[recipe.target.format].runtime, directory)
    # Token by token, too: products of a single row have kernels of their own.
    generated = list(runtime.generate(PROMPT, 6).tokens)
    sequence = PROMPT + generated
    expected = bench.expected_logits(recipe, family, sequence)
    assert runtime.logits(sequence) == close_to(expected, 2e-6)
    assert runtime.logits(sequence[:1]) == close_to(expected[:1], 2e-6)
    assert generated == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist()


def test_4_bit_symmetric_grids_of_the_matrix_are_turned_both_ways(
    bench: Any, recipe_for: Callable[..., Recipe]
) -> None:
    """Negative scales must come up, or nothing shows that formats and kernels take them."""
    for module in bench.modules(recipe_for(COMPRESSED), "llama").values():
        assert bool((module.weight.scales < 0).any())
        assert bool((module.weight.scales > 0).any())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("target", INTEGER_ROWS)
def test_other_dtypes_of_the_source_are_just_as_exact(
    bench: Any, recipe_for: Callable[..., Recipe], target: dict[str, Any], dtype: str
) -> None:
    family = f"llama.{dtype}"
    recipe = recipe_for(target, **RICH[target["format"]])
    directory, _ = bench.build(recipe, family)
    runtime = open_runtime(TARGETS[recipe.target.format].runtime, directory)
    assert runtime.logits(PROMPT) == close_to(bench.expected_logits(recipe, family, PROMPT), 2e-6)


@pytest.mark.parametrize("family", FAMILY_ROWS)
@pytest.mark.parametrize("target", TARGET_ROWS)
def test_the_baseline_is_the_unquantized_model(
    bench: Any,
    recipe_for: Callable[..., Recipe],
    tiny_model: Callable[[str], Path],
    target: dict[str, Any],
    family: str,
) -> None:
    from transformers import AutoModelForCausalLM

    recipe = recipe_for(target)
    runtime = open_runtime(TARGETS[recipe.target.format].runtime, bench.baseline(recipe, family))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    assert runtime.logits(PROMPT) == close_to(expected, 2e-6)


@pytest.mark.parametrize("target", TARGET_ROWS)
def test_two_builds_are_the_same_bytes(bench: Any, recipe_for: Callable[..., Recipe], target: dict[str, Any]) -> None:
    def digests(directory: Path) -> dict[str, str]:
        return {path.name: sha256_file(path) for path in directory.iterdir()}

    recipe = recipe_for(target, **RICH[target["format"]])
    again = bench.fresh()
    bench.target(recipe).build_baseline(bench.checkpoint("llama"), again)
    assert digests(again) == digests(bench.baseline(recipe, "llama"))
    (first, _), (second, _) = bench.build(recipe, "llama"), bench.build(recipe, "llama")
    assert digests(first) == digests(second)
    assert all(path.is_file() for path in first.iterdir())


@pytest.mark.parametrize("target", TARGET_ROWS)
def test_the_tokenizer_is_the_sources_byte_for_byte(
    bench: Any, recipe_for: Callable[..., Recipe], target: dict[str, Any]
) -> None:
    recipe = recipe_for(target, **RICH[target["format"]])
    source = bench.checkpoint("llama").directory
    wanted = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    assert "tokenizer.json" in wanted
    candidate, _ = bench.build(recipe, "llama")
    for directory in (bench.baseline(recipe, "llama"), candidate):
        assert {
            name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()
        } == wanted


@pytest.mark.parametrize("target", TARGET_ROWS)
def test_a_layer_that_stays_float_is_an_error(
    bench: Any, recipe_for: Callable[..., Recipe], target: dict[str, Any]
) -> None:
    recipe = recipe_for(target, **RICH[target["format"]])
    modules = bench.modules(recipe, "llama")
    del modules["model.layers.1.mlp.down_proj"]
    with pytest.raises(AssayError, match=r"model.layers.1.mlp.down_proj was to be \w+, but .* holds float weights"):
        bench.build(recipe, "llama", modules)


@pytest.mark.parametrize("target", MIXING_ROWS)
def test_two_schemes_in_one_product_are_refused(
    bench: Any, recipe_for: Callable[..., Recipe], target: dict[str, Any]
) -> None:
    for override in (
        {"match": "*.1.self_attn.v_proj", "scheme": "W8A16"},
        {"match": "*.1.self_attn.k_proj", "scheme": "none"},
        {"match": "*.1.self_attn.q_proj", "scheme": "W4A16", "group_size": 64},
    ):
        recipe = recipe_for(target, overrides=[override])
        with pytest.raises(NotSupportedError, match=r"layers.1.self_attn.q_proj, .* same scheme and group size"):
            bench.build(recipe, "llama")


@pytest.mark.parametrize("target", INTEGER_ROWS)
def test_numbers_that_were_changed_after_quantizing_are_noticed(
    bench: Any, recipe_for: Callable[..., Recipe], target: dict[str, Any]
) -> None:
    """The files hold one run's numbers, the manifest is to tell of another's."""
    recipe = recipe_for(target, scheme="W4A16_ASYM")
    directory, _ = bench.build(recipe, "llama")
    shape = bench.checkpoint("llama").shape
    stored = bench.target(recipe).read_back(directory, shape)
    other = recipe_for(target, scheme="W4A16_ASYM", range="minmax")
    assigned = assign_schemes(recipe.quantize, shape).schemes
    verify(shape, assigned, bench.modules(recipe, "llama"), stored)
    with pytest.raises(AssayError, match="not the ones that the quantizer chose"):
        verify(shape, assigned, bench.modules(other, "llama"), stored)


def test_every_target_and_every_family_has_its_row() -> None:
    def values(rows: list[Any]) -> list[Any]:
        return [getattr(row, "values", (row,))[0] for row in rows]

    assert {target["format"] for target in values(TARGET_ROWS)} == {
        name for name, row in TARGETS.items() if not row.encoders
    }
    assert set(values(FAMILY_ROWS + OTHER_FAMILIES)) == {row.model_type for row in ARCHITECTURES.values()}
