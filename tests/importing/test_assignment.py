"""Targets and ignore lists as overrides: the same modules get the same schemes as compressed-tensors gives them."""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import is_match, match_name, match_targets

from assay.errors import RecipeError
from assay.importing.patterns import UnreadableError, globs, matches
from assay.models.architectures import decoder_shape, read_config
from assay.quantize.schemes import assign_schemes, weight_scheme
from assay.targets.compressed_tensors_formats import arguments_of

Import = Callable[..., Any]


def overrides(imported: Import, fields: str, model: str | None = "hf:Qwen/Qwen3-8B") -> list[tuple[Any, ...]]:
    lines = "".join(f"      {line}\n" for line in fields.splitlines())
    recipe, _ = imported(f"default_stage:\n  default_modifiers:\n    QuantizationModifier:\n{lines}", model)
    return [(entry.match, entry.scheme) for entry in recipe.quantize.overrides]


NAMES = [
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.10.mlp.down_proj",
    "model.layers.21.mlp.experts.1.up_proj",
    "model.layers.3.mlp.gate",
]


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("lm_head", ("lm_head",)),
        ("model.layers.0.mlp.gate_proj", ("model.layers.0.mlp.gate_proj",)),
        ("re:.*lm_head", ("*lm_head*",)),
        ("re:.*mlp.gate$", ("*mlp?gate",)),
        (r"re:.*\.mlp\.down_proj$", ("*.mlp.down_proj",)),
        ("re:.*(q|k|v)_proj$", ("*q_proj", "*k_proj", "*v_proj")),
        ("re:.*self_attn.(?:q|o)_proj", ("*self_attn?q_proj*", "*self_attn?o_proj*")),
        ("re:.*[qkv]_proj$", ("*[qkv]_proj",)),
        ("re:.*[^qkv]_proj$", ("*[!qkv]_proj",)),
        (r"re:model\.layers\.\d\.mlp.*", ("model.layers.[0-9].mlp*",)),
        ("re:lm_head|.*down_proj$", ("lm_head*", "*down_proj")),
        ("re:^model.layers.1[0-9].*", ("model?layers?1[0-9]*",)),
        ("re:.*.*down_proj", ("*down_proj*",)),
    ],
)
def test_an_expression_as_globs(target: str, found: tuple[str, ...]) -> None:
    assert globs(target) == found
    for name in NAMES:
        wanted = match_name(name, target)
        assert matches(target, (name,)) == wanted == any(fnmatch.fnmatchcase(name, glob) for glob in found), name


@pytest.mark.parametrize(
    "target",
    [
        "re:.*(a(b|c))",
        "re:(a+)+$",
        "re:.*(q|k)?_proj",
        "re:a{3}",
        "re:.*q*_proj",
        "re:(?!lm_head).*",
        "re:(?i)LM_HEAD",
        r"re:\w+",
        "re:[a",
        "re:(a",
        "re:a)",
        "re:*",
        "re:\\",
        "re:.*a.*b.*c.*d.*",
        "re:" + "a" * 300,
        "re:" + "(a|b)" * 20,
        "re:" + "(a|b|c|d)" * 100,
    ],
)
def test_what_is_no_simple_expression_is_not_read_nor_run(target: str) -> None:
    started = time.monotonic()
    with pytest.raises(UnreadableError):
        globs(target)
    assert time.monotonic() - started < 1


def test_parts_of_a_model_that_stay_as_they_are(imported: Import) -> None:
    ignore = "[lm_head, 're:.*mlp.gate$', 're:.*embed.*', model.layers.0.mlp.down_proj, 're:.*layers.1.self_attn.*']"
    assert overrides(imported, f"scheme: FP8_DYNAMIC\nignore: {ignore}") == [
        ("model.layers.0.mlp.down_proj", "none"),
        ("*layers.1.self_attn*", "none"),
    ]


def test_layers_and_experts_by_high_numbers_are_known_without_the_model(imported: Import) -> None:
    names = "[lm_head, model.layers.77.mlp.down_proj, 're:.*layers.9[0-3].*experts.12[0-7].*', 're:model.layers.(31|60).mlp.*']"
    found = overrides(imported, f"scheme: FP8_DYNAMIC\nignore: {names}")
    assert found == [
        ("model.layers.77.mlp.down_proj", "none"),
        ("*layers.9[0-3]*experts.12[0-7]*", "none"),
        ("model.layers.31.mlp*", "none"),
        ("model.layers.60.mlp*", "none"),
    ]


def test_what_is_ignored_and_a_target_is_ignored(imported: Import) -> None:
    fields = "scheme: {FP8_DYNAMIC: [Linear, 're:.*down_proj']}\nignore: [lm_head, 're:.*down_proj']"
    assert overrides(imported, fields)[0] == ("*down_proj", "none")


def test_a_head_that_is_not_ignored_is_quantized(imported: Import) -> None:
    assert overrides(imported, "scheme: FP8_DYNAMIC") == [("lm_head", "FP8_DYNAMIC")]
    assert overrides(imported, "scheme: FP8_DYNAMIC\nignore: ['re:.*lm_head']") == []


def test_only_what_is_a_target_is_quantized(imported: Import) -> None:
    found = overrides(imported, "scheme: FP8_DYNAMIC\ntargets: ['re:.*mlp.*_proj']")
    assert found == [("*mlp*_proj", "FP8_DYNAMIC"), ("*", "none")]


def test_the_most_specific_target_decides(imported: Import) -> None:
    schemes = "{FP8: ['re:.*self_attn.*'], W4A16: [Linear], FP8_DYNAMIC: [model.layers.0.self_attn.o_proj]}"
    assert overrides(imported, f"scheme: {schemes}\nignore: [lm_head]") == [
        ("model.layers.0.self_attn.o_proj", "FP8_DYNAMIC"),
        ("*self_attn*", "FP8"),
    ]


def test_what_globs_would_take_for_more_is_refused(imported: Import) -> None:
    """One or more digits and then a name: a glob's * would find that name deeper in the layer, too."""
    ignore = r"['re:model\.layers\.\d+\.(down_proj|mlp\.up_proj)$']"
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.mlp\.down_proj would come out otherwise"):
        overrides(imported, f"scheme: FP8_DYNAMIC\nignore: {ignore}")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral"])
def test_every_linear_of_a_model_gets_what_compressed_tensors_gives_it(
    imported: Import, tiny_model: Callable[[str], Path], family: str
) -> None:
    directory = tiny_model(family)
    targets = {"Linear": "W4A16", "re:.*self_attn.(q|k|v)_proj": "FP8", "re:.*layers.1.self_attn.o_proj": "FP8_DYNAMIC"}
    ignore = ["lm_head", "re:.*mlp.gate$", "model.layers.0.self_attn.o_proj"]
    groups = {
        str(number): {"targets": [target]} | arguments_of(weight_scheme(scheme, 32 if scheme == "W4A16" else None))
        for number, (target, scheme) in enumerate(targets.items())
    }
    modifier = {"QuantizationModifier": {"config_groups": groups, "ignore": ignore}}
    recipe, _ = imported(json.dumps({"default_stage": {"default_modifiers": modifier}}), str(directory))
    shape = decoder_shape(read_config(directory), family)
    ours = assign_schemes(recipe.quantize, shape).schemes
    module = torch.nn.Linear(1, 1, device="meta")
    for linear in shape.linears:
        path = shape.architecture.module_path(linear.name)
        wanted = None if is_match(path, module, ignore) else targets[match_targets(path, module, targets)[0]]
        assert (ours[linear.name].name if linear.name in ours else None) == wanted, linear.name
    assert {scheme.name for scheme in ours.values()} == {"W4A16", "FP8", "FP8_DYNAMIC"}
