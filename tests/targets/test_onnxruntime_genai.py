import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from assay.errors import AssayError
from assay.models.checkpoint import Checkpoint
from assay.quantize.schemes import assign_schemes
from assay.recipe import Recipe
from assay.requirements import built_with
from assay.targets import onnxruntime_genai as target
from assay.targets.realized import verify
from assay_evals.runtimes.base import open_runtime

FORMAT = {"format": "onnxruntime-genai", "accuracy_level": 0}
HEAD_8 = [{"match": "lm_head", "scheme": "W8A16"}]
PROMPT = [5, 400, 17, 301, 77, 8, 9, 250, 33, 4, 511, 1]


@pytest.mark.parametrize(
    ("initializer", "modules"),
    [
        ("lm_head.MatMul.weight", ("lm_head",)),
        ("model.layers.3.attn.o_proj.MatMul.weight", ("model.layers.3.self_attn.o_proj",)),
        ("model.layers.12.mlp.down_proj.MatMul.weight", ("model.layers.12.mlp.down_proj",)),
        (
            "model.layers.0.attn.qkv_proj.MatMul.weight",
            tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv"),
        ),
        (
            "model.layers.0.mlp.gate_up_proj.MatMul.weight",
            ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        ),
        ("model.layers.0.attn.qkv_proj.Add.bias", ()),
        ("model.layers.0.input_layernorm.weight", ()),
        ("model.embed_tokens.weight", ()),
    ],
)
def test_initializers_name_the_modules_whose_weights_they_hold(initializer: str, modules: tuple[str, ...]) -> None:
    assert target.modules_of(initializer) == modules


def nodes(directory: Path, kind: str) -> list[ir.Node]:
    return [node for node in ir.load(directory / target.MODEL).graph if node.op_type == kind]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_arithmetic_in_8_bits_is_close(bench: Any, recipe_for: Callable[..., Recipe], family: str, scheme: str) -> None:
    """accuracy_level 4 rounds each block of inputs to 8 bits, steps of 1/127 of its largest: some 1 % of the output."""
    exact = recipe_for(FORMAT, scheme=scheme, overrides=HEAD_8)
    rounded = recipe_for(FORMAT | {"accuracy_level": 4}, scheme=scheme, overrides=HEAD_8)
    expected = bench.expected_logits(exact, family, PROMPT)
    directory, realization = bench.build(rounded, family)
    assert realization.requires == built_with("onnxruntime-genai")
    found = open_runtime("onnxruntime-genai", directory).logits(PROMPT)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert 1e-5 < error < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1, 4])
def test_products_get_the_accuracy_level_of_the_recipe(
    bench: Any, recipe_for: Callable[..., Recipe], level: int
) -> None:
    directory, _ = bench.build(recipe_for(FORMAT | {"accuracy_level": level}), "llama")
    found = nodes(directory, "MatMulNBits")
    assert {node.attributes["accuracy_level"].as_int() for node in found} == {level}
    if level == 1:
        recipe = recipe_for(FORMAT | {"accuracy_level": 1})
        expected = bench.expected_logits(recipe, "llama", PROMPT)
        logits = open_runtime("onnxruntime-genai", directory).logits(PROMPT)
        assert logits == pytest.approx(expected, abs=2e-6 * float(np.abs(expected).max()), rel=0)


@pytest.mark.slow
def test_every_quantized_product_is_replaced_and_no_other(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    recipe = recipe_for(FORMAT, overrides=[{"match": "*.1.mlp.*", "scheme": "none"}])
    directory, _ = bench.build(recipe, "qwen2")

    def products(kind: str) -> list[str]:
        names = [str(node.inputs[1].name) for node in nodes(directory, kind) if node.inputs[1] is not None]
        return [module for name in names for module in target.modules_of(name.replace("_Q4", ""))]

    assigned = assign_schemes(recipe.quantize, bench.checkpoint("qwen2").shape).schemes
    assert sorted(products("MatMulNBits")) == sorted(assigned)
    assert sorted(products("MatMul")) == [
        "lm_head",
        *(f"model.layers.1.mlp.{part}_proj" for part in ("down", "gate", "up")),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("head", [[], HEAD_8], ids=["float head", "8-bit head"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_embedding_is_stored_once_and_in_its_own_dtype(
    bench: Any, recipe_for: Callable[..., Recipe], family: str, head: list[dict[str, str]]
) -> None:
    """Unless it is also the float32 head of a tied model."""
    directory, _ = bench.build(recipe_for(FORMAT, overrides=head), family)
    initializers = ir.load(directory / target.MODEL).graph.initializers.values()
    tables = [value.dtype for value in initializers if list(value.shape or ()) in ([512, 64], [64, 512])]
    tied, float_head = family == "llama", not head
    exact, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    if tied and float_head:
        assert tables == [wide]
    else:
        assert sorted(tables, key=str) == sorted([exact] + [wide] * float_head, key=str)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["weight_Q4", "weight_scales", "weight_zero_points"])
def test_a_changed_byte_is_noticed(bench: Any, recipe_for: Callable[..., Recipe], suffix: str) -> None:
    recipe = recipe_for(FORMAT, scheme="W4A16_ASYM")
    directory, _ = bench.build(recipe, "llama")
    name = f"model.layers.0.mlp.down_proj.MatMul.{suffix}"
    value = ir.load(directory / target.MODEL).graph.initializers[name].const_value
    assert value is not None
    # Small tensors lie in the graph's own file.
    path = directory / (target.DATA if isinstance(value, ir.ExternalTensor) else target.MODEL)
    data, held = bytearray(path.read_bytes()), value.tobytes()
    assert data.count(held) == 1
    data[data.index(held) + len(held) // 2] ^= 1
    path.write_bytes(data)
    shape, modules = bench.checkpoint("llama").shape, bench.modules(recipe, "llama")
    assigned = assign_schemes(recipe.quantize, shape).schemes
    with pytest.raises(AssayError, match=r"0.mlp.down_proj: the compiled model's numbers are not the ones"):
        verify(shape, assigned, modules, target.read_back(directory, shape))


@pytest.mark.slow
def test_a_graph_that_holds_other_weights_is_not_trusted(
    bench: Any, recipe_for: Callable[..., Recipe], make_model: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_for(FORMAT)
    other = Checkpoint(make_model(tmp_path / "other", "llama", seed=1))
    baseline = bench.baseline(recipe, "llama")
    with pytest.raises(AssayError, match=r"builder changed the weights of model\.layers\.0"):
        target.build_candidate(other, bench.quantized(recipe, "llama"), recipe, baseline, tmp_path / "candidate")


@pytest.mark.slow
def test_a_failing_builder_is_an_error_with_its_last_lines(make_model: Callable[..., Path], tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", "llama")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "no such function"}))
    with pytest.raises(AssayError, match=r"model builder failed \(exit code 1\):\n(.*\n)+.*no such function"):
        target.build_baseline(Checkpoint(directory), tmp_path / "baseline")


@pytest.mark.slow
def test_the_baseline_is_plain_files_next_to_each_other(bench: Any, recipe_for: Callable[..., Recipe]) -> None:
    directory = bench.baseline(recipe_for(FORMAT), "llama")
    wanted = {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in directory.iterdir()} == wanted | {"chat_template.jinja", "generation_config.json"}
    assert all(path.is_file() and not path.is_symlink() for path in directory.iterdir())
