"""The recipes that ship with Assay, against their models: what is here as it is, the others by the numbers of their config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from assay.compatibility import check_model, shape_problems
from assay.models.architectures import decoder_shape
from assay.recipe_file import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
# What the published config.json of each model says of its shape.
CONFIGS: dict[str, dict[str, Any]] = {
    "hf:meta-llama/Llama-3.1-8B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "hf:Qwen/Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "hf:Qwen/Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_model(path: Path) -> None:
    recipe, document = load_recipe(path)
    if recipe.model.source in CONFIGS:
        shape = decoder_shape(CONFIGS[recipe.model.source], recipe.model.source)
        assert shape_problems(recipe, shape, document) == []
    else:
        assert check_model(recipe, document, path.parent, fetch=False) is not None


def test_a_recipe_that_does_not_fit_would_be_seen() -> None:
    path = next(path for path in RECIPES if path.stem == "qwen3-30b-a3b-nvfp4-tensorrt-llm")
    recipe, document = load_recipe(path, ("quantize.scheme=W8A8",))
    shape = decoder_shape(CONFIGS[recipe.model.source], recipe.model.source)
    assert any("modelopt cannot hold W8A8" in problem.message for problem in shape_problems(recipe, shape, document))


def test_recipes_for_an_engine_are_named_after_it() -> None:
    for path in RECIPES:
        recipe, _ = load_recipe(path)
        engine = getattr(recipe.target, "engine", None) or "ort"
        assert path.stem.endswith(f"-{engine}"), path
